"""Resume from a checkpoint: the state comes from the checkpoint, the settings from the command line.

Settings that do not affect the result (paths, logging, workers, device) may change. Settings that do (learning rate,
schedule, augmentation, ...) take their new value from the resumed step on, and the log reports the change. `epochs` and
`steps` may change too. A schedule spans the whole training, so a new length can change the learning rate; the log then
shows the old and the new rate. Changes that are incompatible with the saved state are rejected: network, data set,
splits, batch size, seed and type of optimizer. The number of processes may change only between epochs, because within
an epoch each process has its own position.
"""

import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cnntrain.config.schema import Settings
from cnntrain.data.fingerprint import same_data, same_examples
from cnntrain.data.load import Data
from cnntrain.errors import UserError
from cnntrain.train import checkpoint
from cnntrain.train.device import choose_compute, count_cores
from cnntrain.train.distributed import World
from cnntrain.train.saved import differences, is_finished, load_weights, misfits, read_saved, saved_spec
from cnntrain.train.setup import Components
from cnntrain.train.state import TrainState
from cnntrain.types import DataSpec

log = logging.getLogger("cnntrain")
# By the longest beginning of a key: `free` changes no number, `new` holds from here on, `fixed` must stay.
RULE = {
    "": "new",
    **dict.fromkeys(
        ("epochs", "steps", "early_stopping", "launch", "run_dir", "resume", "checkpoint", "log", "device", "threads",
         "deterministic", "expect", "trusted_packages", "choices", "check", "bench", "overfit", "lr_find", "inspect",
         "preview", "sweep"),
        "free",
    ),
    **dict.fromkeys(("seed", "batch_size", "accumulate", "limit_batches", "task._target_"), "fixed"),
    "data": "fixed",
    **dict.fromkeys(("data.root", "data.file", "data.workers", "data.cache", "data.scan", "data.timeout_s"), "free"),
    "model": "fixed",
    "model.pretrained": "free",  # the weights are the checkpoint's
    **dict.fromkeys(("model.freeze", "model.unfreeze"), "new"),
    **dict.fromkeys(("optimizer._target_", "optimizer.name"), "fixed"),
}  # fmt: skip
GROUP_KEYS = (
    "keep optimizer.layer_decay, optimizer.decay_norms_and_biases and a weight decay of 0 as they were"
)
SHOWN_DIFFERENCES = 4


