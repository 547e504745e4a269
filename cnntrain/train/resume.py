"""Resume from a checkpoint: the state comes from the checkpoint, the settings from the command line.

Settings that do not affect the result (paths, logging, workers, device) may change. Settings that do (learning rate,
schedule, augmentation, ...) take their new value from the resumed step on, and the log reports the change. `epochs` and
`steps` may change too. A schedule spans the whole training, so a new length can change the learning rate; the log then
shows the old and the new rate. Changes that are incompatible with the saved state are rejected: network, dataset,
splits, batch size, seed and type of optimizer. The number of ranks may change only between epochs, because within an
epoch each rank has its own position.
"""

import dataclasses
import logging
import math
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cnntrain.config.command_line import format_overrides
from cnntrain.config.schema import Settings
from cnntrain.data.load import DataSplits, same_examples
from cnntrain.data.parallel import usable_cores
from cnntrain.errors import UserError
from cnntrain.io import safe_files as files
from cnntrain.train import checkpoint
from cnntrain.train.checkpoint import load_validated, load_weights, weight_mismatches
from cnntrain.train.device import choose_compute
from cnntrain.train.distributed import World
from cnntrain.train.setup import Components
from cnntrain.train.state import TrainState
from cnntrain.types import DataSpec

log = logging.getLogger("cnntrain")
# What a change of a setting means, by the longest matching prefix of its key. free: the result does not depend on it;
# new: the new value applies from the resumed step on; fixed: it must not change.
_FREE = (
    "epochs steps early_stopping launch run_dir resume checkpoint log device threads deterministic expect "
    "trusted_packages choices check bench overfit lr_find inspect preview sweep data.root data.file data.workers "
    "data.cache data.scan data.timeout_s "
    "model.pretrained"  # the weights come from the checkpoint
)
_NEW = "model.freeze model.unfreeze"
_FIXED = "seed batch_size accumulate limit_batches task._target_ data model optimizer._target_ optimizer.name"
CHANGE_RULES = {
    "": "new",
    **dict.fromkeys(_FREE.split(), "free"),
    **dict.fromkeys(_NEW.split(), "new"),
    **dict.fromkeys(_FIXED.split(), "fixed"),
}
MAX_SHOWN_PROBLEMS = 4
Change = tuple[str, Any, Any]  # dotted key, value before, value after


def find_run_dir(settings: Settings) -> Path | None:
    """Return the folder that training will write to, from `run_dir` or `resume`; None for a new folder."""
    if settings.run_dir:
        return Path(settings.run_dir)
    if settings.resume in ("none", "auto"):
        return None
    return files.run_folder_of(locate_checkpoint(Path(settings.resume), "last.pt"))


def locate_checkpoint(path: Path, name: str) -> Path:
    """Return the checkpoint that `path` names: the file itself, or the file called `name` in a run folder."""
    if path.is_file():
        return path
    for candidate in (path / "checkpoints" / name, path / name):
        if candidate.is_file():
            files.open_read(candidate, path).close()  # raises an error if it is a link
            return candidate
    raise UserError(f"{path}: no checkpoint there; name a file such as RUN/checkpoints/{name}, or the run folder")


