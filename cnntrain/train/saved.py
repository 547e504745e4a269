"""Runs that were saved: which checkpoint to go on from, what it holds, and whether it fits."""

import dataclasses
import logging
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cnntrain.config.command_text import typed, without_passwords
from cnntrain.config.compose import compose
from cnntrain.config.schema import Settings
from cnntrain.data.load import Data
from cnntrain.errors import UserError
from cnntrain.io import safe_files as files
from cnntrain.io.safe_files import run_folder_of
from cnntrain.train import checkpoint
from cnntrain.train.saved_content import check_saved
from cnntrain.train.setup import Components
from cnntrain.types import DataSpec

log = logging.getLogger("cnntrain")


def read_saved(path: Path) -> dict[str, Any]:
    """The content of a run's checkpoint, as `checkpoint_facts` and `TrainState.state_dict` made it.

    Raises:
        UserError: damaged, or not of that form.
    """
    try:
        return check_saved(checkpoint.load(path), compose("config", ()))
    except UserError as error:
        if str(path) in str(error):
            raise
        raise UserError(f"{path}: not the checkpoint of a training ({error})") from error


def checkpoint_facts(assembly: Components, data: Data) -> dict[str, Any]:
    """What a checkpoint says beside its state: enough to evaluate it elsewhere."""
    return {
        "config": without_passwords(dataclasses.asdict(assembly.settings)),
        # Values that `auto` and null resolved to; reused when the run is resumed on a similar machine.
        "resolved": {
            "device": assembly.compute.device.type,
            "precision": assembly.compute.precision,
            "threads": torch.get_num_threads(),
            "processes": assembly.compute.ranks.count,
        },
        "spec": dataclasses.asdict(data.spec),
        "fingerprint": data.fingerprint,
        "monitor": assembly.task.monitor,
        "versions": checkpoint.versions(),
    }


def saved_spec(saved: Mapping[str, Any]) -> DataSpec:
    """The facts about the data that a checkpoint was trained on."""
    return DataSpec(**saved["spec"])


def find_folder(settings: Settings) -> Path | None:
    """Return the folder that training will write to, from `run_dir` or `resume`; None for a new folder.

    Raises:
        UserError: `resume` does not name a checkpoint.
    """
    if settings.run_dir:
        return Path(settings.run_dir)
    if settings.resume in ("none", "auto"):
        return None
    return run_folder_of(locate(Path(settings.resume), "last.pt"))


def find_saved(settings: Settings) -> tuple[Path, dict[str, Any]] | None:
    """Return the checkpoint to resume from and its content; None to start from scratch.

    A run started with `resume=OTHER run_dir=FOLDER` continues from its own checkpoint when the same command is run
    again, for example by a requeued job.

    Raises:
        UserError: the named checkpoint does not exist, or a later state or another run would be overwritten.
    """
    source = find_checkpoint(settings)
    if source is None:
        return None
    saved, folder = read_saved(source), find_folder(settings)
    last = folder / "checkpoints" / "last.pt" if folder else source
    if not last.is_file() or last.samefile(source):
        return source, saved
    own, named = read_saved(last), _identity(saved)[0]
    own_id, ancestors = _identity(own)
    steps = [each["state"]["progress"]["step"] for each in (saved, own)]
    if folder and last.parent.resolve() == source.parent.resolve():
        if steps[0] != steps[1]:
            raise UserError(
                f"resume: {source} is at step {steps[0]}; resuming from it would overwrite {last} at step {steps[1]}; "
                f"use {typed(resume='auto', run_dir=folder)} to continue from there, or another run_dir to go back"
            )
    elif named is None or not (named in ancestors or (named == own_id and steps[0] <= steps[1])):
        raise UserError(
            f"run_dir: {folder} contains a run that was not started from {source}; "
            f"use {typed(resume='auto', run_dir=folder)} to continue that run, or another run_dir to start a new one"
        )
    else:
        log.info("resume: %s was started from %s and continues from its own checkpoint", folder, source)
    return last, own


def identify(saved: Mapping[str, Any] | None, same_folder: bool) -> dict[str, Any]:
    """Return the run identity for new checkpoints: its `id`, and the ids of the runs it was resumed from.

    Args:
        saved: the checkpoint that the run resumes from, if any.
        same_folder: whether that checkpoint belongs to this run's folder.
    """
    run_id, ancestors = _identity(saved or {})
    if same_folder and run_id:
        return {"id": run_id, "ancestors": ancestors}
    return {"id": uuid.uuid4().hex, "ancestors": [*ancestors, *([run_id] if run_id else [])]}


