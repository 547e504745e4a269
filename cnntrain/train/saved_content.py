"""Validate a checkpoint before it is used: the type and range of every field.

A checkpoint may come from an untrusted source or from another program. `check_values` has already bounded its size;
this module checks its fields. Shapes of weights and optimizer state are checked when they are loaded
(`saved.load_weights`, `moments.validate_optimizer_state`).
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from torch import Tensor

from cnntrain.config.schema import Settings, Within, parse
from cnntrain.errors import UserError
from cnntrain.train.state import Progress
from cnntrain.types import DataSpec

MOST = 2**53  # upper bound of counters
LONGEST_SIDE_PX = 2**16
MOST_PIXELS = 2**28
MOST_CHANNELS = 4096


@dataclasses.dataclass(frozen=True)
class Resolved:
    """Values that `auto` and null resolved to in the run that wrote the checkpoint; None if not recorded."""

    precision: Literal["fp32", "bf16", "fp16"] | None = None
    threads: Annotated[int | None, Within(1, 4096)] = None
    processes: Annotated[int | None, Within(1, 2**20)] = None
    device: str | None = None


def check_saved(saved: Any, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Validate every field of a checkpoint and complete its config with defaults.

    Args:
        defaults: a composed config; supplies the sections and keys that an older version did not have.

    Raises:
        UserError: names the invalid field.
    """
    for name in ("state", "config", "spec", "fingerprint"):
        if name not in saved:
            raise UserError(f"the entry {name!r} is missing")
    state, spec = _mapping("state", saved["state"]), saved["spec"]
    for name in ("model", "optimizer", "schedule", "progress", "meter"):
        _mapping(f"state.{name}", state.get(name))
    for name in ("ema", "scaler"):
        if state.get(name) is not None:
            _mapping(f"state.{name}", state[name])
    _tensors("state.model", state["model"])
    _tensors("state.ema", state.get("ema") or {})
    _tensors("state.meter", state["meter"])
    for name, value in state["schedule"].items():
        if not _is_number(value) or math.isnan(value):
            raise UserError(f"state.schedule.{name}: must be a number, got {_short(value)}")
    progress = _read_progress(state["progress"])
    _check_spec(_mapping("spec", spec))
    config = _complete(_mapping("config", saved["config"]), defaults)
    _mapping("config.choices", config.get("choices"))
    settings = parse(Settings, config, "config.")
    if settings.known_batch_size is None:
        raise UserError("config.batch_size: must be a number of images, got 'auto'")
    if not isinstance(saved["fingerprint"], str):
        raise UserError(f"fingerprint: must be text, got {_short(saved['fingerprint'])}")
    resolved = _mapping("resolved", saved.get("resolved", {}))
    parse(Resolved, resolved, "resolved.")
    match saved.get("monitor"):
        case None | [str(), "min" | "max"]:
            pass
        case other:
            raise UserError(f"monitor: must be a metric and min or max, got {_short(other)}")
    return {
        **saved,
        "state": {"ema": None, "scaler": None, **state, "progress": dataclasses.asdict(progress)},
        "config": {**config, "batch_size": settings.batch_size},
        "spec": {name: _as_tuple(value) for name, value in spec.items()},
        "resolved": {name: value for name, value in resolved.items() if value is not None},
    }


def _read_progress(progress: Mapping[str, Any]) -> Progress:
    found = parse(Progress, progress, "state.progress.")
    for name in ("epoch", "batch", "step", "images", "epochs_since_best", "wall_s"):
        if not 0 <= getattr(found, name) <= MOST:
            raise UserError(
                f"state.progress.{name}: must be from 0 to 2**53, got {_short(getattr(found, name))}"
            )
    for name, value in found.best.items():
        if not isinstance(name, str) or not _is_number(value):
            raise UserError(
                f"state.progress.best: must map metric names to numbers, got {_short(name)}: {_short(value)}"
            )
    for name in ("epoch", "step") if found.best else ():
        value = found.best.get(name, -1)
        if not 0 <= value <= MOST:
            raise UserError(f"state.progress.best.{name}: must be from 0 to 2**53, got {_short(value)}")
    return found


