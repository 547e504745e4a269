"""Runs that were saved: which checkpoint to go on from, what it holds, and whether it fits."""

import dataclasses
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cnntrain.assembly import Assembly
from cnntrain.data.load import Data
from cnntrain.engine import checkpoint
from cnntrain.engine.state import TrainState
from cnntrain.errors import UserError
from cnntrain.settings import Settings
from cnntrain.spec import DataSpec

log = logging.getLogger("cnntrain")


def checkpoint_facts(assembly: Assembly, data: Data) -> dict[str, Any]:
    """What a checkpoint says beside its state: enough to evaluate it elsewhere."""
    return {
        "config": dataclasses.asdict(assembly.settings),
        "spec": dataclasses.asdict(data.spec),
        "fingerprint": data.fingerprint,
        "versions": checkpoint.versions(),
    }


def saved_spec(saved: Mapping[str, Any]) -> DataSpec:
    """The facts about the data that a checkpoint was trained on."""
    return DataSpec(**saved["spec"])


def find_checkpoint(settings: Settings) -> Path | None:
    """The checkpoint that `resume` and `run_dir` ask to go on from; None to start afresh.

    Raises:
        UserError: there is none where one was named, or a run would be overwritten.
    """
    last_here = Path(settings.run_dir) / "checkpoints" / "last.pt" if settings.run_dir else None
    if settings.resume == "none":
        if last_here and last_here.exists():
            raise UserError(
                f"run_dir: {settings.run_dir} already holds a run; go on with resume=auto, or choose another folder"
            )
        return None
    if settings.resume == "auto":
        return last_here if last_here and last_here.exists() else None
    return locate(Path(settings.resume), "last.pt")


def locate(path: Path, name: str) -> Path:
    """A checkpoint, from its own path or that of its run folder (then the one called `name`).

    Raises:
        UserError: nothing there.
    """
    for candidate in (path, path / "checkpoints" / name, path / name):
        if candidate.is_file():
            return candidate
    raise UserError(
        f"{path}: no checkpoint there (a file such as RUN/checkpoints/{name}, or the run's folder)"
    )


def run_folder_of(path: Path) -> Path:
    """The run folder that a checkpoint lies in."""
    return path.parent.parent if path.parent.name == "checkpoints" else path.parent


def finished_results(saved: Mapping[str, Any], folder: Path, settings: Settings) -> dict[str, Any] | None:
    """What a run that is at its end came to; None when there is more to train."""
    progress, results = saved["state"]["progress"], folder / "results.json"
    longer = settings.steps > progress["step"] if settings.steps else settings.epochs > progress["epoch"]
    if not progress["finished"] or longer or not results.is_file():
        return None
    return {**json.loads(results.read_text()), "run_dir": str(folder)}


def resume(state: TrainState, saved: Mapping[str, Any], assembly: Assembly, data: Data) -> None:
    """Put `state` where the checkpoint left it.

    Raises:
        UserError: the checkpoint is of another network or of other classes.
    """
    before = saved_spec(saved)
    if before.classes != data.spec.classes or before.keypoints != data.spec.keypoints:
        raise UserError(
            f"resume: the checkpoint knows {_listed(before.classes or before.keypoints)}, "
            f"the data have {_listed(data.spec.classes or data.spec.keypoints)}"
        )
    if saved["fingerprint"] != data.fingerprint:
        log.warning("resume: the data have changed since the checkpoint (%s, now %s)",
                    saved["fingerprint"], data.fingerprint)  # fmt: skip
    for key, then, now in differences(saved["config"], dataclasses.asdict(assembly.settings)):
        if key.split(".")[0] not in ("resume", "run_dir", "log", "checkpoint", "device", "threads"):
            log.warning("resume: %s was %s, is now %s", key, then, now)
    load_weights(state.model, saved["state"]["model"])
    state.load_state_dict(saved["state"])
    progress = state.progress
    progress.finished = False  # this call may ask for more epochs
    log.info("resume: epoch %d, step %d", progress.epoch, progress.step)


def load_weights(model: Any, weights: Mapping[str, Any]) -> None:
    """Weights of a checkpoint into a model, every one of them.

    Raises:
        UserError: another architecture; names what differs, in a few lines.
    """
    mine = model.state_dict()
    problems = [f"only in the checkpoint: {name}" for name in weights if name not in mine]
    problems += [f"only in the network: {name}" for name in mine if name not in weights]
    problems += [
        f"{name}: {tuple(weights[name].shape)} in the checkpoint, {tuple(value.shape)} in the network"
        for name, value in mine.items()
        if name in weights and weights[name].shape != value.shape
    ]
    if problems:
        shown = [*problems[:6], *([f"and {len(problems) - 6} more"] if len(problems) > 6 else [])]
        raise UserError("\n  ".join(["the checkpoint is of another network than model=...:", *shown]))
    model.load_state_dict(weights)


def differences(
    before: Mapping[str, Any], after: Mapping[str, Any], prefix: str = ""
) -> list[tuple[str, Any, Any]]:
    """(key, before, after) for each setting that is not the same in both."""
    found: list[tuple[str, Any, Any]] = []
    for key in dict.fromkeys([*before, *after]):
        old, new = before.get(key), after.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += differences(old, new, f"{prefix}{key}.")
        elif old != new:
            found.append((f"{prefix}{key}", old, new))
    return found


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted key."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def _listed(names: tuple[str, ...]) -> str:
    return f"{len(names)} names ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})"
