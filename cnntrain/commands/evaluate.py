"""Judge a checkpoint on a split: the same metrics as at the end of training, and one row per example, hardest first.

`cnntrain evaluate checkpoint=RUN split=test`. Preprocessing, classes and split come from the checkpoint; the data may
lie elsewhere (`data.root=`). Writes results.json, examples.csv and pictures.
"""

import contextlib
import csv
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cnntrain.config.compose import read_command_settings
from cnntrain.config.invocation import Invocation
from cnntrain.config.schema import EvaluateSettings, PredictSettings, Settings, parse
from cnntrain.data.examples import Source
from cnntrain.data.fingerprint import same_data
from cnntrain.errors import DivergedError, UserError
from cnntrain.io.safe_files import exists, is_folder, open_atomic_text, run_folder_of
from cnntrain.plots.figure import label_split, log_plot_errors, save_figure
from cnntrain.report.console import console, log_to_console
from cnntrain.report.table import print_rows
from cnntrain.summary.trace import needs_data
from cnntrain.train.checkpoint import check_weights, load_validated, load_weights
from cnntrain.train.evaluate import evaluate
from cnntrain.train.parts import build_pipeline, build_task, make_model
from cnntrain.train.resume import locate_checkpoint
from cnntrain.train.run_dir import open_run_dir, provenance
from cnntrain.train.setup import Components, build_components
from cnntrain.train.signals import stop_flag
from cnntrain.types import Batch, DataSpec

log = logging.getLogger("cnntrain")
NAMES = {"train": "training", "val": "validation", "test": "test"}  # as pictures call the splits


def run(invocation: Invocation) -> int:
    if invocation.words:
        raise UserError(f"evaluate: {invocation.words[0]!r} is no override; write checkpoint=PATH")
    settings = read_command_settings(
        EvaluateSettings, "evaluate", invocation.overrides, invocation.config_dir
    )
    evaluate_checkpoint(settings, invocation.line)
    return 0


def evaluate_checkpoint(settings: EvaluateSettings, command_line: str = "") -> dict[str, float]:
    """Metrics of a checkpoint on a split, as `SPLIT/NAME`.

    Raises:
        UserError: the checkpoint or the data can't be used, or there is no such split.
        DivergedError: the loss over the split is not finite.
    """
    log_to_console()
    path = locate_checkpoint(Path(settings.checkpoint), "best.pt")
    saved = load_validated(path)
    assembly = restore(saved, settings)
    data = assembly.load(augmented=False)
    if not same_data(saved["fingerprint"], data.fingerprint):
        log.warning(
            "the data are not those of the training (%s, now %s)", saved["fingerprint"], data.fingerprint
        )
    examples = {"train": data.train, "val": data.val, "test": data.test}[settings.split]
    if examples is None:
        raise UserError("split: this data set has no test set; use split=val")
    rows: list[dict[str, Any]] = []

    def look(batch: Batch, outputs: Tensor) -> None:
        for index, row in zip(
            batch.index.tolist(), assembly.task.per_example(outputs, batch.truth), strict=True
        ):
            rows.append({"name": examples.names[index], **row})

    folder = (
        Path(settings.run_dir) if settings.run_dir else run_folder_of(path) / f"evaluate-{settings.split}"
    )
    if not settings.run_dir and exists(folder) and not is_folder(folder, run_folder_of(path)):
        raise UserError(f"{folder}: is a link or a file; remove it, or choose another folder with run_dir=")
    with open_run_dir(folder, "evaluate") as run_folder, stop_flag() as stop:
        batch_size = assembly.settings.fixed_batch_size or saved["config"]["batch_size"]
        meter = evaluate(
            assembly, assembly.model, assembly.loader(examples), batch_size, stop=stop, on_batch=look
        )
        if not meter.loss_is_finite():
            weights = [*assembly.model.named_parameters(), *assembly.model.named_buffers()]
            broken = next((name for name, weight in weights if not weight.isfinite().all()), None)
            cause = f"{broken} holds NaN or inf" if broken else "the weights are finite: look at the images"
            raise DivergedError(f"evaluate: the loss over {settings.split} is not finite; {cause}")
        figures = {**meter.compute(), **meter.details()}
        metrics = {f"{settings.split}/{name}": value for name, value in figures.items()}
        rows.sort(key=_hardest_first)
        with open_atomic_text(run_folder.path / "examples.csv", sync=False) as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        with log_plot_errors("the figures"):
            for name, figure in assembly.task.figures(meter).items():
                save_figure(label_split(figure, NAMES[settings.split]), run_folder.figures / f"{name}.png")
        run_folder.write_json("run.json", provenance(command_line))
        run_folder.write_json("results.json", metrics)
    print_rows([{"metric": name, "value": value} for name, value in metrics.items()], console=console)
    print(f"results: {folder}")
    return metrics


