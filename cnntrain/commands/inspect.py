"""Summarize a network: shape, parameters, multiply-adds, memory and receptive field of every layer.

`cnntrain inspect model=vgg16 data=fashion_mnist`, or one row each for several networks: `model=vgg16,resnet18`. No data
are read: the network runs on the meta device (shapes without data). `inspect.image_size=224 inspect.channels=3
inspect.num_outputs=1000` replace the properties of the data. Writes CSV, JSON and PNG files to the run directory.
"""

import dataclasses
import logging
from functools import partial

from cnntrain.config.command_line import Invocation
from cnntrain.config.compose import read_settings
from cnntrain.config.schema import Settings
from cnntrain.errors import UserError
from cnntrain.report.console import console, log_to_console
from cnntrain.summary.layer_table import ModelSummary, summarize
from cnntrain.summary.preflight import preflight
from cnntrain.summary.view import print_summaries
from cnntrain.sweep.search_space import expand_grid
from cnntrain.train.run_dir import open_run_dir
from cnntrain.train.setup import (
    build_pipeline,
    build_source,
    build_task,
    find_pretrained_weights,
    make_model,
    use_pretrained_size,
)

log = logging.getLogger("cnntrain")


def run(invocation: Invocation) -> int:
    log_to_console()
    combinations = expand_grid(invocation.overrides, invocation.config_dir)
    settings = [read_settings(overrides, invocation.config_dir) for overrides in combinations]
    summaries = [summarize_model(each) for each in settings]
    first, options = settings[0], settings[0].inspect
    with open_run_dir(first.run_dir, f"inspect-{first.label}") as run_dir:
        written = print_summaries(
            summaries, run_dir.path, options.depth, options.convention, console, first.log.figures
        )
    for path in written:
        print(path)
    return 0


def summarize_model(settings: Settings) -> ModelSummary:
    """Summarize the configured network for the size of its data, or for the size in `inspect`."""
    options = settings.inspect
    settings = use_pretrained_size(settings, find_pretrained_weights(settings))
    source = build_source(settings)
    spec = source.spec()
    pipeline = build_pipeline(settings, spec)
    task = build_task(settings, spec, pipeline)
    size = pipeline.output_size if options.image_size is None else options.image_size
    image_size = (size, size) if isinstance(size, int) else (size[0], size[1])
    channels = options.channels or spec.channels
    name = settings.model.get("name") or settings.choices["model"]
    # The summary does not depend on the weights; false also overrides a user's network that loads its own.
    model = {**settings.model, "pretrained": False} if "pretrained" in settings.model else settings.model
    settings, num_outputs = dataclasses.replace(settings, model=model), options.num_outputs or task.num_outputs
    build = partial(make_model, settings, channels, num_outputs, image_size)
    classification = bool(spec.classes) and options.image_size is None
    findings = preflight(
        build, channels, image_size, classification=classification, name=name, size_key="inspect.image_size"
    )
    for finding in findings:
        if finding.verdict == "FAIL":
            raise UserError(f"{finding.evidence}\n{finding.remedy}")
        log.warning("%s: %s", finding.evidence, finding.remedy)
    return summarize(build, (channels, *image_size), name)