def load_resume_checkpoint(settings: Settings) -> tuple[Path, dict[str, Any]] | None:
    """Return the checkpoint to resume from and its validated content; None to start from scratch.

    A run started with `resume=OTHER run_dir=FOLDER` continues from its own checkpoint when the same command is run
    again, for example by a requeued job.

    Raises:
        UserError: the named checkpoint does not exist, or a later state or another run would be overwritten.
    """
    if settings.resume == "auto" and not settings.run_dir:
        raise UserError(
            "resume: auto continues the run in run_dir, but run_dir is not set; add run_dir=FOLDER, or name the run "
            "with resume=FOLDER"
        )
    folder = find_run_dir(settings)
    last = folder / "checkpoints" / "last.pt" if folder else None
    if last and last.exists() and not last.is_file():
        raise UserError(f"{last}: is not a file; remove it, or choose another run_dir")
    own = last if last and last.exists() else None
    if settings.resume == "none" and own:
        raise UserError(
            f"run_dir: {folder} already contains a run; continue it with resume=auto, or choose another folder"
        )
    if settings.resume in ("none", "auto"):
        return (own, load_validated(own)) if own else None
    source = locate_checkpoint(Path(settings.resume), "last.pt")
    content = load_validated(source)
    if not own or own.samefile(source):
        return source, content
    own_content = load_validated(own)
    (run_id, _), (own_id, own_ancestors) = _read_identity(content), _read_identity(own_content)
    step, own_step = (each["state"]["progress"]["step"] for each in (content, own_content))
    if own.parent.resolve() == source.parent.resolve():
        if step != own_step:
            raise UserError(
                f"resume: {source} is at step {step}; resuming from it would overwrite {own} at step {own_step}; "
                f"use {format_overrides(resume='auto', run_dir=folder)} to continue from there, or another run_dir to "
                "go back"
            )
    elif run_id is None or not (run_id in own_ancestors or (run_id == own_id and step <= own_step)):
        raise UserError(
            f"run_dir: {folder} contains a run that was not started from {source}; "
            f"use {format_overrides(resume='auto', run_dir=folder)} to continue that run, or another run_dir to start "
            "a new one"
        )
    else:
        log.info("resume: %s was started from %s and continues from its own checkpoint", folder, source)
    return own, own_content


def run_identity(content: Mapping[str, Any] | None, same_folder: bool) -> dict[str, Any]:
    """Return the identity of a run for its checkpoints: its `id`, and the ids of the runs it was resumed from.

    Args:
        content: the checkpoint that the run resumes from, if any.
        same_folder: whether that checkpoint belongs to this run's folder.
    """
    run_id, ancestors = _read_identity(content or {})
    if same_folder and run_id:
        return {"id": run_id, "ancestors": ancestors}
    return {"id": uuid.uuid4().hex, "ancestors": [*ancestors, *([run_id] if run_id else [])]}


def _read_identity(content: Mapping[str, Any]) -> tuple[str | None, list[str]]:
    """Return a checkpoint's run id and its ancestors' ids; None and an empty list if it has no identity."""
    run = content.get("run")
    if not isinstance(run, Mapping) or not isinstance(run.get("id"), str):
        return None, []
    ancestors = run.get("ancestors")
    return run["id"], [a for a in ancestors if isinstance(a, str)] if isinstance(ancestors, list) else []


def finished_results(content: Mapping[str, Any], folder: Path, settings: Settings) -> dict[str, Any] | None:
    """Return the results of a finished run; None if there is more to train.

    Args:
        content: the run's last checkpoint.
    """
    path = folder / "results.json"
    if not is_finished(content, settings) or not files.exists(path):
        return None
    try:
        results = files.read_json(path, "the file will be rewritten")
    except UserError as error:  # after a kill or a full disk; it can be rebuilt from the checkpoints
        log.warning("%s", error)
        return None
    if results.get("steps") != content["state"]["progress"]["step"]:  # written by a shorter run
        return None
    return {**results, "run_dir": str(folder)}


def is_finished(content: Mapping[str, Any], settings: Settings) -> bool:
    """Return True if the training of a checkpoint is complete and `settings` do not ask for a longer one."""
    progress, patience = content["state"]["progress"], settings.early_stopping
    complete = progress["step"] >= settings.steps if settings.steps else progress["epoch"] >= settings.epochs
    stopped_early = patience is not None and progress["epochs_since_best"] >= patience
    return progress["finished"] and (complete or stopped_early)


