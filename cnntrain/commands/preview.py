"""Draw training images as the network would see them, without training.

`cnntrain preview data=... augment=...` draws a few images: without augmentation in the first column, and as augmented
in the first epochs of a run with this seed in the other columns, with keypoints, skeletons and masks. For keypoints, a
second figure shows images beside their flipped versions with keypoint names. Writes PNG files and TensorBoard images.
`preview.images=3 preview.epochs=8` changes the numbers of images and epochs.
"""

import dataclasses
import logging
from pathlib import Path

import torch
import yaml
from torch import Tensor

from cnntrain.augment.geometry import HorizontalFlip
from cnntrain.augment.pipeline import Pipeline
from cnntrain.config.command_line import Invocation, without_passwords
from cnntrain.config.compose import read_settings
from cnntrain.config.schema import Settings
from cnntrain.data.load import load_data
from cnntrain.data.loader import make_loader
from cnntrain.plots.figure import save_figure
from cnntrain.plots.previews import draw_batches, draw_flip
from cnntrain.randomness import epoch_order
from cnntrain.report.console import log_to_console
from cnntrain.report.tensorboard import TensorBoardWriter
from cnntrain.train.device import prepare_torch
from cnntrain.train.run_dir import open_run_dir, provenance
from cnntrain.train.setup import build_pipeline, build_source, split_data, with_configured_statistics

log = logging.getLogger("cnntrain")
FLIPPED_IMAGES = 2


def run(invocation: Invocation) -> int:
    preview(read_settings(invocation.overrides, invocation.config_dir), invocation.command_line)
    return 0


def preview(settings: Settings, command_line: str = "") -> list[Path]:
    """Draw the figures and return their paths."""
    log_to_console()
    prepare_torch(settings.threads, settings.deterministic)
    source, (_, chosen) = build_source(settings), split_data(settings)
    pipeline = build_pipeline(settings, source.spec())  # report misfits before reading images
    # Only a few images are needed, so nothing is cached.
    data = load_data(source, dataclasses.replace(chosen, cache="none"), pipeline.magnification)
    data.spec = with_configured_statistics(data.spec, chosen)
    pipeline = build_pipeline(settings, data.spec)
    if pipeline.mixes_labels:
        log.info("preview: images are mixed with each other here; in training, with other images of their batch")
    loader = make_loader(data.train, "cpu", 0, chosen.timeout_s, per_sample=True)
    count = min(settings.preview.images, len(loader))
    rows = torch.linspace(0, len(loader) - 1, count).round().long()
    original = pipeline.eval_transform(next(loader.batches(rows, count)))
    augmented = []
    for epoch in range(settings.preview.epochs):
        positions = epoch_positions(rows, len(loader), settings.seed, epoch)
        transform = pipeline.sample_transform(settings.seed, epoch)
        batch = next(loader.batches(rows, count, positions=positions, transform=transform))
        augmented.append(pipeline(batch, settings.seed, epoch))
    names = [data.train.names[row] for row in rows.tolist()]
    figures = {"augmented": draw_batches([original, *augmented], names, data.spec)}
    if data.spec.keypoints and data.spec.flip_pairs is None:
        log.warning("preview: data.flip_pairs is not set, so no flip is drawn")
    elif data.spec.keypoints:
        batch = next(loader.batches(rows, count))
        most_valid = batch.targets["valid"].sum(1).argsort(descending=True, stable=True)
        batch = batch.take(most_valid[:FLIPPED_IMAGES].sort().values)
        flipped = Pipeline(data.spec, {"flip": HorizontalFlip(probability=1.0)})(batch, settings.seed, 0)
        names = [data.train.names[row] for row in batch.index.tolist()]
        figures["flip"] = draw_flip(Pipeline(data.spec, {}).eval_transform(batch), flipped, names, data.spec)
    written = []
    with open_run_dir(settings.run_dir, f"preview-{settings.choices['data']}") as run_dir:
        config = without_passwords(dataclasses.asdict(settings))
        run_dir.write_text("config.yaml", yaml.safe_dump(config, sort_keys=False))
        run_dir.write_json("run.json", provenance(command_line))
        with TensorBoardWriter(run_dir.path) as events:
            for name, figure in figures.items():
                written.append(run_dir.figures / f"{name}.png")
                save_figure(figure, written[-1])
                if settings.log.tensorboard:
                    events.figure(f"preview/{name}", figure, 0)
    for path in written:
        print(path)
    return written


def epoch_positions(rows: Tensor, count: int, seed: int, epoch: int) -> Tensor:
    """Return the positions of `rows` in the order of an epoch; random draws depend on the position."""
    return torch.argsort(epoch_order(seed, epoch, count))[rows]
