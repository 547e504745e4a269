"""Predict on images: results as CSV and JSON, masks as PNG, and figures.

`cnntrain predict checkpoint=RUN images=FILE|FOLDER`. Images of any size and mode are preprocessed as in training; the
dataset is not needed. Points are in pixels of the upright image (after its EXIF orientation), x to the right, y down,
with the center of the first pixel at 0. Masks have the size of the source image; pixels that the network did not see
get the ignore id. Writes predictions.csv, predictions.json, masks/ and figures/.
"""

import csv
import dataclasses
import json
import logging
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cnntrain.augment.pipeline import Pipeline
from cnntrain.commands.evaluate import (
    config_of,
    limited_construction,
    load_eval_weights,
    refuse_other_network,
)
from cnntrain.config.command_line import Invocation
from cnntrain.config.compose import read_command_settings
from cnntrain.config.schema import PredictSettings, Settings, parse
from cnntrain.data.cache import decode_into_ram, fits_in_ram
from cnntrain.data.csv_table import read_boxes
from cnntrain.data.decoder import ImageDecoder, make_decoder
from cnntrain.data.examples import Examples, LazyImages
from cnntrain.data.files import BadFile, list_files, raise_if_bad
from cnntrain.data.image_reader import image_extensions, read_size
from cnntrain.data.loader import Loader, make_loader
from cnntrain.data.resize import expand_box
from cnntrain.data.scan import scan_files
from cnntrain.errors import UserError
from cnntrain.io.safe_files import open_atomic_text
from cnntrain.plots.figure import log_plot_errors, save_figure
from cnntrain.report.console import log_to_console
from cnntrain.report.mask_files import mask_names, outside_image, write_mask
from cnntrain.tasks.segmentation import Segmentation
from cnntrain.tasks.task import Task
from cnntrain.train.checkpoint import load_validated
from cnntrain.train.device import Compute, choose_compute, prepare_torch
from cnntrain.train.resume import locate_checkpoint
from cnntrain.train.run_dir import RunDir, open_run_dir, provenance
from cnntrain.train.setup import build_model, build_pipeline, build_task
from cnntrain.train.signals import StopFlag, stop_flag
from cnntrain.types import Batch, DataSpec

log = logging.getLogger("cnntrain")
IMAGES_PER_PAGE = 24
MAX_MARGIN = 10
Row = dict[str, Any]


@dataclass
class Predictor:
    """A trained network with its preprocessing."""

    compute: Compute
    spec: DataSpec
    pipeline: Pipeline
    task: Task
    model: nn.Module
    decoder: ImageDecoder
    batch_size: int
    crops: bool  # trained on crops of objects
    crop_margin: float  # margin on each side of a box, relative to its longer side

    @torch.no_grad()
    def outputs(self, loader: Loader, stop: StopFlag) -> Iterator[tuple[Batch, Tensor]]:
        """Yield each preprocessed batch with its outputs (N, ...) float32."""
        self.model.eval()
        for batch in loader.batches(torch.arange(len(loader)), self.batch_size):
            stop.check()
            seen = self.pipeline.eval_transform(batch)
            with self.compute.autocast():
                outputs = self.model(seen.images.contiguous(memory_format=self.compute.memory_format))
            yield seen, outputs.float()


def run(invocation: Invocation) -> int:
    if invocation.words:
        raise UserError(f"predict: {invocation.words[0]!r} is not an override; write checkpoint=PATH images=PATH")
    settings = read_command_settings(PredictSettings, "predict", invocation.overrides, invocation.config_dir)
    predict(settings, invocation.line)
    return 0


