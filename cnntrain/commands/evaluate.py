"""Evaluate a checkpoint on a split: the metrics of training, and one row per example, the hardest first.

`cnntrain evaluate checkpoint=RUN split=test`. Preprocessing, classes and split come from the checkpoint; `data.root=`
sets another folder of the data. Writes results.json, examples.csv and figures.
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

from cnntrain.config.command_line import Invocation
from cnntrain.config.compose import read_command_settings
from cnntrain.config.schema import EvaluateSettings, PredictSettings, Settings, parse
from cnntrain.data.examples import Source
from cnntrain.data.fingerprint import same_data
from cnntrain.errors import DivergedError, UserError
from cnntrain.io.safe_files import exists, is_folder, open_atomic_text, run_folder_of
from cnntrain.plots.figure import label_split, log_plot_errors, save_figure
from cnntrain.report.console import console, log_to_console, print_rows
from cnntrain.summary.trace import needs_data
from cnntrain.train.checkpoint import check_weights, load_validated, load_weights
from cnntrain.train.evaluate import evaluate
from cnntrain.train.resume import locate_checkpoint
from cnntrain.train.run_dir import open_run_dir, provenance
from cnntrain.train.setup import Components, build_components, build_pipeline, build_task, make_model
from cnntrain.train.signals import stop_flag
from cnntrain.types import Batch, DataSpec

log = logging.getLogger("cnntrain")
NAMES = {"train": "training", "val": "validation", "test": "test"}  # in figures


def run(invocation: Invocation) -> int:
    if invocation.words:
        raise UserError(f"evaluate: {invocation.words[0]!r} is not an override; write checkpoint=PATH")
    settings = read_command_settings(EvaluateSettings, "evaluate", invocation.overrides, invocation.config_dir)
    evaluate_checkpoint(settings, invocation.line)
    return 0


def evaluate_checkpoint(settings: EvaluateSettings, command_line: str = "") -> dict[str, float]:
    """Evaluate a checkpoint and return its metrics by name, `SPLIT/NAME`.

    Raises:
        UserError: the checkpoint or the data are invalid, or the split does not exist.
        DivergedError: the loss over the split is not finite.
    """
    log_to_console()
    path = locate_checkpoint(Path(settings.checkpoint), "best.pt")
    saved = load_validated(path)
    components = restore(saved, settings)
    data = components.load(augmented=False)
    if not same_data(saved["fingerprint"], data.fingerprint):
        log.warning(
            "the data differ from the training data (fingerprint %s, now %s)",
            saved["fingerprint"],
            data.fingerprint,
        )
    examples = {"train": data.train, "val": data.val, "test": data.test}[settings.split]
    if examples is None:
        raise UserError("split: this dataset has no test set; use split=val")
    rows: list[dict[str, Any]] = []

    def add_rows(batch: Batch, outputs: Tensor) -> None:
        for index, row in zip(batch.index.tolist(), components.task.per_example(outputs, batch.truth), strict=True):
            rows.append({"name": examples.names[index], **row})

    folder = Path(settings.run_dir) if settings.run_dir else run_folder_of(path) / f"evaluate-{settings.split}"
    if not settings.run_dir and exists(folder) and not is_folder(folder, run_folder_of(path)):
        raise UserError(f"{folder}: is a link or a file; remove it, or choose another folder with run_dir=")
    with open_run_dir(folder, "evaluate") as run_folder, stop_flag() as stop:
        batch_size = components.settings.fixed_batch_size or saved["config"]["batch_size"]
        meter = evaluate(
            components,
            components.model,
            components.loader(examples),
            batch_size,
            stop=stop,
            on_batch=add_rows,
        )
        if not meter.loss_is_finite():
            weights = [*components.model.named_parameters(), *components.model.named_buffers()]
            broken = next((name for name, weight in weights if not weight.isfinite().all()), None)
            cause = f"{broken} contains NaN or inf" if broken else "the weights are finite, so check the images"
            raise DivergedError(f"evaluate: the loss over {settings.split} is not finite; {cause}")
        values = {**meter.compute(), **meter.details()}
        metrics = {f"{settings.split}/{name}": value for name, value in values.items()}
        rows.sort(key=_hardest_first)
        with open_atomic_text(run_folder.path / "examples.csv", sync=False) as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        with log_plot_errors("the figures"):
            for name, figure in components.task.figures(meter).items():
                save_figure(label_split(figure, NAMES[settings.split]), run_folder.figures / f"{name}.png")
        run_folder.write_json("run.json", provenance(command_line))
        run_folder.write_json("results.json", metrics)
    print_rows([{"metric": name, "value": value} for name, value in metrics.items()], console=console)
    print(f"results: {folder}")
    return metrics


def _hardest_first(row: dict[str, Any]) -> tuple[bool, float]:
    """Sort by decreasing loss; examples without a loss (nothing labeled) come last."""
    loss = float(row["loss"])
    return math.isnan(loss), -loss


def restore(saved: dict[str, Any], settings: EvaluateSettings) -> Components:
    """Rebuild the components of a run from its checkpoint, with the weights.

    Classes, mean and std come from the checkpoint. Nothing is measured or downloaded.
    """
    config = config_of(saved, settings)
    config["data"] = dict(config["data"])
    if settings.data.root is not None:
        if "root" not in config["data"]:
            raise UserError("data.root: this dataset is bundled and has no folder")
        config["data"]["root"] = settings.data.root
    if settings.data.workers is not None:
        config["data"]["workers"] = settings.data.workers
    spec = DataSpec(**saved["spec"])
    if "classes" in config["data"] and spec.classes:
        config["data"]["classes"] = list(spec.classes)
    restored = parse(Settings, config)
    with limited_construction(len(saved["state"]["model"])):
        refuse_other_network(restored, spec, saved)
        components = build_components(restored, spec)
    if isinstance(components.source, Source) and settings.data.root is None:
        components.source.downloads = False  # a checkpoint from an untrusted source must not start a download
    load_eval_weights(components.model, saved)
    components.model.to(memory_format=components.compute.memory_format)
    return components


def config_of(saved: dict[str, Any], settings: EvaluateSettings | PredictSettings) -> dict[str, Any]:
    """Return the config of a checkpoint with the settings of this machine and this command."""
    config = {**saved["config"], "trusted_packages": settings.trusted_packages, "threads": settings.threads}
    config |= {"device": settings.device, "precision": settings.precision or config["precision"]}
    config["batch_size"] = settings.batch_size or config["batch_size"]
    config["compile"] = "off"  # compiling starts an external compiler
    if "pretrained" in config["model"]:
        config["model"] = {**config["model"], "pretrained": False}
    return config


def refuse_other_network(settings: Settings, spec: DataSpec, saved: dict[str, Any]) -> None:
    """Refuse a config whose network does not have the weights of the checkpoint.

    The network is built on the meta device, so that a layer of any width costs neither memory nor time. Networks of
    trusted packages are not checked.

    Raises:
        UserError: the weights do not fit, or the network cannot be built.
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