def _identity(saved: Mapping[str, Any]) -> tuple[str | None, list[str]]:
    """Return a checkpoint's run id and its ancestors' ids; None and an empty list if it has no identity."""
    run = saved.get("run")
    if not isinstance(run, Mapping) or not isinstance(run.get("id"), str):
        return None, []
    ancestors = run.get("ancestors")
    return run["id"], [a for a in ancestors if isinstance(a, str)] if isinstance(ancestors, list) else []


def find_checkpoint(settings: Settings) -> Path | None:
    """Return the checkpoint that `resume` and `run_dir` name; None to start from scratch.

    Raises:
        UserError: there is none where one was named, or a run would be overwritten.
    """
    if settings.resume == "auto" and not settings.run_dir:
        raise UserError(
            "resume: auto continues the run in run_dir, but run_dir is not set; add run_dir=FOLDER, or name the run "
            "with resume=FOLDER"
        )
    last_here = Path(settings.run_dir) / "checkpoints" / "last.pt" if settings.run_dir else None
    if last_here and last_here.exists() and not last_here.is_file():
        raise UserError(f"{last_here}: is no file; remove it, or choose another run_dir")
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
    if path.is_file():
        return path
    for candidate in (path / "checkpoints" / name, path / name):
        if candidate.is_file():
            files.open_read(candidate, path).close()  # refuses a link
            return candidate
    raise UserError(
        f"{path}: no checkpoint there (a file such as RUN/checkpoints/{name}, or the run's folder)"
    )


def finished_results(saved: Mapping[str, Any], folder: Path, settings: Settings) -> dict[str, Any] | None:
    """Return the results of a finished run; None if there is more to train."""
    results = folder / "results.json"
    if not is_finished(saved, settings) or not files.exists(results):
        return None
    try:
        content = files.read_json(results, "the file will be rewritten")
    except UserError as error:  # after a kill or a full disk; it can be rebuilt from the checkpoints
        log.warning("%s", error)
        return None
    if content.get("steps") != saved["state"]["progress"]["step"]:  # written by a shorter run
        return None
    return {**content, "run_dir": str(folder)}


def is_finished(saved: Mapping[str, Any], settings: Settings) -> bool:
    """Whether the training came to its end, and `settings` ask for no more of it than it had."""
    progress, patience = saved["state"]["progress"], settings.early_stopping
    long_enough = (
        progress["step"] >= settings.steps if settings.steps else progress["epoch"] >= settings.epochs
    )
    patience_over = patience is not None and progress["epochs_since_best"] >= patience
    return progress["finished"] and (long_enough or patience_over)


def load_weights(model: Any, weights: Mapping[str, Any]) -> None:
    """Weights of a checkpoint into a model, every one of them.

    Raises:
        UserError: another architecture; names what differs, in a few lines.
    """
    refuse_misfits(weights, model)
    model.load_state_dict(weights)


def refuse_misfits(weights: Mapping[str, Any], model: nn.Module) -> None:
    """Reject weights of another architecture; see `load_weights`."""
    if problems := misfits(weights, model.state_dict()):
        shown = [*problems[:6], *([f"and {len(problems) - 6} more"] if len(problems) > 6 else [])]
        raise UserError("\n  ".join(["the checkpoint is of another network than model=...:", *shown]))


def misfits(weights: Mapping[str, Any], mine: Mapping[str, Any]) -> list[str]:
    """What keeps a checkpoint's weights from being those of a network with the weights `mine`; empty when they fit."""
    problems = [f"only in the checkpoint: {name}" for name in weights if name not in mine]
    problems += [f"only in the network: {name}" for name in mine if name not in weights]
    problems += [
        f"{name}: {tuple(weights[name].shape)} in the checkpoint, {tuple(value.shape)} in the network"
        for name, value in mine.items()
        if name in weights and weights[name].shape != value.shape
    ]
    problems += [
        f"{name}: {weights[name].dtype} in the checkpoint, {value.dtype} in the network"
        for name, value in mine.items()
        if name in weights and weights[name].is_floating_point() != value.is_floating_point()
    ]
    return problems


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