def predict(settings: PredictSettings, command_line: str = "") -> list[Row]:
    """Predict and return the rows of predictions.csv, one per image.

    Raises:
        UserError: the checkpoint or an image is invalid; nothing has been written.
    """
    log_to_console()
    paths, names = find_images(Path(settings.images).expanduser())
    path = locate_checkpoint(Path(settings.checkpoint), "best.pt")
    predictor = restore_predictor(load_validated(path), settings)
    boxes = None
    if settings.boxes is not None:
        paths, names, boxes = _read_objects(Path(settings.boxes).expanduser(), paths, names, predictor)
    elif predictor.crops:
        log.warning(
            "predict: this network was trained on crops of objects (data.crop), but gets whole images; give "
            "boxes=FILE, or images that are cropped in the same way"
        )
    examples = Examples(LazyImages(paths, predictor.decoder, boxes), {}, names)
    if fits_in_ram({"images": examples}):
        examples = decode_into_ram({"images": examples})["images"]
    else:
        scan_files({"images": examples}, "headers")
    loader = make_loader(examples, predictor.compute.device, settings.workers)
    folder = Path(settings.run_dir) if settings.run_dir else None
    with open_run_dir(folder, "predict") as run_folder, stop_flag() as stop:
        rows = _write(run_folder, predictor, loader, (paths, names), settings.draw, stop)
        write_rows(rows, run_folder.path / "predictions.csv")
        listed = [nest(row, predictor) for row in rows]
        text = json.dumps({"checkpoint": str(path), "images": listed}, indent=1)
        run_folder.write_text("predictions.json", text + "\n")
        run_folder.write_json("run.json", provenance(command_line))
    loader.close()
    print(f"{len(rows)} image{'s' if len(rows) > 1 else ''}: {run_folder.path / 'predictions.csv'}")
    for name, holds in (
        ("masks", "pixel values are class ids"),
        ("figures", "predictions drawn on the images"),
    ):
        if any((run_folder.path / name).glob("*.png")):
            print(f"{name + ':':<9} {run_folder.path / name} ({holds})")
    return rows


def restore_predictor(saved: dict[str, Any], settings: PredictSettings) -> Predictor:
    """Rebuild the network of a checkpoint and its preprocessing.

    Raises:
        UserError: a part cannot be built.
    """
    restored, spec = parse(Settings, config_of(saved, settings)), DataSpec(**saved["spec"])
    with limited_construction(len(saved["state"]["model"])):
        refuse_other_network(restored, spec, saved)
    prepare_torch(restored.threads, restored.deterministic)
    compute = choose_compute(restored.device, restored.precision, restored.channels_last)
    pipeline = build_pipeline(restored, spec)
    task = build_task(restored, spec, pipeline)
    with limited_construction(len(saved["state"]["model"])):
        model = build_model(restored, spec, task, pipeline.output_size, show_warnings=False).to(compute.device)
    load_eval_weights(model, saved)
    model.to(memory_format=compute.memory_format)
    data = restored.data
    crops = data.get("crop", "none") != "none"
    # A dataset without this key has images of one size. Letterboxing shows the whole image.
    decoder = make_decoder([spec.height, spec.width], spec.channels, data.get("resize") or "letterbox")
    bits = 16 if data.get("bits") is None else data["bits"]
    if not isinstance(bits, int | float) or bits not in range(9, 17):
        raise UserError(f"checkpoint: data.bits is {bits!r}, but must be from 9 to 16")
    decoder = dataclasses.replace(decoder, bits=int(bits))
    margin = 0.0 if data.get("crop_margin") is None else data["crop_margin"]
    if isinstance(margin, bool) or not isinstance(margin, int | float) or not 0 <= margin <= MAX_MARGIN:
        raise UserError(f"checkpoint: data.crop_margin is {margin!r}, but must be a number from 0 to {MAX_MARGIN}")
    margin = float(margin) if crops else 0.0
    batch_size = restored.fixed_batch_size or saved["config"]["batch_size"]
    return Predictor(compute, spec, pipeline, task, model, decoder, batch_size, crops, margin)


def find_images(path: Path) -> tuple[list[str], list[str]]:
    """Return the paths of the images and their names, which are relative to the folder.

    Raises:
        UserError: there are no images.
    """
    if path.is_file():
        return [str(path)], [path.name]
    if not path.is_dir():
        raise UserError(f"images: {path} does not exist; give an image, or a folder of images")
    bad: list[BadFile] = []
    found = list_files(path, bad)
    known = image_extensions()
    paths = [file for file in found if Path(file).suffix.lower() in known]
    raise_if_bad(bad, len(found) + len(bad), path)
    if not paths:
        raise UserError(f"images: {path} has no images (files that end in .jpg, .png and the like)")
    if others := len(found) - len(paths):
        log.info("predict: ignoring %d of %d files whose names have no image extension", others, len(found))
    return paths, [os.path.relpath(file, path) for file in paths]