def keep_resolved_values(settings: Settings, content: Mapping[str, Any], world: World) -> Settings:
    """Replace `auto` and null by the checkpoint's resolved values: precision, threads, batch size, learning rate.

    Precision and threads depend on the machine. They are kept only for the same type of device and the same number of
    ranks; threads also require that this machine has enough cores.
    """
    resolved, saved = content["resolved"], content["config"]
    kept: dict[str, Any] = {}
    device = choose_compute(settings.device, "fp32", settings.channels_last, world).device.type
    if (resolved.get("device"), resolved.get("processes")) == (device, world.size):
        if settings.precision == "auto" and "precision" in resolved:
            kept["precision"] = resolved["precision"]
        threads = resolved.get("threads")
        if settings.threads is None and threads in range(1, 1 + usable_cores() // world.local_size):
            kept["threads"] = threads
    if settings.batch_size == "auto":
        kept["batch_size"] = saved["batch_size"]
    if settings.optimizer.get("lr") == "auto" and "lr" in saved["optimizer"]:
        kept["optimizer"] = {**settings.optimizer, "lr": saved["optimizer"]["lr"]}
    # Values derived from the pretrained weights where the config has null or auto.
    for group, keys in (("model", ("stem",)), ("data", ("size", "mean", "std"))):
        own = getattr(settings, group)
        derived = [k for k in keys if own.get(k, "") in (None, "auto") and saved[group].get(k) is not None]
        kept[group] = {**own, **{key: saved[group][key] for key in derived}}
    return dataclasses.replace(settings, **kept)


def resume(
    state: TrainState, content: Mapping[str, Any], source: Path, components: Components, data: DataSplits
) -> Path | None:
    """Load the checkpoint `source` with this content into `state`.

    Returns the checkpoint of the best epoch so far; None if there is none or it was lost.
    """
    changed = changed_settings(content["config"], dataclasses.asdict(components.settings))
    _reject_mismatches(content, source, changed, components, data)
    load_weights(state.model, content["state"]["model"])
    try:
        state.load_state_dict(content["state"])
    except ValueError as error:  # raised by torch for other parameter groups
        raise UserError(
            "resume: the optimizer's parameter groups are not those of the checkpoint; keep optimizer.layer_decay, "
            "optimizer.decay_norms_and_biases and a weight decay of 0 as they were"
        ) from error
    except (TypeError, LookupError, AttributeError, RuntimeError) as error:
        raise UserError(f"resume: the state in {source} does not fit ({type(error).__name__}: {error})") from error
    best, progress = _find_best(source, state), state.progress
    if progress.best and best is None:
        log.warning("resume: the weights of the best epoch are missing beside %s; a new best epoch is chosen", source)
        progress.best = {}
    # This command may train longer. An epoch that `steps` cut short is validated again, for its row in metrics.csv.
    progress.finished = is_finished(content, components.settings) and not progress.batch
    where = f"in epoch {progress.epoch + 1}" if progress.batch else f"after epoch {progress.epoch}"
    log.info("resume: state from %s (%s, step %d), settings from the command line", source, where, progress.step)
    _log_changes(changed, content, components, state)
    return best


def _reject_mismatches(
    content: Mapping[str, Any], source: Path, changed: Sequence[Change], components: Components, data: DataSplits
) -> None:
    """Raise an error that describes both trainings if the checkpoint does not fit this one."""
    weights, own_weights = content["state"]["model"], components.model.state_dict()
    spec, config = DataSpec(**content["spec"]), dataclasses.asdict(components.settings)
    before, now = spec.classes or spec.keypoints, data.spec.classes or data.spec.keypoints
    problems = [
        (key.partition(".")[0], f"{key}: was {_short(old)}, is {_short(new)}")
        for key, old, new in changed
        if change_rule(key) == "fixed"
    ]
    problems += [("model", problem) for problem in weight_mismatches(weights, own_weights)]
    if before != now:
        removed, added = (
            ", ".join(n for n in ours if n not in theirs) for ours, theirs in ((before, now), (now, before))
        )
        what = f"removed: {_short(removed)}; new: {_short(added)}" if removed or added else "in another order"
        problems.append(("data", f"names {what}"))
    if content["fingerprint"] != data.fingerprint:
        only_images = same_examples(content["fingerprint"], data.fingerprint)
        what = "the images changed, but not their names and targets" if only_images else "examples"
        problems.append(("data", f"{what}: were {content['fingerprint']}, are {data.fingerprint} (count-hash-hash)"))
    if problems:
        kind = {"model": "network", "data": "dataset"}.get(problems[0][0], "training")
        hidden = len(problems) - MAX_SHOWN_PROBLEMS
        lines = [
            f"resume: {source} is from another {kind}; use the settings of that run (run.json has its command), or "
            "start a new run in another run_dir",
            f"checkpoint: {_describe(content['config'], spec, weights)}",
            f"now:        {_describe(config, data.spec, own_weights)}",
            *(problem for _, problem in problems[:MAX_SHOWN_PROBLEMS]),
            *([f"and {hidden} more differences"] if hidden > 0 else []),
        ]
        raise UserError("\n  ".join(lines))
    progress, processes = content["state"]["progress"], content["resolved"].get("processes", 1)
    if progress["batch"] and processes != components.compute.world.size:
        raise UserError(
            f"resume: {source} was saved in the middle of epoch {progress['epoch'] + 1} with "
            f"launch.devices={processes}; it cannot be resumed with {components.compute.world.size}; use "
            f"launch.devices={processes} (the number may change only between epochs)"
        )


def _log_changes(changed: list[Change], content: Mapping[str, Any], components: Components, state: TrainState) -> None:
    """Log settings that apply from the resumed step on, and a jump of the learning rate."""
    resolved, precision = content["resolved"], components.compute.precision
    keys = [key for key, *_ in changed]
    if resolved.get("precision", precision) != precision and "precision" not in keys:  # `auto` has another meaning
        changed = [*changed, ("precision", resolved["precision"], precision)]
    for key, before, now in changed:
        if change_rule(key) == "new" and not (before == "auto" and now == resolved.get(key)):
            log.warning("resume: %s was %s and is %s from the resumed step on", key, _short(before), _short(now))
    schedule, step = state.schedule, state.progress.step
    length = [key for key in keys if key in ("epochs", "steps")]
    shape = [key for key in keys if key == "optimizer.lr" or key.partition(".")[0] == "schedule"]
    if not step or step >= schedule.total_steps or not (shape or (length and not schedule.state())):
        return
    peak, last = state.optimizer.param_groups[0]["peak_lr"], state.optimizer.param_groups[0]["lr"]
    if not math.isclose(peak * schedule.multiplier(step - 1), last, rel_tol=1e-6):
        log.warning(
            "resume: the learning rate jumps from %.3g at step %d to %.3g at the next step because %s changed and the "
            "schedule spans the whole training; use schedule=constant to extend a run without a jump",
            last,
            step,
            peak * schedule.multiplier(step),
            ", ".join([*length, *shape]),
        )


def _find_best(source: Path, state: TrainState) -> Path | None:
    """Return the checkpoint with the weights of the best epoch: best.pt beside `source`, or `source` itself."""
    best, path = state.progress.best, source.with_name("best.pt")
    if not best:
        return None
    try:
        saved = load_validated(path)["state"]
        # Compare by repr because NaN != NaN. The weights are loaded after training, so they must fit.
        same = repr(saved["progress"]["best"]) == repr(best)
        if same and not weight_mismatches(saved["ema"] or saved["model"], state.eval_model.state_dict()):
            return path
    except UserError:
        pass  # missing, damaged or replaced
    return source if best.get("step") == state.progress.step else None  # last.pt is written before best.pt


def copy_best_checkpoint(best: Path, target: Path) -> None:
    """Copy the best checkpoint to the run's own folder, unless it is there already."""
    if best.resolve() != target.resolve():
        checkpoint.save(checkpoint.load(best), target)


def change_rule(key: str) -> str:
    """Return what a change of this setting means: free, new or fixed (see `CHANGE_RULES`)."""
    while key not in CHANGE_RULES:
        key = key.rpartition(".")[0]
    return CHANGE_RULES[key]


def changed_settings(before: Mapping[str, Any], after: Mapping[str, Any], prefix: str = "") -> list[Change]:
    """Return all settings that differ."""
    changed: list[Change] = []
    for key in dict.fromkeys([*before, *after]):
        old, new = before.get(key), after.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            changed += changed_settings(old, new, f"{prefix}{key}.")
        elif old != new:
            changed.append((f"{prefix}{key}", old, new))
    return changed


def flatten_settings(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings by dotted key."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        name = f"{prefix}{key}"
        flat |= flatten_settings(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return flat


def _describe(config: Mapping[str, Any], spec: DataSpec, weights: Mapping[str, Any]) -> str:
    count, choices = sum(value.numel() for value in weights.values()), config["choices"]
    names, kind = spec.classes or spec.keypoints, "classes" if spec.classes else "keypoints"
    listed = f"{len(names)} {kind} ({', '.join([*names[:5], *['...'] * (len(names) > 5)])})"
    return f"model={choices.get('model')} ({count:,} weights), data={choices.get('data')}, {listed}"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
