"""Checkpoint files: write them atomically, read and validate them, and apply their weights to a model.

A checkpoint may come from an untrusted source. `read_tensors` runs no code and bounds the size of the content;
`validate_checkpoint` checks the type and range of every field. The shapes of weights and optimizer state are checked
when they are loaded (`load_weights`, `state.validate_optimizer_state`).
"""

import dataclasses
import io
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import torch
from torch import Tensor, nn

from cnntrain.config.command_line import without_passwords
from cnntrain.config.schema import Settings, Within, default_settings, parse
from cnntrain.errors import MachineError, UserError
from cnntrain.io import safe_files as files
from cnntrain.io.tensor_file import read_tensors
from cnntrain.train.run_dir import RunDir, installed_versions
from cnntrain.train.state import Progress, TrainState
from cnntrain.types import DataSpec

if TYPE_CHECKING:
    from cnntrain.data.load import Data
    from cnntrain.train.setup import Components

FORMAT = 2
MAX_COUNT = 2**53  # upper bound of counters
MAX_SIDE_PX = 2**16
MAX_PIXELS = 2**28
MAX_CHANNELS = 4096
MAX_SHOWN_MISMATCHES = 6


def save(content: Mapping[str, Any], path: Path) -> None:
    """Write a checkpoint atomically; see `write`."""
    write(serialize(content), path)


def serialize(content: Mapping[str, Any]) -> memoryview:
    """Return the bytes of a checkpoint file with this content (plain types and tensors)."""
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **content}, buffer)
    return buffer.getbuffer()


def write(serialized: memoryview, path: Path) -> None:
    """Write a checkpoint file so that a kill at any time leaves either the old file or the new one.

    Raises:
        MachineError: the file cannot be written (disk full); the old file is intact and no temporary file is left.
    """
    try:
        root = files.run_folder_of(path)
        if root == path.parent:
            root.mkdir(exist_ok=True)
        else:
            files.make_folder(path.parent, root)  # fails if the run folder was deleted
        files.write_atomic(path, serialized, root)
    except OSError as error:
        intact = "; the previous one is intact" if path.is_file() else ""
        raise MachineError(f"{path}: can't write the checkpoint: {error.strerror}{intact}") from error


def load(path: Path) -> dict[str, Any]:
    """Return the content of a checkpoint file, with tensors on the CPU.

    Raises:
        UserError: the file is missing, damaged, or not a checkpoint.
    """
    if not files.exists(path):
        raise UserError(f"{path}: no such checkpoint")
    content = read_tensors(path)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path}: not a cnntrain checkpoint, or written by an incompatible version")
    return content


def load_validated(path: Path) -> dict[str, Any]:
    """Return the content of a training run's checkpoint, with every field validated.

    Raises:
        UserError: the file is missing, damaged, or not the checkpoint of a training run.
    """
    content = load(path)
    try:
        return validate_checkpoint(content)
    except UserError as error:
        raise UserError(f"{path}: not the checkpoint of a training run ({error})") from error


