"""Rebuild a trained network and its settings from a checkpoint, which may come from an untrusted source."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from cnntrain.config.schema import CheckpointCommandSettings, EvaluateSettings, Settings, parse
from cnntrain.data.examples import Source
from cnntrain.errors import UserError
from cnntrain.summary.trace import needs_data
from cnntrain.train.checkpoint import check_weights, load_weights
from cnntrain.train.setup import Components, build_components, build_pipeline, build_task, make_model
from cnntrain.types import DataSpec

MAX_COUNT = 10_000  # of layers, blocks, heads


def restore(saved: dict[str, Any], settings: EvaluateSettings) -> Components:
    """Rebuild the components of a run from its checkpoint, with the weights.

    Classes, mean and std come from the checkpoint. Nothing is measured or downloaded.
    """
    spec, config = DataSpec(**saved["spec"]), saved["config"]
    data = dict(config["data"])
    if settings.data.root is not None:
        if "root" not in data:
            raise UserError("data.root: this dataset is bundled and has no folder")
        data["root"] = settings.data.root
    if settings.data.workers is not None:
        data["workers"] = settings.data.workers
    if "classes" in data and spec.classes:
        data["classes"] = list(spec.classes)
    restored = restore_settings({**config, "data": data}, settings)
    with limited_construction(saved):
        refuse_other_network(restored, spec, saved)
        components = build_components(restored, spec)
    if isinstance(components.source, Source) and settings.data.root is None:
        components.source.downloads = False  # a checkpoint from an untrusted source must not start a download
    load_eval_weights(components.model, saved)
    components.model.to(memory_format=components.compute.memory_format)
    return components


def restore_settings(saved_config: dict[str, Any], settings: CheckpointCommandSettings) -> Settings:
    """Return the settings of a checkpoint with those of this machine and this command."""
    config = {**saved_config, "trusted_packages": settings.trusted_packages, "threads": settings.threads}
    config |= {"device": settings.device, "precision": settings.precision or config["precision"]}
    config["batch_size"] = settings.batch_size or config["batch_size"]
    config["compile"] = "off"  # compiling starts an external compiler
    if "pretrained" in config["model"]:
        config["model"] = {**config["model"], "pretrained": False}
    return parse(Settings, config)


def refuse_other_network(settings: Settings, spec: DataSpec, saved: dict[str, Any]) -> None:
    """Refuse a config whose network does not have the weights of the checkpoint, or cannot be built.

    The network is built on the meta device, so that a layer of any width costs neither memory nor time. Networks of
    trusted packages are not checked.
    """
    target = settings.model.get("_target_")
    trusted = {name.split(".")[0] for name in settings.trusted_packages}
    if not isinstance(target, str) or target.split(".")[0] in trusted:
        return
    weights = _eval_weights(saved)
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


def refuse_large_numbers(settings: Settings, weights: dict[str, Tensor]) -> None:
    """Refuse numbers in the network's config that exceed every dimension of its weights.

    Building a network of depth 10**7 would take hours and all memory.
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
def limited_construction(saved: dict[str, Any]) -> Iterator[None]:
    """Abort the construction of a network with far more modules and parameters than its checkpoint has tensors."""
    count = len(saved["state"]["model"])
    left = 10 * count + 1000

    def hook(*_: object) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise UserError(f"checkpoint: its config describes a network far larger than its {count} tensors")

    hooks = nn.modules.module
    with hooks.register_module_module_registration_hook(hook), hooks.register_module_parameter_registration_hook(hook):
        yield


def load_eval_weights(model: nn.Module, saved: dict[str, Any]) -> None:
    """Load the weights that validation used: the moving average if there is one."""
    load_weights(model, _eval_weights(saved))


def _eval_weights(saved: dict[str, Any]) -> dict[str, Tensor]:
    return saved["state"]["ema"] or saved["state"]["model"]