def _hardest_first(row: dict[str, Any]) -> tuple[bool, float]:
    """By loss; what nothing in counts, and so has none, comes last."""
    loss = float(row["loss"])
    return math.isnan(loss), -loss


def restore(saved: dict[str, Any], settings: EvaluateSettings) -> Components:
    """The parts of a run as its checkpoint has them, weights included.

    What the checkpoint says about the data holds: classes, mean and std; nothing is measured anew, and pretrained
    weights are not fetched.
    """
    config = config_of(saved, settings)
    config["data"] = dict(config["data"])
    if settings.data.root is not None:
        if "root" not in config["data"]:
            raise UserError("data.root: this data set comes with the program, it has no folder")
        config["data"]["root"] = settings.data.root
    if settings.data.workers is not None:
        config["data"]["workers"] = settings.data.workers
    spec = DataSpec(**saved["spec"])
    if "classes" in config["data"] and spec.classes:
        config["data"]["classes"] = list(spec.classes)
    restored = parse(Settings, config)
    with limited_construction(len(saved["state"]["model"])):
        refuse_other_network(restored, spec, saved)
        assembly = build_components(restored, spec)
    if isinstance(assembly.source, Source) and settings.data.root is None:
        assembly.source.downloads = False  # a stranger's checkpoint must not start a download
    load_judged(assembly.model, saved)
    assembly.model.to(memory_format=assembly.compute.memory_format)
    return assembly


def config_of(saved: dict[str, Any], settings: EvaluateSettings | PredictSettings) -> dict[str, Any]:
    """The config of the checkpoint's training, with what belongs to this machine and this call put in."""
    config = {**saved["config"], "trusted_packages": settings.trusted_packages, "threads": settings.threads}
    config |= {"device": settings.device, "precision": settings.precision or config["precision"]}
    config["batch_size"] = settings.batch_size or config["batch_size"]
    config["compile"] = "off"  # it would run a compiler
    if "pretrained" in config["model"]:
        config["model"] = {**config["model"], "pretrained": False}
    return config


def refuse_other_network(settings: Settings, spec: DataSpec, saved: dict[str, Any]) -> None:
    """Refuse a config whose network does not have the checkpoint's weights.

    The network is built without numbers, so that a layer of any width costs neither memory nor time. One of a trusted
    package is only built for real.

    Raises:
        UserError: another network, or none that can be built.
    """
    target = settings.model.get("_target_")
    if not isinstance(target, str) or target.split(".")[0] in {
        name.split(".")[0] for name in settings.trusted_packages
    }:
        return
    weights = saved["state"]["ema"] or saved["state"]["model"]
    refuse_large_numbers(settings, weights)
    pipeline = build_pipeline(settings, spec)
    task = build_task(settings, spec, pipeline)
    try:
        with torch.device("meta"):
            model = make_model(settings, spec.channels, task.num_outputs, pipeline.output_size)
    except (UserError, NotImplementedError, RuntimeError, TypeError) as error:
        if needs_data(error.__cause__ or error):
            return
        raise
    check_weights(model, weights)


LARGEST_COUNT = 10_000  # of layers, blocks, heads and the like


def refuse_large_numbers(settings: Settings, weights: dict[str, Tensor]) -> None:
    """Refuse a number in the network's config that is larger than any side of its weights: a depth of 10**7, which
    its constructor would spend hours and all memory on.

    Raises:
        UserError: names the key.
    """
    most = max([LARGEST_COUNT, *(side for weight in weights.values() for side in weight.shape)])

    def look(value: Any, key: str) -> None:
        if isinstance(value, dict):
            for name, inner in value.items():
                look(inner, f"{key}.{name}")
        elif isinstance(value, list | tuple):
            for index, inner in enumerate(value):
                look(inner, f"{key}[{index}]")
        elif isinstance(value, int) and abs(value) > most:
            raise UserError(f"checkpoint: its {key}: {value} is more than any side of its weights ({most})")

    look(settings.model, "model")


@contextlib.contextmanager
def limited_construction(count: int) -> Iterator[None]:
    """Stop building a network that has far more modules and parameters than the `count` tensors of its checkpoint.

    Raises:
        UserError: it has.
    """
    left = 10 * count + 1000

    def hook(*_: object) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise UserError(f"checkpoint: its config describes a network far larger than its {count} tensors")

    hooks = nn.modules.module
    handles = [
        hooks.register_module_module_registration_hook(hook),
        hooks.register_module_parameter_registration_hook(hook),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def load_judged(model: nn.Module, saved: dict[str, Any]) -> None:
    """The weights that were judged: the moving average where there is one."""
    state = saved["state"]
    load_weights(model, state["ema"] or state["model"])
