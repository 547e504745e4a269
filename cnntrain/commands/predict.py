"""Predict on images: results as CSV and JSON, masks as PNG, and figures.

`cnntrain predict checkpoint=RUN images=FILE|FOLDER`. Images of any size and mode are preprocessed as in training; the
dataset is not needed. Points are in pixels of the upright image (after its EXIF orientation), x to the right, y down,
with the center of the first pixel at 0. Masks have the size of the source image; pixels that the network did not see
get the ignore id. Writes predictions.csv, predictions.json, masks/ and figures/.
"""

import contextlib
import dataclasses
import itertools
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
from cnntrain.config.command_line import Invocation
from cnntrain.config.compose import read_command_settings
from cnntrain.config.schema import PredictSettings, Settings
from cnntrain.data.cache import decode_into_ram, fits_in_ram, scan_files
from cnntrain.data.csv_table import read_boxes
from cnntrain.data.decoder import ImageDecoder, expand_box, make_decoder
from cnntrain.data.examples import Examples, LazyImages
from cnntrain.data.files import BadFile, list_files, raise_if_bad
from cnntrain.data.image_reader import image_extensions, read_size
from cnntrain.data.loader import Loader, make_loader
from cnntrain.errors import UserError
from cnntrain.io.safe_files import write_csv
from cnntrain.plots.figure import log_plot_errors, save_figure
from cnntrain.report.console import log_to_console
from cnntrain.report.mask_files import mask_names, outside_image, write_mask
from cnntrain.tasks.task import Task
from cnntrain.train.checkpoint import load_validated
from cnntrain.train.device import Compute, choose_compute, prepare_torch
from cnntrain.train.evaluate import predict_batch
from cnntrain.train.restore import limited_construction, load_eval_weights, refuse_other_network, restore_settings
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

    settings: Settings
    compute: Compute
    pipeline: Pipeline
    task: Task
    model: nn.Module

    @torch.no_grad()
    def outputs(self, loader: Loader, batch_size: int, stop: StopFlag) -> Iterator[tuple[Batch, Tensor]]:
        """Yield each preprocessed batch with its outputs (N, ...) float32."""
        self.model.eval()
        for batch in loader.batches(torch.arange(len(loader)), batch_size):
            stop.check()
            batch = self.pipeline.eval_transform(batch)
            yield batch, predict_batch(self.model, batch.images, self.compute)


def run(invocation: Invocation) -> int:
    settings = read_command_settings(PredictSettings, "predict", invocation.overrides, invocation.config_dir)
    predict(settings, invocation.command_line)
    return 0


