"""Compute outputs with saved weights in a new process, for `cnntrain check reload`.

    python -m cnntrain.checks.reload_worker CHECKPOINT IMAGES OUTPUTS

IMAGES contains normalized images (N, C, H, W); OUTPUTS is written.
"""

import sys
from pathlib import Path

import torch

from cnntrain.config.schema import Settings, parse
from cnntrain.train import checkpoint
from cnntrain.train.checkpoint import load_weights
from cnntrain.train.evaluate import predict_batch
from cnntrain.train.setup import build_components
from cnntrain.types import DataSpec


def write_outputs(checkpoint_path: Path, images_path: Path, outputs_path: Path) -> None:
    content = checkpoint.load(checkpoint_path)
    config = content["config"]
    if "pretrained" in config["model"]:
        config["model"] = {**config["model"], "pretrained": False}
    components = build_components(parse(Settings, config), DataSpec(**content["spec"]))
    compute, model = components.compute, components.model
    load_weights(model, content["state"]["model"])
    model.eval().to(memory_format=compute.memory_format)
    images = torch.load(images_path, weights_only=True).to(compute.device)
    with torch.no_grad():
        outputs = predict_batch(model, images, compute)
    torch.save(outputs.cpu(), outputs_path)


if __name__ == "__main__":
    write_outputs(*(Path(word) for word in sys.argv[1:4]))
