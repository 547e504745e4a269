"""Checkpoint files: write them atomically, read and validate them, and apply their weights to a model.

A checkpoint may come from an untrusted source. `read_tensors` runs no code and bounds the size of the content;
`validate_checkpoint` checks the type and range of every field. The shapes of weights and optimizer state are checked
when they are loaded (`load_weights`, `state.validate_optimizer_state`).
"""

import dataclasses
import io
import math
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from cnntrain.config.command_line import without_passwords
from cnntrain.config.schema import Settings, Within, default_settings, parse, shortened
from cnntrain.errors import MachineError, UserError
from cnntrain.io import safe_files as files
from cnntrain.io.tensor_file import read_tensors
from cnntrain.train.run_dir import RunDir, installed_versions
from cnntrain.train.state import MAX_COUNT, Progress, TrainState
from cnntrain.types import DataSpec

if TYPE_CHECKING:
    from cnntrain.data.load import DataSplits
    from cnntrain.train.setup import Components

FORMAT = 2
MAX_SIDE_PX = 2**16
MAX_PIXELS = 2**28
MAX_CHANNELS = 4096
MAX_SHOWN_MISMATCHES = 6


def save(content: Mapping[str, Any], path: Path) -> None:
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
    """Return the content of a checkpoint file, with tensors on the CPU."""
    if not files.exists(path):
        raise UserError(f"{path}: no such checkpoint")
    content = read_tensors(path)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path}: not a cnntrain checkpoint, or written by an incompatible version")
    return content


def load_validated(path: Path) -> dict[str, Any]:
    """Return the content of a training run's checkpoint, with every field validated."""
    content = load(path)
    try:
        return validate_checkpoint(content)
    except UserError as error:
        raise UserError(f"{path}: not the checkpoint of a training run ({error})") from error


def checkpoint_metadata(components: "Components", data: "DataSplits", run: Mapping[str, Any]) -> dict[str, Any]:
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
    """Load the weights of a checkpoint into a model; see `check_weights` for the errors."""
    check_weights(model, weights)
    model.load_state_dict(weights)


def check_weights(model: nn.Module, weights: Mapping[str, Any]) -> None:
    """Reject weights of another architecture."""
    if problems := weight_mismatches(weights, model.state_dict()):
        hidden = len(problems) - MAX_SHOWN_MISMATCHES
        shown = [*problems[:MAX_SHOWN_MISMATCHES], *([f"and {hidden} more"] if hidden > 0 else [])]
        raise UserError("\n  ".join(["the checkpoint is of another network than model=...:", *shown]))