def predict(settings: PredictSettings, command_line: str = "") -> list[Row]:
    """Predict and return the rows of predictions.csv, one per image. Invalid images are refused before any output."""
    log_to_console()
    paths, names = find_images(Path(settings.images).expanduser())
    path = locate_checkpoint(Path(settings.checkpoint), "best.pt")
    saved = load_validated(path)
    predictor = restore_predictor(saved, settings)
    spec, data = predictor.pipeline.spec, predictor.settings.data
    decoder, boxes = restore_decoder(data, spec), None
    crops = data.get("crop", "none") != "none"
    margin = restore_crop_margin(data) if crops else 0.0
    if settings.boxes is not None:
        found = read_boxes(Path(settings.boxes).expanduser(), names)
        boxes = torch.tensor([expand_box(box, margin, spec.image_size) for _, box in found], dtype=torch.float64)
        path_of = dict(zip(names, paths, strict=True))
        paths = [path_of[name] for name, _ in found]
        names = number_repeated([name for name, _ in found])
    elif crops:
        log.warning(
            "predict: this network was trained on crops of objects (data.crop), but gets whole images; give "
            "boxes=FILE, or images that are cropped in the same way"
        )
    examples = Examples(LazyImages(paths, decoder, boxes), {}, names)
    if fits_in_ram({"images": examples}):
        examples = decode_into_ram({"images": examples})["images"]
    else:
        scan_files({"images": examples}, "headers")
    batch_size = settings.batch_size or saved["config"]["batch_size"]
    with (
        contextlib.closing(make_loader(examples, predictor.compute.device, settings.workers)) as loader,
        open_run_dir(settings.run_dir, "predict") as run_dir,
        stop_flag() as stop,
    ):
        rows: list[Row] = []
        files, pages = [f"masks/{name}" for name in mask_names(names)], itertools.count(1)
        for batch, outputs in predictor.outputs(loader, batch_size, stop):
            start, part = len(rows), slice(len(rows), len(rows) + len(batch))
            if batch.source_to_image is None:
                batch.source_to_image = torch.eye(3, dtype=torch.float64).repeat(len(batch), 1, 1)
            rows += prediction_rows(predictor.task, batch, outputs, names[part])
            ids = predictor.task.masks(outputs, (batch.images.shape[-2], batch.images.shape[-1]))
            if ids is not None:
                sizes = [read_size(path) for path in paths[part]]
                batch.targets = {"outside": find_outside(batch, sizes)}
                write_masks(ids, batch, sizes, predictor.task, rows[part], files[part], run_dir)
            drawn = len(batch) if settings.draw is None else max(0, min(len(batch), settings.draw - start))
            for first in range(0, drawn, IMAGES_PER_PAGE):
                page = slice(first, min(first + IMAGES_PER_PAGE, drawn))
                draw_page(predictor.task, batch.take(page), outputs[page], names[part][page], next(pages), run_dir)
        csv_rows = [{k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows]
        write_csv(run_dir.path / "predictions.csv", csv_rows)
        content = {"checkpoint": str(path), "images": [nest(row, spec) for row in rows]}
        run_dir.write_text("predictions.json", json.dumps(content, indent=1) + "\n")
        run_dir.write_json("run.json", provenance(command_line))
    print(f"{len(rows)} image{'s' if len(rows) > 1 else ''}: {run_dir.path / 'predictions.csv'}")
    for name, content in (("masks", "pixel values are class ids"), ("figures", "predictions drawn on the images")):
        if any((run_dir.path / name).glob("*.png")):
            print(f"{name + ':':<9} {run_dir.path / name} ({content})")
    return rows


def restore_predictor(saved: dict[str, Any], settings: PredictSettings) -> Predictor:
    """Rebuild the network of a checkpoint and its preprocessing; the dataset is not needed."""
    restored, spec = restore_settings(saved["config"], settings), DataSpec(**saved["spec"])
    with limited_construction(saved):
        refuse_other_network(restored, spec, saved)
    prepare_torch(restored.threads, restored.deterministic)
    compute = choose_compute(restored.device, restored.precision, restored.channels_last)
    pipeline = build_pipeline(restored, spec)
    task = build_task(restored, spec, pipeline)
    with limited_construction(saved):
        model = build_model(restored, spec, task, pipeline.output_size, show_warnings=False).to(compute.device)
    load_eval_weights(model, saved)
    return Predictor(restored, compute, pipeline, task, model.to(memory_format=compute.memory_format))


def restore_decoder(data: dict[str, Any], spec: DataSpec) -> ImageDecoder:
    """Return the decoder that trained images were read with, from the `data` settings of a checkpoint."""
    # A dataset without this key has images of one size. Letterboxing shows the whole image.
    decoder = make_decoder([spec.height, spec.width], spec.channels, data.get("resize") or "letterbox")
    bits = 16 if data.get("bits") is None else data["bits"]
    if not isinstance(bits, int | float) or bits not in range(9, 17):
        raise UserError(f"checkpoint: data.bits is {bits!r}, but must be from 9 to 16")
    return dataclasses.replace(decoder, bits=int(bits))


def restore_crop_margin(data: dict[str, Any]) -> float:
    """Return the margin on each side of a box, relative to its longer side, from the settings of a checkpoint."""
    margin = 0.0 if data.get("crop_margin") is None else data["crop_margin"]
    if isinstance(margin, bool) or not isinstance(margin, int | float) or not 0 <= margin <= MAX_MARGIN:
        raise UserError(f"checkpoint: data.crop_margin is {margin!r}, but must be a number from 0 to {MAX_MARGIN}")
    return float(margin)


def find_images(path: Path) -> tuple[list[str], list[str]]:
    """Return the paths of the images and their names, which are relative to the folder."""
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


def number_repeated(names: list[str]) -> list[str]:
    """Append `:0`, `:1`, ... to names that occur several times."""
    times, before = Counter(names), Counter[str]()
    numbered = []
    for name in names:
        numbered.append(f"{name}:{before[name]}" if times[name] > 1 else name)
        before[name] += 1
    return numbered


def prediction_rows(task: Task, batch: Batch, outputs: Tensor, names: list[str]) -> list[Row]:
    """Return a row per image: its name, the prediction, and the probability of each class."""
    predictions = task.predictions(outputs, {"source_to_image": batch.truth["source_to_image"]})
    rows: list[Row] = [{"image_name": name, **each} for name, each in zip(names, predictions, strict=True)]
    probabilities = task.probabilities(outputs)
    if probabilities is not None:
        for row, values in zip(rows, probabilities.tolist(), strict=True):
            row |= {f"probability/{n}": p for n, p in zip(task.spec.classes, values, strict=True)}
    return rows


def find_outside(batch: Batch, sizes: list[tuple[int, int]]) -> Tensor:
    """Return (N, H, W) bool: letterbox borders, for source images of `sizes` (width, height)."""
    image_size = (batch.images.shape[-2], batch.images.shape[-1])
    matrices = batch.truth["source_to_image"]
    outside = [outside_image(matrix, size, image_size) for matrix, size in zip(matrices, sizes, strict=True)]
    return torch.from_numpy(np.stack(outside))


def write_masks(
    ids: Tensor,
    batch: Batch,
    sizes: list[tuple[int, int]],
    task: Task,
    rows: list[Row],
    files: list[str],
    run_dir: RunDir,
) -> None:
    """Write masks at the sizes (width, height) of the source images, and add files and class shares to the rows."""
    for i, mask in enumerate(ids.numpy()):
        rows[i]["mask"], target = files[i], run_dir.path / files[i]
        matrix = batch.truth["source_to_image"][i]
        on_source = write_mask(mask, matrix, sizes[i], task.spec.mask_fill, target, run_dir.path)
        rows[i] |= task.mask_columns(on_source)


def draw_page(task: Task, batch: Batch, outputs: Tensor, names: list[str], number: int, run_dir: RunDir) -> None:
    with log_plot_errors(f"page {number} of the predictions"):
        figure = task.draw(batch.images, outputs, batch.targets, names)
        save_figure(figure, run_dir.figures / f"predictions-{number:03}.png")


def nest(row: Row, spec: DataSpec) -> Row:
    """Convert a row for JSON: probabilities and points become mappings."""
    probabilities = {key.removeprefix("probability/"): p for key, p in row.items() if key.startswith("probability/")}
    axes = {name: [f"{name}_x", f"{name}_y"] for name in spec.keypoints}
    moved = {key for keys in axes.values() for key in keys}
    result = {k: v for k, v in row.items() if k not in moved and not k.startswith("probability/")}
    if probabilities:
        result["probabilities"] = probabilities
    if axes:
        result["points"] = {name: [row[key] for key in keys] for name, keys in axes.items()}
    return result
