"""The fixed part of the config as typed dataclasses: names, types and ranges. Defaults stand in conf/config.yaml.

The pluggable leaves (`model`, `data`, `augment`, `task`, `optimizer`, `schedule`) are plain dictionaries here; they are
checked against the signature of what they name when it is built.
"""

import dataclasses
import math
import re
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from cnntrain.errors import UserError, suggest

T = TypeVar("T")
Node = dict[str, Any]  # a pluggable leaf: `_target_` and its arguments


def within(low: float | None = None, high: float | None = None) -> Any:
    """A dataclass field whose numbers must lie in [low, high]."""
    return field(metadata={"low": low, "high": high})


@dataclass(frozen=True)
class CheckpointSettings:
    every_steps: int | None = within(1)
    keep: int = within(0)


@dataclass(frozen=True)
class LogSettings:
    every_steps: int = within(1)
    tensorboard: bool
    pictures: bool


@dataclass(frozen=True)
class OverfitSettings:
    examples: int = within(1, 1024)
    steps: int = within(1)


@dataclass(frozen=True)
class InspectSettings:
    image_size: Any
    channels: int | None = within(1)
    num_outputs: int | None = within(1)
    depth: int | None = within(0)
    convention: Literal["torch", "keras", "folded"]


@dataclass(frozen=True)
class PreviewSettings:
    images: int = within(1, 64)
    epochs: int = within(1, 32)


@dataclass(frozen=True)
class DataSettings:
    """Keys that every data set has; the rest of `data` belongs to the source."""

    workers: int = within(0, 256)
    val_fraction: float = within(0, 0.9)
    folds: int | None = within(2)
    fold: int = within(0)
    split_seed: int = field()
    limit: int | None = within(2)
    store: Literal["auto", "device", "host", "stream"]
    timeout_s: int = within(1)


@dataclass(frozen=True)
class ModelSettings:
    """Keys that every shipped network has; the rest of `model` belongs to the network."""

    norm: str | None = None
    activation: str | None = None
    init: str = "default"
    freeze: str | None = None


@dataclass(frozen=True)
class Settings:
    """Everything that `cnntrain train` needs to know."""

    task: Node
    augment: Node
    model: Node
    data: Node
    optimizer: Node
    schedule: Node
    seed: int = within(0, 2**62)
    epochs: int = within(1)
    steps: int | None = within(1)
    batch_size: int = within(1)
    limit_batches: int | None = within(1)
    accumulate: int = within(1)
    clip_grad_norm: float | None = within(1e-12)
    device: str
    precision: Literal["auto", "fp32", "bf16", "fp16"]
    channels_last: bool
    threads: int | None = within(1, 1024)
    deterministic: bool
    ema_decay: float | None = within(0, 1)
    early_stopping: int | None = within(1)
    run_dir: str | None
    resume: str
    checkpoint: CheckpointSettings
    log: LogSettings
    overfit: OverfitSettings
    inspect: InspectSettings
    preview: PreviewSettings
    expect: dict[str, Any] | None
    trusted_packages: list[str]
    choices: dict[str, Any]  # group -> option, as they were chosen

    @property
    def label(self) -> str:
        """A short name for the run's folder: what is trained on what."""
        model = self.model.get("name") or self.choices.get("model", "model")
        data = self.choices.get("data", "data")
        return re.sub(r"[^A-Za-z0-9_.]+", "-", f"{model}-{data}").lower()


@dataclass(frozen=True)
class EvaluateData:
    root: str | None
    workers: int | None = within(0, 256)


@dataclass(frozen=True)
class EvaluateSettings:
    """Everything that `cnntrain evaluate` needs to know; the rest comes from the checkpoint."""

    checkpoint: str
    split: Literal["train", "val", "test"]
    data: EvaluateData
    batch_size: int | None = within(1)
    device: str
    precision: Literal["auto", "fp32", "bf16", "fp16"] | None
    threads: int | None = within(1, 1024)
    run_dir: str | None
    trusted_packages: list[str]


def parse(cls: type[T], values: Mapping[str, Any], path: str = "") -> T:
    """An instance of the dataclass `cls` from plain values, each checked for type and range.

    Raises:
        UserError: names the key at fault, what was found and what would be right.
    """
    hints = get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # pyright: ignore[reportArgumentType]
    for name in values:
        if name not in fields:
            raise UserError(f"{path}{name}: no such key{suggest(str(name), list(fields))}")
    arguments = {}
    for name, f in fields.items():
        if name not in values:
            if f.default is dataclasses.MISSING:
                raise UserError(f"{path}{name}: missing")
            continue
        arguments[name] = _convert(values[name], hints[name], f"{path}{name}", f.metadata)
    return cls(**arguments)


def _convert(value: Any, hint: Any, key: str, limits: Mapping[str, Any]) -> Any:
    origin = get_origin(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        options = get_args(hint)
        if value is None and type(None) in options:
            return None
        inner = next(option for option in options if option is not type(None))
        return _convert(value, inner, key, {**limits, "or_null": True})
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise UserError(f"{key}: needs keys below it, as {key}.NAME=...; got {value!r}")
        return parse(hint, value, f"{key}.")  # pyright: ignore[reportArgumentType]
    if origin is Literal:
        choices = [str(choice) for choice in get_args(hint)]
        if value not in get_args(hint):
            raise UserError(f"{key}: {value!r} is not one of {', '.join(choices)}{suggest(str(value), choices)}")
        return value
    if origin in (dict, list):
        if not isinstance(value, origin):
            raise UserError(f"{key}: must be a {'list' if origin is list else 'mapping'}, got {value!r}")
        return value
    return _scalar(value, hint, key, limits)


def _scalar(value: Any, kind: type, key: str, limits: Mapping[str, Any]) -> Any:
    low, high = limits.get("low"), limits.get("high")
    limits_said = ([f">= {low:g}"] if low is not None else []) + ([f"<= {high:g}"] if high is not None else [])
    bounds = " " + " and ".join(limits_said) if limits_said else ""
    or_null = " or null" if limits.get("or_null") else ""
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[kind]
    problem = UserError(f"{key}: must be {words}{bounds}{or_null}, got {value!r}")
    if kind is str:
        if value is None or isinstance(value, bool | Mapping | list):
            raise problem
        return str(value)
    if kind is bool:
        if not isinstance(value, bool):
            raise problem
        return value
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise problem
    if kind is int and (not math.isfinite(value) or value != int(value)):
        raise problem
    value = kind(value)
    if not math.isfinite(value) or (low is not None and value < low) or (high is not None and value > high):
        raise problem
    return value