def weight_mismatches(weights: Mapping[str, Any], own: Mapping[str, Any]) -> list[str]:
    """Return the differences between a checkpoint's weights and those of a network; empty if they fit."""
    problems = [f"only in the checkpoint: {name}" for name in weights if name not in own]
    problems += [f"only in the network: {name}" for name in own if name not in weights]
    both = [(name, weights[name], value) for name, value in own.items() if name in weights]
    facts = [(name, tuple(saved.shape), tuple(value.shape)) for name, saved, value in both]
    facts += [
        (name, saved.dtype, value.dtype)
        for name, saved, value in both
        if saved.is_floating_point() != value.is_floating_point()
    ]
    problems += [
        f"{name}: {saved} in the checkpoint, {now} in the network" for name, saved, now in facts if saved != now
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
        self._last_step = state.progress.step if run.last.exists() else None  # step of last.pt
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
        progress = self.state.progress
        if self.enabled:
            serialized = serialize({"state": self.state.state_dict(), **self.metadata})
            self.flush()
            epoch = progress.epoch if "last" in names and self.keep and not progress.batch else None
            self._pending = self._executor.submit(self._write, serialized, names, epoch)
        if "last" in names:
            self._last_step = progress.step

    def flush(self) -> None:
        """Wait until all files are written."""
        pending, self._pending = self._pending, None
        if pending:
            pending.result()

    @property
    def last_saved(self) -> str:
        """Path and step of the newest last.pt, for messages."""
        self.flush()
        return "none was written yet" if self._last_step is None else f"{self.run.last} (step {self._last_step})"

    def _write(self, serialized: memoryview, names: tuple[str, ...], epoch: int | None) -> None:
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


@dataclass(frozen=True)
class Resolved:
    """Values that `auto` and null resolved to in the run that wrote the checkpoint; None if not recorded."""

    precision: Literal["fp32", "bf16", "fp16"] | None = None
    threads: Annotated[int | None, Within(1, 4096)] = None
    processes: Annotated[int | None, Within(1, 2**20)] = None
    device: str | None = None


@dataclass(frozen=True)
class SavedState:
    """Types of the entries of `TrainState.state_dict`."""

    model: dict[str, Any]
    optimizer: dict[str, Any]
    schedule: dict[str, Any]
    progress: Progress
    meter: dict[str, Any]
    ema: dict[str, Any] | None = None
    scaler: dict[str, Any] | None = None


@dataclass(frozen=True)
class SavedRun:
    """Types of a checkpoint's entries. Versions and the run's identity are checked where they are used."""

    state: SavedState
    config: dict[str, Any]
    spec: DataSpec
    fingerprint: str
    resolved: Resolved = Resolved()
    monitor: tuple[str, Literal["min", "max"]] | None = None


def validate_checkpoint(content: Mapping[str, Any]) -> dict[str, Any]:
    """Check the type and range of every field, and add the default of settings that an older version did not have."""
    names = {field.name for field in dataclasses.fields(SavedRun)}
    saved = parse(SavedRun, {name: value for name, value in content.items() if name in names})
    state, spec, best = saved.state, saved.spec, saved.state.progress.best
    for name, tensors in (("model", state.model), ("ema", state.ema), ("meter", state.meter)):
        for key, value in (tensors or {}).items():
            good = isinstance(key, str) and isinstance(value, Tensor) and not value.is_complex()
            _require(good, f"state.{name}", "map names to real tensors", {key: value})
    for name, value in state.schedule.items():
        _require(_is_number(value) and not math.isnan(value), f"state.schedule.{name}", "be a number", value)
    for name, value in best.items():
        good = isinstance(name, str) and _is_number(value)
        _require(good, "state.progress.best", "map metric names to numbers", {name: value})
    for name in ("epoch", "step") if best else ():
        value = best.get(name, -1)
        _require(0 <= value <= MAX_COUNT, f"state.progress.best.{name}", "be from 0 to 2**53", value)
    _validate_spec(spec)
    config = _with_defaults(saved.config)
    for name, value in config.items():
        has_tensor = any(isinstance(leaf, Tensor) for leaf in tree_leaves(value))
        _require(not has_tensor, f"config.{name}", "have plain values", "a tensor")
    _require(isinstance(config.get("choices"), dict), "config.choices", "be a mapping", config.get("choices"))
    settings = parse(Settings, config, "config.")
    _require(settings.batch_size != "auto", "config.batch_size", "be a number of images", settings.batch_size)
    return {
        **content,
        "state": {**vars(state), "progress": dataclasses.asdict(state.progress)},
        "config": {**config, "batch_size": settings.batch_size},
        "spec": dataclasses.asdict(spec),
        "fingerprint": saved.fingerprint,
        "resolved": {name: value for name, value in vars(saved.resolved).items() if value is not None},
        "monitor": saved.monitor,
    }


def _validate_spec(spec: DataSpec) -> None:
    for name, least, most in (
        ("channels", 1, MAX_CHANNELS),
        ("height", 1, MAX_SIDE_PX),
        ("width", 1, MAX_SIDE_PX),
        ("ignore_index", -(2**31), 2**31),
    ):
        value = getattr(spec, name)
        _require(value is None or least <= value <= most, f"spec.{name}", f"be from {least} to {most}", value)
    if spec.channels * spec.height * spec.width > MAX_PIXELS:
        raise UserError(f"spec: images of {spec.channels} x {spec.height} x {spec.width} are too large")
    indices = range(len(spec.keypoints))
    good = spec.flip_pairs is None or (len(spec.flip_pairs) == len(indices) and set(spec.flip_pairs) <= set(indices))
    _require(good, "spec.flip_pairs", f"be null or a list of {len(indices)} keypoint indices", spec.flip_pairs)
    good = all(index in indices for pair in spec.skeleton for index in pair)
    _require(good, "spec.skeleton", "be pairs of keypoint indices", spec.skeleton)
    for name, values in (("mean", spec.mean), ("std", spec.std)):
        good = values is None or (len(values) == spec.channels and (name == "mean" or min(values) > 0))
        _require(good, f"spec.{name}", f"be {spec.channels} numbers" + " above 0" * (name == "std"), values)


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
        shown = f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else shortened(value)
        raise UserError(f"{name}: must {requirement}, got {shown}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