def keep_choices(settings: Settings, saved: Mapping[str, Any], ranks: World) -> Settings:
    """Replace `auto` and null by the checkpoint's resolved values: precision, threads, batch size, learning rate.

    Precision and threads depend on the machine. They are kept only for the same type of device and the same number of
    processes; threads also require that this machine has enough cores.
    """
    resolved = saved.get("resolved", {})
    device = choose_compute(settings.device, "fp32", settings.channels_last, ranks).device.type
    if (resolved.get("device"), resolved.get("processes")) == (device, ranks.count):
        if settings.precision == "auto" and resolved.get("precision") in ("fp32", "bf16", "fp16"):
            settings = dataclasses.replace(settings, precision=resolved["precision"])
        threads = resolved.get("threads")
        if settings.threads is None and threads in range(1, 1 + count_cores() // ranks.local_count):
            settings = dataclasses.replace(settings, threads=threads)
    if settings.batch_size == "auto":
        settings = dataclasses.replace(settings, batch_size=saved["config"]["batch_size"])
    if settings.optimizer.get("lr") == "auto" and "lr" in saved["config"]["optimizer"]:
        rate = saved["config"]["optimizer"]["lr"]
        settings = dataclasses.replace(settings, optimizer={**settings.optimizer, "lr": rate})
    # Values derived from the pretrained weights where the config says null or auto.
    for section, keys in (("model", ("stem",)), ("data", ("size", "mean", "std"))):
        now, then = getattr(settings, section), saved["config"][section]
        kept = {
            key: then[key] for key in keys if now.get(key, "") in (None, "auto") and then.get(key) is not None
        }
        settings = dataclasses.replace(settings, **{section: {**now, **kept}})
    return settings


def resume(
    state: TrainState, saved: Mapping[str, Any], source: Path, assembly: Components, data: Data
) -> Path | None:
    """Put `state` where the checkpoint `source`, whose content is `saved`, left it.

    Returns the checkpoint of the best epoch so far; None if there is none or it was lost.

    Raises:
        UserError: the checkpoint is of another training, which is described beside this one.
    """
    config = dataclasses.asdict(assembly.settings)
    changed = differences(saved["config"], config)
    weights, before = saved["state"]["model"], saved_spec(saved)
    mine = assembly.model.state_dict()
    problems = [
        (key, f"{key}: was {_short(then)}, is {_short(now)}")
        for key, then, now in changed
        if rule(key) == "fixed"
    ]
    problems += [("model", problem) for problem in misfits(weights, mine)]
    problems += [("data", problem) for problem in _other_names(_names(before), _names(data.spec))]
    if not same_data(saved["fingerprint"], data.fingerprint):
        known = same_examples(saved["fingerprint"], data.fingerprint)
        what = "the images changed, but not their names and targets" if known else "examples"
        problems.append(
            ("data", f"{what}: were {saved['fingerprint']}, are {data.fingerprint} (count-hash-hash)")
        )
    processes, now = saved.get("resolved", {}).get("processes", 1), assembly.compute.ranks.count
    if saved["state"]["progress"]["batch"] and processes != now and not problems:
        raise UserError(
            f"resume: {source} was saved by {processes} process{'es' * (processes > 1)} in the middle of epoch "
            f"{saved['state']['progress']['epoch'] + 1}; it cannot be resumed with {now}; use "
            f"launch.devices={processes} (the number may change only between epochs)"
        )
    if problems:
        kind = {"model": "network", "data": "data set"}.get(problems[0][0].partition(".")[0], "training")
        lines = [
            f"resume: {source} is from another {kind}; use the settings of that run (run.json has its command), or "
            "start a new run in another run_dir",
            f"checkpoint: {_describe(saved['config'], before, weights)}",
            f"now:        {_describe(config, data.spec, mine)}",
            *(problem for _, problem in problems[:SHOWN_DIFFERENCES]),
            *(
                [f"and {len(problems) - SHOWN_DIFFERENCES} more differences"]
                * (len(problems) > SHOWN_DIFFERENCES)
            ),
        ]
        raise UserError("\n  ".join(lines))
    load_weights(state.model, weights)
    try:
        state.load_state_dict(saved["state"])
    except ValueError as error:  # torch's words for an optimizer that was built in another way
        raise UserError(
            f"resume: the optimizer's parameter groups are not the checkpoint's; {GROUP_KEYS}"
        ) from error
    except (TypeError, LookupError, AttributeError, RuntimeError) as error:
        raise UserError(
            f"resume: the state in {source} does not fit ({type(error).__name__}: {error})"
        ) from error
    best = _best_checkpoint(source, state)
    if state.progress.best and best is None:
        log.warning("resume: the best epoch's weights are no longer beside %s; it is looked for anew", source)
        state.progress.best = {}
    # This call may train longer. An epoch that `steps` cut short is validated again, for its row in metrics.csv.
    state.progress.finished = is_finished(saved, assembly.settings) and not state.progress.batch
    epoch, batch, step = state.progress.epoch, state.progress.batch, state.progress.step
    at = f"in epoch {epoch + 1}, step {step}" if batch else f"after epoch {epoch}, step {step}"
    log.info("resume: state from %s (%s), settings from the command line", source, at)
    then = saved.get("resolved", {}).get("precision")
    if then not in (None, assembly.compute.precision) and "precision" not in (key for key, *_ in changed):
        changed.append(
            ("precision", then, assembly.compute.precision)
        )  # `auto` resolved to another value here
    for key, then, now in changed:
        if rule(key) == "new" and not (then == "auto" and now == saved.get("resolved", {}).get(key)):
            log.warning(
                "resume: %s was %s, is now %s, which holds from here on", key, _short(then), _short(now)
            )
    _say_rate(state, saved, [key for key, *_ in changed])
    return best


def _say_rate(state: TrainState, saved: Mapping[str, Any], changed: Sequence[str]) -> None:
    """Warn if the learning rate jumps because the schedule, its length or its peak changed."""
    schedule, step = state.schedule, state.progress.step
    length = [key for key in changed if key in ("epochs", "steps")]
    shape = [key for key in changed if key == "optimizer.lr" or key.partition(".")[0] == "schedule"]
    if not step or step >= schedule.total_steps or not (shape or (length and not schedule.state())):
        return
    peak, last = state.optimizer.param_groups[0]["peak_lr"], state.optimizer.param_groups[0]["lr"]
    if not math.isclose(peak * schedule.factor(step - 1), last, rel_tol=1e-6):
        log.warning(
            "resume: the learning rate jumps from %.3g at step %d to %.3g at the next step because %s changed and the "
            "schedule spans the whole training; use schedule=constant to extend a run without a jump",
            last, step, peak * schedule.factor(step), ", ".join([*length, *shape]),
        )  # fmt: skip


def _best_checkpoint(source: Path, state: TrainState) -> Path | None:
    """Return the checkpoint with the best epoch's weights: best.pt beside `source`, or `source`, written before it."""
    beside, progress = source.with_name("best.pt"), state.progress
    if not progress.best:
        return None
    if _is_best(beside, progress.best, state.eval_model.state_dict()):
        return beside
    return source if progress.best.get("step") == progress.step else None


def _is_best(path: Path, best: Mapping[str, float], mine: Mapping[str, Any]) -> bool:
    """Return True if the checkpoint has the metrics `best` and weights that fit `mine`; it may have been replaced."""
    try:
        state = read_saved(path)["state"]
    except UserError:
        return False
    # Compare by repr because NaN != NaN. The weights are loaded after training, so they must fit.
    return repr(state["progress"]["best"]) == repr(best) and not misfits(state["ema"] or state["model"], mine)


def bring_best(best: Path, target: Path) -> None:
    """Copy the best checkpoint to the run's own folder."""
    if best.resolve() != target.resolve():
        checkpoint.save(checkpoint.load(best), target)


def rule(key: str) -> str:
    """What a change of `key` means: free, new or fixed."""
    while key not in RULE:
        key = key.rpartition(".")[0]
    return RULE[key]


def _names(spec: DataSpec) -> tuple[str, ...]:
    return spec.classes or spec.keypoints


def _other_names(before: tuple[str, ...], now: tuple[str, ...]) -> list[str]:
    gone, new = [n for n in before if n not in now], [n for n in now if n not in before]
    if gone or new:
        parts = [
            f"{what}: {_short(', '.join(names))}"
            for what, names in (("no longer there", gone), ("new", new))
            if names
        ]
        return ["names " + "; ".join(parts)]
    return ["names in another order"] if before != now else []


def _describe(config: Mapping[str, Any], spec: DataSpec, weights: Mapping[str, Any]) -> str:
    choices, names = config["choices"], _names(spec)
    kind = "classes" if spec.classes else "points"
    listed = f"{len(names)} {kind} ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})"
    count = sum(value.numel() for value in weights.values())
    return f"model={choices.get('model')} ({count:,} weights), data={choices.get('data')}, {listed}"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