MAX_COUNT = 10_000  # of layers, blocks, heads


def refuse_large_numbers(settings: Settings, weights: dict[str, Tensor]) -> None:
    """Refuse numbers in the network's config that exceed every dimension of its weights.

    Building a network of depth 10**7 would take hours and all memory.

    Raises:
        UserError: names the key.
    """
    most = max([MAX_COUNT, *(side for weight in weights.values() for side in weight.shape)])

    def visit(value: Any, key: str) -> None:
        if isinstance(value, dict):
            for name, inner in value.items():
                visit(inner, f"{key}.{name}")
        elif isinstance(value, list | tuple):
            for index, inner in enumerate(value):
                visit(inner, f"{key}[{index}]")
        elif isinstance(value, int) and abs(value) > most:
            raise UserError(f"checkpoint: its {key}: {value} exceeds every dimension of its weights ({most})")

    visit(settings.model, "model")


@contextlib.contextmanager
def limited_construction(count: int) -> Iterator[None]:
    """Abort the construction of a network with far more modules and parameters than its checkpoint has tensors.

    Args:
        count: number of tensors in the checkpoint.

    Raises:
        UserError: the limit is exceeded.
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


def load_eval_weights(model: nn.Module, saved: dict[str, Any]) -> None:
    """Load the weights that validation used: the moving average if there is one."""
    state = saved["state"]
    load_weights(model, state["ema"] or state["model"])