def checkpoint_metadata(components: "Components", data: "Data", run: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of a checkpoint besides `state`: enough to rebuild and evaluate the model elsewhere.

    Args:
        run: the run's identity (`resume.run_identity`).
    """
    compute = components.compute
    return {
        "config": without_passwords(dataclasses.asdict(components.settings)),
        # Values that `auto` and null resolved to; reused when the run is resumed on a similar machine.
        "resolved": {
            "device": compute.device.type,
            "precision": compute.precision,
            "threads": torch.get_num_threads(),
            "processes": compute.world.size,
        },
        "spec": dataclasses.asdict(data.spec),
        "fingerprint": data.fingerprint,
        "monitor": components.task.monitor,
        "versions": installed_versions(),
        "run": run,
    }


def load_weights(model: nn.Module, weights: Mapping[str, Any]) -> None:
    """Load the weights of a checkpoint into a model.

    Raises:
        UserError: the weights are of another architecture; lists the first mismatches.
    """
    check_weights(model, weights)
    model.load_state_dict(weights)


def check_weights(model: nn.Module, weights: Mapping[str, Any]) -> None:
    """Reject weights of another architecture.

    Raises:
        UserError: see `load_weights`.
    """
    if problems := weight_mismatches(weights, model.state_dict()):
        hidden = len(problems) - MAX_SHOWN_MISMATCHES
        shown = [*problems[:MAX_SHOWN_MISMATCHES], *([f"and {hidden} more"] if hidden > 0 else [])]
        raise UserError("\n  ".join(["the checkpoint is of another network than model=...:", *shown]))


def weight_mismatches(weights: Mapping[str, Any], own: Mapping[str, Any]) -> list[str]:
    """Return the differences between a checkpoint's weights and those of a network; empty if they fit."""
    problems = [f"only in the checkpoint: {name}" for name in weights if name not in own]
    problems += [f"only in the network: {name}" for name in own if name not in weights]
    both = [(name, weights[name], value) for name, value in own.items() if name in weights]
    problems += [
        f"{name}: {tuple(saved.shape)} in the checkpoint, {tuple(value.shape)} in the network"
        for name, saved, value in both
        if saved.shape != value.shape
    ]
    problems += [
        f"{name}: {saved.dtype} in the checkpoint, {value.dtype} in the network"
        for name, saved, value in both
        if saved.is_floating_point() != value.is_floating_point()
    ]
    return problems


class CheckpointWriter:
    """Write checkpoints in a background thread: `save("last")` or `save("last", "best")`.

    Files contain the state at the time of the call. They are written one at a time, in the order of the calls, and are
    complete at the end of the `with` block.

    Args:
        metadata: the content besides the state.
        keep: number of checkpoints `epoch-NNNNN.pt` to keep besides last.pt and best.pt.
        enabled: False on all ranks but rank 0, which do not write.

    Raises:
        MachineError: in `save`, `flush` or at the end of the block if a file cannot be written; the old file is intact.
    """

    def __init__(
        self, run: RunDir, state: TrainState, metadata: Mapping[str, Any], keep: int, enabled: bool = True
    ) -> None:
        self.run, self.state, self.metadata, self.keep, self.enabled = run, state, metadata, keep, enabled
        self._last_saved = self._describe() if run.last.exists() else "none was written yet"
        self._executor = ThreadPoolExecutor(1, "cnntrain-checkpoint")
        self._pending: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        try:
            self.flush()
        finally:
            self._executor.shutdown()

    def save(self, *names: str) -> None:
        if not self.enabled:
            if "last" in names:
                self._last_saved = self._describe()
            return
        serialized = serialize({"state": self.state.state_dict(), **self.metadata})
        self.flush()
        progress = self.state.progress
        epoch = progress.epoch if "last" in names and self.keep and not progress.batch else None
        self._pending = self._executor.submit(self._write, serialized, names, epoch, self._describe())

    def flush(self) -> None:
        """Wait until all files are written."""
        pending, self._pending = self._pending, None
        if pending:
            pending.result()

    @property
    def last_saved(self) -> str:
        """Path and step of the newest last.pt, for messages."""
        self.flush()
        return self._last_saved

    def _write(self, serialized: memoryview, names: tuple[str, ...], epoch: int | None, described: str) -> None:
        """Write the files in an order that tolerates a kill between them.

        If last.pt was not written, the epoch is trained again. If best.pt was not written, last.pt has the weights.
        """
        folder = self.run.checkpoints
        if epoch is not None:
            write(serialized, folder / f"epoch-{epoch:05}.pt")
            for old in sorted(folder.glob("epoch-*.pt"))[: -self.keep]:
                files.remove(old, self.run.path)
        for name in names:
            write(serialized, folder / f"{name}.pt")
            if name == "last":
                self._last_saved = described

    def _describe(self) -> str:
        return f"{self.run.last} (step {self.state.progress.step})"


@dataclasses.dataclass(frozen=True)
class Resolved:
    """Values that `auto` and null resolved to in the run that wrote the checkpoint; None if not recorded."""

    precision: Literal["fp32", "bf16", "fp16"] | None = None
    threads: Annotated[int | None, Within(1, 4096)] = None
    processes: Annotated[int | None, Within(1, 2**20)] = None
    device: str | None = None


def validate_checkpoint(content: Mapping[str, Any]) -> dict[str, Any]:
    """Check the type and range of every field, and add the default of settings that an older version did not have.

    Raises:
        UserError: names the invalid field.
    """
    for name in ("state", "config", "spec", "fingerprint"):
        if name not in content:
            raise UserError(f"the entry {name!r} is missing")
    state = {"ema": None, "scaler": None, **_mapping("state", content["state"])}
    for name in ("model", "optimizer", "schedule", "progress", "meter"):
        _mapping(f"state.{name}", state.get(name))
    for name in ("ema", "scaler"):
        _mapping(f"state.{name}", {} if state[name] is None else state[name])
    for name in ("model", "ema", "meter"):
        for key, value in (state[name] or {}).items():
            good = isinstance(key, str) and isinstance(value, Tensor) and not value.is_complex()
            _require(good, f"state.{name}", "map names to real tensors", {key: value})
    for name, value in state["schedule"].items():
        _require(_is_number(value) and not math.isnan(value), f"state.schedule.{name}", "be a number", value)
    progress = _validate_progress(state["progress"])
    spec = _mapping("spec", content["spec"])
    _validate_spec(spec)
    config = _with_defaults(_mapping("config", content["config"]))
    _mapping("config.choices", config.get("choices"))
    settings = parse(Settings, config, "config.")
    _require(settings.batch_size != "auto", "config.batch_size", "be a number of images", settings.batch_size)
    _require(isinstance(content["fingerprint"], str), "fingerprint", "be a string", content["fingerprint"])
    resolved = _mapping("resolved", content.get("resolved", {}))
    parse(Resolved, resolved, "resolved.")
    match content.get("monitor"):
        case None | [str(), "min" | "max"]:
            pass
        case other:
            _require(False, "monitor", "be a metric and min or max", other)
    return {
        **content,
        "state": {**state, "progress": dataclasses.asdict(progress)},
        "config": {**config, "batch_size": settings.batch_size},
        "spec": {name: _as_tuple(value) for name, value in spec.items()},
        "resolved": {name: value for name, value in resolved.items() if value is not None},
    }


def _validate_progress(values: Mapping[str, Any]) -> Progress:
    progress = parse(Progress, values, "state.progress.")
    counters = {n: getattr(progress, n) for n in ("epoch", "batch", "step", "images", "epochs_since_best", "wall_s")}
    if progress.best:
        counters |= {f"best.{name}": progress.best.get(name, -1) for name in ("epoch", "step")}
    for name, value in progress.best.items():
        good = isinstance(name, str) and _is_number(value)
        _require(good, "state.progress.best", "map metric names to numbers", {name: value})
    for name, value in counters.items():
        _require(0 <= value <= MAX_COUNT, f"state.progress.{name}", "be from 0 to 2**53", value)
    return progress


def _validate_spec(spec: Mapping[str, Any]) -> None:
    names = {field.name for field in dataclasses.fields(DataSpec)}
    if unknown := [name for name in spec if name not in names]:
        raise UserError(f"spec.{_short(unknown[0])}: unknown field")
    for name, most in (("channels", MAX_CHANNELS), ("height", MAX_SIDE_PX), ("width", MAX_SIDE_PX)):
        value = spec.get(name)
        _require(_is_integer(value, 1, most), f"spec.{name}", f"be an integer from 1 to {most}", value)
    channels, height, width = (spec[name] for name in ("channels", "height", "width"))
    if channels * height * width > MAX_PIXELS:
        raise UserError(f"spec: images of {channels} x {height} x {width} are too large")
    for name in ("per_pixel", "hflip_ok"):
        value = spec.get(name, False)
        _require(isinstance(value, bool), f"spec.{name}", "be true or false", value)
    for name in ("classes", "keypoints"):
        value = spec.get(name, ())
        good = _is_list(value) and all(isinstance(each, str) for each in value)
        _require(good, f"spec.{name}", "be a list of names", value)
    count = len(spec.get("keypoints", ()))

    def are_keypoints(indices: Any, length: int) -> bool:
        return _is_list(indices) and len(indices) == length and all(_is_integer(i, 0, count - 1) for i in indices)

    pairs, skeleton, ignored = spec.get("flip_pairs"), spec.get("skeleton", ()), spec.get("ignore_index")
    good = pairs is None or are_keypoints(pairs, count)
    _require(good, "spec.flip_pairs", f"be null or a list of {count} keypoint indices", pairs)
    good = _is_list(skeleton) and all(are_keypoints(pair, 2) for pair in skeleton)
    _require(good, "spec.skeleton", "be pairs of keypoint indices", skeleton)
    good = ignored is None or _is_integer(ignored, -(2**31), 2**31)
    _require(good, "spec.ignore_index", "be null or an integer", ignored)
    for name, least in (("mean", -math.inf), ("std", 0)):
        values = spec.get(name)
        good = values is None or (
            _is_list(values)
            and len(values) == channels
            and all(_is_number(each) and math.isfinite(each) and each > least for each in values)
        )
        _require(good, f"spec.{name}", f"be {channels} finite numbers" + " above 0" * (least == 0), values)


def _with_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """Add the defaults of missing sections and of missing keys in sections."""
    defaults = default_settings()
    completed = {**defaults, **config}
    for name, section in defaults.items():
        if isinstance(section, Mapping) and isinstance(completed[name], Mapping):
            completed[name] = {**section, **completed[name]}
    return completed


def _require(good: bool, name: str, requirement: str, value: Any) -> None:
    if not good:
        raise UserError(f"{name}: must {requirement}, got {_short(value)}")


def _mapping(name: str, value: Any) -> dict[str, Any]:
    _require(isinstance(value, dict), name, "be a mapping", value)
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_integer(value: Any, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _as_tuple(value: Any) -> Any:
    return tuple(_as_tuple(each) for each in value) if isinstance(value, list | tuple) else value


def _short(value: Any) -> str:
    text = f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
