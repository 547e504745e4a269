"""Open a network: every layer's shape, parameters, multiply-adds, memory and receptive field; no data are read.

`cnntrain inspect model=vgg16 data=fashion_mnist`, or several at once, one row each: `model=vgg16,resnet18`. The network
is run on shapes alone (meta device). `inspect.image_size=224 inspect.channels=3 inspect.num_outputs=1000` opens it at
another size than the data's. Writes CSV, JSON and a bar picture into a run folder.
"""

import dataclasses
import logging
from functools import partial
from pathlib import Path

from cnntrain.config.compose import read_settings
from cnntrain.config.invocation import Invocation
from cnntrain.config.schema import Settings
from cnntrain.errors import UserError
from cnntrain.report.console import console, log_to_console
from cnntrain.summary.layer_table import ModelSummary, analyze
from cnntrain.summary.preflight import preflight
from cnntrain.summary.report import report
from cnntrain.sweep.search_space import expand_grid
from cnntrain.train.run_dir import open_run_dir
from cnntrain.train.setup import (
    build_pipeline,
    build_source,
    build_task,
    follow_weights,
    make_model,
    pretrained_weights,
    size_remedy,
)

log = logging.getLogger("cnntrain")


def run(invocation: Invocation) -> int:
    if invocation.words:
        raise UserError(f"inspect: {invocation.words[0]!r} is no override; write model=NAME")
    log_to_console()
    combinations = expand_grid(invocation.overrides, invocation.config_dir)
    chosen = [read_settings(each, invocation.config_dir) for each in combinations]
    anatomies = [open_network(settings) for settings in chosen]
    options, first = chosen[0].inspect, chosen[0]
    folder = Path(first.run_dir) if first.run_dir else None
    with open_run_dir(folder, f"inspect-{first.label}") as run_folder:
        written = report(
            anatomies, run_folder.path, options.depth, options.convention, console, first.log.figures
        )
    for path in written:
        print(path)
    return 0


def open_network(settings: Settings) -> ModelSummary:
    """The anatomy of the configured network at the size of its data, or at the one asked for.

    Raises:
        UserError: it can't be built, or does not fit its input; names the layer.
    """
    options = settings.inspect
    settings = follow_weights(settings, pretrained_weights(settings))
    source, _ = build_source(settings)
    spec = source.spec()
    pipeline = build_pipeline(settings, spec)
    task = build_task(settings, spec, pipeline)
    image_size = pipeline.output_size if options.image_size is None else square(options.image_size)
    channels = options.channels or spec.channels
    facts = (channels, options.num_outputs or task.num_outputs, image_size)
    name = settings.model.get("name") or settings.choices["model"]
    bare = {**settings.model, "pretrained": False} if "pretrained" in settings.model else settings.model
    make = partial(make_model, dataclasses.replace(settings, model=bare), *facts)
    classification = bool(spec.classes) and options.image_size is None
    for finding in preflight(make, channels, image_size, classification=classification, name=name):
        if finding.verdict == "FAIL":
            raise UserError(f"{finding.evidence}\n{size_remedy(finding.remedy, 'inspect.image_size', True)}")
        log.warning("%s: %s", finding.evidence, finding.remedy)
    return analyze(make, (channels, *image_size), name)


def square(size: int | list[int]) -> tuple[int, int]:
    """(height, width) of one number or two."""
    if isinstance(size, int) and size > 0:
        return size, size
    if isinstance(size, list) and len(size) == 2 and all(isinstance(n, int) and n > 0 for n in size):
        return size[0], size[1]
    raise UserError(f"inspect.image_size: must be one number or [height, width] in pixels, got {size!r}")
