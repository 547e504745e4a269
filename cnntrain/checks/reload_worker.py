"""Answer images with saved weights, in a process that knows nothing else, for `cnntrain check reload`.

`python -m cnntrain.checks.reload_worker CHECKPOINT IMAGES OUT`: IMAGES holds normalized images
(N, C, H, W), OUT will hold the outputs.
"""

import sys
from pathlib import Path

import torch

from cnntrain.config.schema import Settings, parse
from cnntrain.train import checkpoint
from cnntrain.train.checkpoint import load_weights
from cnntrain.train.setup import assemble
from cnntrain.types import DataSpec


def answer(saved_path: Path, images_path: Path, outputs_path: Path) -> None:
    saved = checkpoint.load(saved_path)
    config = saved["config"]
    if "pretrained" in config["model"]:
        config["model"] = {**config["model"], "pretrained": False}
    assembly = assemble(parse(Settings, config), DataSpec(**saved["spec"]))
    compute, model = assembly.compute, assembly.model
    load_weights(model, saved["state"]["model"])
    model.eval().to(memory_format=compute.memory_format)
    images = torch.load(images_path, weights_only=True).to(compute.device)
    with torch.no_grad(), compute.autocast():
        outputs = model(images.contiguous(memory_format=compute.memory_format))
    torch.save(outputs.float().cpu(), outputs_path)


if __name__ == "__main__":
    answer(*(Path(word) for word in sys.argv[1:4]))