def _read_objects(
    file: Path, paths: list[str], names: list[str], predictor: Predictor
) -> tuple[list[str], list[str], Tensor]:
    """Return paths, names and boxes (N, 4) of the objects listed in a file, in its order."""
    found = read_boxes(file, names)
    path_of = dict(zip(names, paths, strict=True))
    image_size = (predictor.spec.height, predictor.spec.width)
    boxes = [expand_box(box, predictor.crop_margin, image_size) for _, box in found]
    listed = [name for name, _ in found]
    times, before = Counter(listed), Counter[str]()
    counted = []
    for name in listed:
        counted.append(f"{name}:{before[name]}" if times[name] > 1 else name)
        before[name] += 1
    return [path_of[name] for name in listed], counted, torch.tensor(boxes, dtype=torch.float64)


def _write(
    folder: RunDir, predictor: Predictor, loader: Loader, files: tuple[list[str], list[str]],
    draw: int | None, stop: StopFlag,
) -> list[Row]:  # fmt: skip
    """Predict all images, write masks and figures, and return the rows."""
    paths, names = files
    masks = mask_names(names)
    rows: list[Row] = []
    page = 0
    mean, std = predictor.pipeline.mean, predictor.pipeline.std
    for batch, outputs in predictor.outputs(loader, stop):
        matrices = (
            torch.eye(3, dtype=torch.float64).repeat(len(batch), 1, 1)
            if batch.source_to_image is None
            else batch.source_to_image
        )
        truth = {"source_to_image": matrices}
        start, own = len(rows), names[len(rows) : len(rows) + len(batch)]
        predictions = predictor.task.predictions(outputs, truth)
        rows += [{"image_name": name, **each} for name, each in zip(own, predictions, strict=True)]
        probabilities = predictor.task.probabilities(outputs)
        if probabilities is not None:
            for row, values in zip(rows[start:], probabilities.tolist(), strict=True):
                row |= {f"probability/{n}": p for n, p in zip(predictor.spec.classes, values, strict=True)}
        ids = predictor.task.masks(outputs, (batch.images.shape[-2], batch.images.shape[-1]))
        shown: dict[str, Tensor] = {}
        if ids is not None:
            image_size = (ids.shape[-2], ids.shape[-1])
            sizes = [read_size(path) for path in paths[start : start + len(batch)]]
            outside = [outside_image(m, s, image_size) for m, s in zip(matrices, sizes, strict=True)]
            shown["outside"] = torch.from_numpy(np.stack(outside))
            for i, mask in enumerate(ids.numpy()):
                rows[start + i]["mask"] = f"masks/{masks[start + i]}"
                target = folder.path / "masks" / masks[start + i]
                on_image = write_mask(
                    mask, matrices[i], sizes[i], predictor.pipeline.spec.mask_fill, target, folder.path
                )
                if isinstance(predictor.task, Segmentation):
                    shares = predictor.task.class_fractions(on_image)
                    rows[start + i] |= {f"share/{name}": share for name, share in shares.items()}
        wanted = len(batch) if draw is None else max(0, min(len(batch), draw - start))
        for first in range(0, wanted, IMAGES_PER_PAGE):
            part = slice(first, min(first + IMAGES_PER_PAGE, wanted))
            page += 1
            with log_plot_errors(f"page {page} of the predictions"):
                figure = predictor.task.draw(
                    batch.images[part],
                    outputs[part],
                    {k: v[part] for k, v in shown.items()},
                    own[part],
                    mean,
                    std,
                )
                save_figure(figure, folder.figures / f"predictions-{page:03}.png")
    return rows


def write_rows(rows: list[Row], target: Path) -> None:
    with open_atomic_text(target, sync=False) as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})


def nest(row: Row, predictor: Predictor) -> Row:
    """Convert a row for JSON: probabilities and points become mappings."""
    result = {key: value for key, value in row.items() if not key.startswith("probability/")}
    probabilities = {key.removeprefix("probability/"): p for key, p in row.items() if key.startswith("probability/")}
    if probabilities:
        result["probabilities"] = probabilities
    if predictor.spec.keypoints:
        axes = [(name, [f"{name}_x", f"{name}_y"]) for name in predictor.spec.keypoints]
        result = {k: v for k, v in result.items() if not any(k in keys for _, keys in axes)}
        result["points"] = {name: [row[key] for key in keys] for name, keys in axes}
    return result