def _check_spec(spec: Mapping[str, Any]) -> None:
    """Reject an invalid dataset spec; the error names the invalid field."""
    known = {field.name for field in dataclasses.fields(DataSpec)}
    if unknown := [name for name in spec if name not in known]:
        raise UserError(f"spec.{_short(unknown[0])}: unknown field")
    for name, most in (("channels", MOST_CHANNELS), ("height", LONGEST_SIDE_PX), ("width", LONGEST_SIDE_PX)):
        if not _is_whole(spec.get(name), 1, most):
            raise UserError(f"spec.{name}: must be an integer from 1 to {most}, got {_short(spec.get(name))}")
    if spec["channels"] * spec["height"] * spec["width"] > MOST_PIXELS:
        raise UserError(
            f"spec: images of {spec['channels']} x {spec['height']} x {spec['width']} are too large"
        )
    for name in ("per_pixel", "hflip_ok"):
        if not isinstance(spec.get(name, False), bool):
            raise UserError(f"spec.{name}: must be true or false, got {_short(spec[name])}")
    for name in ("classes", "keypoints"):
        names = spec.get(name, ())
        if not _is_list(names) or not all(isinstance(each, str) for each in names):
            raise UserError(f"spec.{name}: must be a list of names, got {_short(names)}")
    points = len(spec.get("keypoints", ()))
    mirror, skeleton = spec.get("flip_pairs"), spec.get("skeleton", ())
    if mirror is not None and (
        not _is_list(mirror)
        or len(mirror) != points
        or not all(_is_whole(each, 0, points - 1) for each in mirror)
    ):
        raise UserError(
            f"spec.flip_pairs: must be null or a list of {points} keypoint indices, got {_short(mirror)}"
        )
    if not _is_list(skeleton) or not all(
        _is_list(pair) and len(pair) == 2 and all(_is_whole(each, 0, points - 1) for each in pair)
        for pair in skeleton
    ):
        raise UserError(f"spec.skeleton: must be pairs of keypoint indices, got {_short(skeleton)}")
    ignored = spec.get("ignore_index")
    if ignored is not None and not _is_whole(ignored, -(2**31), 2**31):
        raise UserError(f"spec.ignore_index: must be null or an integer, got {_short(ignored)}")
    for name in ("mean", "std"):
        values = spec.get(name)
        if values is None:
            continue
        good = _is_list(values) and len(values) == spec["channels"] and all(
            _is_number(each) and math.isfinite(each) and (name == "mean" or each > 0) for each in values
        )  # fmt: skip
        if not good:
            positive = " above 0" if name == "std" else ""
            raise UserError(
                f"spec.{name}: must be {spec['channels']} finite numbers{positive}, got {_short(values)}"
            )


def _complete(config: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Add defaults to the config for missing sections and for missing keys of sections without `_target_`."""
    plugged = {"model", "data", "augment", "task", "optimizer", "schedule", "choices", "expect"}
    found = {**defaults, **config}
    for name, section in defaults.items():
        if name not in plugged and isinstance(section, Mapping) and isinstance(found[name], Mapping):
            found[name] = {**section, **found[name]}
    return found


def _mapping(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{name}: must be a mapping, got {_short(value)}")
    return value


def _tensors(name: str, values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        if not isinstance(key, str) or not isinstance(value, Tensor) or value.is_complex():
            raise UserError(f"{name}: must map names to real tensors, got {_short(key)}: {_short(value)}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_whole(value: Any, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _as_tuple(value: Any) -> Any:
    return tuple(_as_tuple(each) for each in value) if isinstance(value, list | tuple) else value


def _short(value: Any) -> str:
    text = f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
