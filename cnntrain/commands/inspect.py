"""Summarize a network: shape, parameters, multiply-adds, memory and receptive field of every layer.

`cnntrain inspect model=vgg16 data=fashion_mnist`, or one row each for several networks: `model=vgg16,resnet18`. No data
are read: the network runs on the meta device (shapes without data). `inspect.image_size=224 inspect.channels=3
inspect.num_outputs=1000` replace the properties of the data. Writes CSV, JSON and PNG files to the run directory.
"""

import dataclasses
import logging
from functools import partial
from pathlib import Path

from cnntrain.config.command_line import Invocation
from cnntrain.config.compose import read_settings
from cnntrain.config.schema import Settings
from cnntrain.errors import UserError
from cnntrain.report.console import console, log_to_console
from cnntrain.summary.layer_table import ModelSummary, summarize
from cnntrain.summary.preflight import preflight
from cnntrain.summary.view import report
from cnntrain.sweep.search_space import expand_grid
from cnntrain.train.run_dir import open_run_dir
from cnntrain.train.setup import (
    build_pipeline,
    build_source,
    build_task,
    find_pretrained_weights,
    make_model,
    size_remedy,
    use_pretrained_size,
)

log = logging.getLogger("cnntrain")


def run(invocation: Invocation) -> int:
    if invocation.words:
        raise UserError(f"inspect: {invocation.words[0]!r} is not an override; write model=NAME")
    log_to_console()
    combinations = expand_grid(invocation.overrides, invocation.config_dir)
    settings = [read_settings(overrides, invocation.config_dir) for overrides in combinations]
    summaries = [summarize_model(each) for each in settings]
    first = settings[0]
    options, folder = first.inspect, Path(first.run_dir) if first.run_dir else None
    with open_run_dir(folder, f"inspect-{first.label}") as run_dir:
        written = report(summaries, run_dir.path, options.depth, options.convention, console, first.log.figures)
    for path in written:
        print(path)
    return 0


def summarize_model(settings: Settings) -> ModelSummary:
    """Summarize the configured network for the size of its data, or for the size in `inspect`.

    Raises:
        UserError: the network cannot be built, or does not fit its input; names the layer.
    """
    options = settings.inspect
    settings = use_pretrained_size(settings, find_pretrained_weights(settings))
    source, _ = build_source(settings)
    spec = source.spec()
    pipeline = build_pipeline(settings, spec)
    task = build_task(settings, spec, pipeline)
    image_size = pipeline.output_size if options.image_size is None else height_width(options.image_size)
    channels = options.channels or spec.channels
    name = settings.model.get("name") or settings.choices["model"]
    # The summary does not depend on the weights; false also overrides a user's network that loads its own.
    model = {**settings.model, "pretrained": False} if "pretrained" in settings.model else settings.model
    build = partial(
        make_model,
        dataclasses.replace(settings, model=model),
        channels,
        options.num_outputs or task.num_outputs,
        image_size,
    )
    classification = bool(spec.classes) and options.image_size is None
    for finding in preflight(build, channels, image_size, classification=classification, name=name):
        if finding.verdict == "FAIL":
            remedy = size_remedy(finding.remedy, "inspect.image_size", True)
            raise UserError(f"{finding.evidence}\n{remedy}")
        log.warning("%s: %s", finding.evidence, finding.remedy)
    return summarize(build, (channels, *image_size), name)


def height_width(size: int | list[int]) -> tuple[int, int]:
    """Return (height, width) for one number or two."""
    if isinstance(size, int) and size > 0:
        return size, size
    if isinstance(size, list) and len(size) == 2 and all(isinstance(n, int) and n > 0 for n in size):
        return size[0], size[1]
    raise UserError(f"inspect.image_size: must be one number or [height, width] in pixels, got {size!r}")
