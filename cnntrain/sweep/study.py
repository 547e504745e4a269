"""The trials of a sweep in Optuna's storage. Every outcome is stored before anything else happens.

The storage is a journal file in the sweep's folder, or a storage that several machines share (`sweep.storage`).
"""

import contextlib
import fcntl
import hashlib
import json
import math
import time
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import DuplicatedStudyError, OptunaError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from cnntrain.config.command_line import mask_passwords
from cnntrain.errors import MachineError, UserError
from cnntrain.io.safe_files import open_lock, read_bytes, read_json, write_atomic, write_text
from cnntrain.randomness import hash_seed
from cnntrain.sweep.plan import PlannedRun, Repeat, SweepPlan
from cnntrain.sweep.search_space import SearchDimension

SWEEP_FILE, JOURNAL_FILE = "sweep.json", "journal.log"
ENQUEUE_TIMEOUT_S = 30.0  # time in which the machine that created the study has to enqueue the trials


@dataclass(frozen=True)
class Outcome:
    """How one run ended.

    Attributes:
        status: done, pruned, diverged, failed (it raised), killed (its process died) or stopped (by a signal).
        value: the metric that trials are ranked by; None if the run has none.
        metrics: results shown in tables, by name.
        error: first line of the error message.
        time_s: duration in seconds.
    """

    status: str
    value: float | None = None
    metrics: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    time_s: float = 0.0


@dataclass
class Trial:
    """A combination of values of the swept keys, and its finished runs by repeat.

    Attributes:
        is_finished: whether all of its runs have finished.
    """

    number: int
    values: dict[str, str]
    outcomes: dict[Repeat, Outcome]
    is_finished: bool = False

    @property
    def mean(self) -> float | None:
        """Return the mean metric of the completed runs; None if there is none."""
        values = [o.value for o in self.outcomes.values() if o.status == "done" and o.value is not None]
        return sum(values) / len(values) if values else None


@dataclass
class _OpenTrial:
    """A trial of which some runs have not finished."""

    trial: optuna.Trial
    values: dict[str, str]
    waiting: list[Repeat]
    running: set[Repeat] = field(default_factory=set)


class Study:
    """The trials of a sweep: hands out their runs and stores the outcomes.

    Args:
        plan: the trials to enqueue if the storage is empty.
        folder: the sweep's folder.
        name: name of the study in the storage.
        owner: id of the sweep; marks its running trials if several sweeps share a storage.
    """

    def __init__(self, plan: SweepPlan, folder: Path, storage: BaseStorage, name: str, owner: str) -> None:
        self.plan, self.folder, self.storage, self.owner = plan, folder, storage, owner
        direction = "minimize" if plan.monitor and plan.monitor[1] == "min" else "maximize"
        arguments = {"study_name": name, "storage": storage, "pruner": _pruner(plan)}
        try:
            self.study = optuna.create_study(direction=direction, **arguments)
            self.study.set_user_attr("created_by", owner)
        except DuplicatedStudyError:
            self.study = optuna.load_study(**arguments)
        shared = plan.sweep.storage is not None
        if not shared or self.study.user_attrs.get("created_by") == owner:
            self._enqueue_trials()
        else:  # wait for the machine that created the study
            deadline = time.monotonic() + ENQUEUE_TIMEOUT_S
            while not self.study.user_attrs.get("ready"):
                if time.monotonic() > deadline:
                    raise MachineError(
                        "sweep.storage: the machine that created this study did not enqueue its trials within "
                        f"{ENQUEUE_TIMEOUT_S:g} s; start it again"
                    )
                time.sleep(0.2)
        self._open: dict[int, _OpenTrial] = {}
        # In a storage that is not shared, trials without an owner belong to this sweep too: it may have been killed
        # before it stored the owner.
        running = self._frozen_trials(TrialState.RUNNING)
        self._interrupted = [t for t in running if t.user_attrs.get("owner", None if shared else owner) == owner]

    def _enqueue_trials(self) -> None:
        """Store all trials as waiting, so that machines that share the storage take each one once."""
        settings = self.plan.grid()
        for number in range(len(self._frozen_trials()), self.plan.num_trials):
            values = settings[number] if settings is not None else {}
            self.study.enqueue_trial({d.key: _to_stored(d, values[d.key]) for d in self.plan.dimensions if values})
        self.study.set_user_attr("ready", True)

    def next_run(self) -> PlannedRun | None:
        """Return a run to start now, those of interrupted trials first; None if there is none.

        With a pruner, the other repeats of a trial wait until its first run has ended without being pruned.
        """
        while True:
            for number, each in self._open.items():
                blocked = self.plan.sweep.pruner != "none" and self.plan.repeats[0] in each.running
                if each.waiting and not blocked:
                    repeat = each.waiting.pop(0)
                    each.running.add(repeat)
                    return self.plan.make_run(number, each.values, repeat, self.folder)
            trial = self._next_trial()
            if trial is None:
                return None
            known = self._to_trial(self._frozen_trials()[trial.number])
            pruned = any(outcome.status == "pruned" for outcome in known.outcomes.values())
            waiting = [each for each in self.plan.repeats if each not in known.outcomes and not pruned]
            self._open[trial.number] = _OpenTrial(trial, known.values, waiting)
            self._finish_trial_if_done(trial.number)

    def _next_trial(self) -> optuna.Trial | None:
        """Return the next trial; None if no trial is waiting.

        Values that the sampler draws again are not trained again. Their earlier metric is stored again, and other
        values are drawn. The number of additional draws is limited to the number of trials.
        """
        while True:
            if self._interrupted:
                frozen = self._interrupted.pop(0)
                study_id = self.storage.get_study_id_from_name(self.study.study_name)
                trial_id = self.storage.get_trial_id_from_study_id_trial_number(study_id, frozen.number)
                trial = optuna.Trial(self.study, trial_id)
            elif waiting := self._frozen_trials(TrialState.WAITING):
                self.study.sampler = _sampler(self.plan, waiting[0].number)
                trial = self.study.ask()
                trial.set_user_attr("owner", self.owner)
            else:
                return None
            values = {dimension.key: _suggest(trial, dimension) for dimension in self.plan.dimensions}
            earlier = (t for t in self._frozen_trials() if t.number < trial.number)
            original = next((t for t in earlier if self._values(t) == values), None)
            if original is None:
                return trial
            trial.set_user_attr("duplicate_of", original.number)
            value = original.value if original.state == TrialState.COMPLETE else None
            self.study.tell(trial, value, TrialState.FAIL if value is None else None)
            duplicates = self.num_duplicates
            wanted = min(self.plan.num_trials, math.prod(d.size for d in self.plan.dimensions))
            if duplicates <= self.plan.num_trials and len(self._frozen_trials()) - duplicates < wanted:
                self.study.enqueue_trial({})

    def should_prune(self, run: PlannedRun, epoch: int, value: float) -> bool:
        """Store the metric of a run after an epoch (from 1) and return True if the run should be pruned.

        Only the first repeat of a trial is pruned.
        """
        if self.plan.sweep.pruner == "none" or run.repeat != self.plan.repeats[0]:
            return False
        trial = self._open[run.trial].trial
        if epoch not in self._frozen_trials()[run.trial].intermediate_values:
            trial.report(value, epoch)
        return trial.should_prune()

    def finish_run(self, run: PlannedRun, outcome: Outcome) -> None:
        """Store the outcome of a run, which is then never executed again, and finish its trial after the last run."""
        each = self._open[run.trial]
        each.trial.set_user_attr(f"run {run.repeat}", asdict(outcome))
        each.running.discard(run.repeat)
        if outcome.status == "pruned":
            each.waiting.clear()
        self._finish_trial_if_done(run.trial)

    def _finish_trial_if_done(self, number: int) -> None:
        """Store the value of a trial without further runs: the mean over its runs, or the worst if one diverged."""
        each = self._open[number]
        if each.waiting or each.running:
            return
        del self._open[number]
        trial = self._to_trial(self._frozen_trials()[number])
        statuses = {outcome.status for outcome in trial.outcomes.values()}
        if "pruned" in statuses:
            self.study.tell(each.trial, state=TrialState.PRUNED)
        elif "diverged" in statuses and self.plan.monitor:
            self.study.tell(each.trial, -math.inf if self.plan.monitor[1] == "max" else math.inf)
        elif statuses == {"done"} and trial.mean is not None:
            self.study.tell(each.trial, trial.mean)
        else:
            self.study.tell(each.trial, state=TrialState.FAIL)

    def trials(self) -> list[Trial]:
        """Return the running and finished trials by number, without duplicates."""
        started = [t for t in self._frozen_trials() if t.state != TrialState.WAITING]
        return [self._to_trial(t) for t in started if "duplicate_of" not in t.user_attrs]

    @property
    def num_pending(self) -> int:
        """Return the maximum number of runs that have not started."""
        waiting = sum(len(each.waiting) for each in self._open.values())
        return waiting + len(self._frozen_trials(TrialState.WAITING)) * len(self.plan.repeats)

    @property
    def num_duplicates(self) -> int:
        """Return the number of times that the sampler drew the values of an earlier trial."""
        return sum("duplicate_of" in t.user_attrs for t in self._frozen_trials())

    def _frozen_trials(self, *states: TrialState) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False, states=states or None)

    def _values(self, frozen: FrozenTrial) -> dict[str, str]:
        return {d.key: _from_stored(d, frozen.params[d.key]) for d in self.plan.dimensions if d.key in frozen.params}

    def _to_trial(self, frozen: FrozenTrial) -> Trial:
        outcomes = {
            Repeat.parse(key.removeprefix("run ")): Outcome(**value)
            for key, value in frozen.user_attrs.items()
            if key.startswith("run ")
        }
        return Trial(frozen.number, self._values(frozen), outcomes, frozen.state.is_finished())


def open_study(plan: SweepPlan, folder: Path) -> Study:
    """Open the study of the sweep in `folder`, which the caller has locked: a new one, or the one to resume.

    Raises:
        UserError: the folder contains another sweep, or the storage cannot be opened.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    path, url, identity = folder / SWEEP_FILE, plan.sweep.storage, plan.identity()
    if path.exists():
        stored = read_json(path, "the sweep in this folder cannot be resumed; choose another run_dir")
        _check_same_sweep(stored, identity, folder)
        sweep_id = stored["id"]
    else:
        sweep_id = uuid.uuid4().hex
        write_text(path, json.dumps({"id": sweep_id, **identity}, indent=2, default=str) + "\n")
    # Machines that share a storage identify the sweep by its overrides and data fingerprints, not by paths.
    text = "\n".join([*identity["overrides"], *identity["data"]])
    name = "cnntrain-" + hashlib.sha256(text.encode()).hexdigest()[:12] if url else "sweep"
    try:
        return Study(plan, folder, _open_storage(folder, url), name, sweep_id)
    except (ImportError, OSError, ValueError, *storage_errors(url)) as error:
        raise UserError(storage_problem(plan, folder, error)) from error


def storage_errors(url: str | None) -> tuple[type[Exception], ...]:
    """Return the exceptions that a journal file or the database at `url` may raise."""
    if url is None or "://" not in url:
        return (OptunaError,)
    from sqlalchemy.exc import SQLAlchemyError

    return (OptunaError, SQLAlchemyError)


def storage_problem(plan: SweepPlan, folder: Path, error: Exception) -> str:
    """Format a storage error with the password masked."""
    storage = str(plan.sweep.storage or folder / JOURNAL_FILE)
    masked = mask_passwords(f"sweep.storage={storage}", word=True).partition("=")[2]
    message = (str(error).splitlines() or [type(error).__name__])[0]
    return f"sweep.storage: {masked}: {mask_passwords(message.replace(storage, masked))}"


def _check_same_sweep(stored: Mapping[str, Any], current: Mapping[str, Any], folder: Path) -> None:
    """Compare the content of sweep.json with the command, data and settings of the current sweep.

    Raises:
        UserError: they differ, or the file was not written by a sweep.
    """
    lists = (stored.get(key) for key in ("overrides", "data"))
    if not isinstance(stored.get("id"), str) or not all(isinstance(each, list) for each in lists):
        raise UserError(f"{folder / SWEEP_FILE}: not written by a sweep of this version; choose another run_dir")
    remedy = "use the same settings to continue, or another folder"
    if differing := sorted(set(map(str, stored["overrides"])) ^ set(current["overrides"])):
        raise UserError(
            f"run_dir: {folder} contains a sweep with another command, which differs in {differing[0]}; {remedy}"
        )
    if stored["data"] != current["data"]:
        before, after = (", ".join(map(str, each)) for each in (stored["data"], current["data"]))
        raise UserError(
            f"run_dir: {folder} contains a sweep on other data (count-hash was {before}, is now {after}); results on "
            "different data cannot be ranked together; choose another folder"
        )
    before = stored.get("settings") or {}
    after = json.loads(json.dumps(current["settings"], default=str))
    for key in after:
        if key in before and before[key] != after[key]:  # a key that is new in this version is not compared
            raise UserError(
                f"run_dir: {folder} contains a sweep with other settings: {key} was {before[key]}, is now "
                f"{after[key]}; {remedy}"
            )


def _open_storage(folder: Path, url: str | None) -> BaseStorage:
    if url is not None:
        return RDBStorage(url) if "://" in url else JournalStorage(JournalFileBackend(url))
    path = folder / JOURNAL_FILE
    # Remove an incomplete last line, left by a kill during a write: Optuna would append the next record to it.
    with contextlib.suppress(FileNotFoundError):
        content = read_bytes(path, max_bytes=2**40)
        complete = content.rfind(b"\n") + 1
        if complete < len(content):
            write_atomic(path, content[:complete])
    return JournalStorage(JournalFileBackend(str(path), _FileLock(path)))  # pyright: ignore[reportArgumentType]


class _FileLock:
    """A lock on the journal that the system releases if its process dies. Optuna's own lock would remain for 30 s."""

    def __init__(self, path: Path) -> None:
        self.path = path.with_suffix(".lock")

    def acquire(self) -> bool:
        self.file = open_lock(self.path)
        fcntl.flock(self.file, fcntl.LOCK_EX)
        return True

    def release(self) -> None:
        self.file.close()


def _sampler(plan: SweepPlan, number: int) -> optuna.samplers.BaseSampler:
    """Return a sampler whose draws for a trial are a function of the sweep's seed and the trial's number."""
    seed = hash_seed(plan.sweep.seed, "sweep", number) % 2**32
    if plan.sweep.sampler == "tpe":
        return optuna.samplers.TPESampler(n_startup_trials=min(10, max(2, plan.num_trials // 3)), seed=seed)
    return optuna.samplers.RandomSampler(seed=seed)


def _pruner(plan: SweepPlan) -> optuna.pruners.BasePruner:
    epochs = 0 if plan.base.steps else plan.base.epochs  # 0: unknown
    match plan.sweep.pruner:
        case "median":
            # Only after a third of the training, because a run that learns slowly at first may still become the best.
            return optuna.pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=max(1, epochs // 3))
        case "asha":
            return optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=3)
        case "hyperband":
            return optuna.pruners.HyperbandPruner(1, epochs or "auto", reduction_factor=3)
    return optuna.pruners.NopPruner()


def _suggest(trial: optuna.Trial, dimension: SearchDimension) -> str:
    """Return the trial's value of a dimension, drawn or enqueued; further calls return the same value."""
    key, low, high, step, log = dimension.key, dimension.low, dimension.high, dimension.step, dimension.log
    if low is None or high is None:
        return trial.suggest_categorical(key, dimension.values)
    if dimension.integer:
        number: float = trial.suggest_int(key, int(low), int(high), step=int(step or 1), log=log)
    else:
        number = trial.suggest_float(key, low, high, step=step, log=log)
    return _from_stored(dimension, number)


def _from_stored(dimension: SearchDimension, stored: Any) -> str:
    """Format a parameter of Optuna as on the command line."""
    if dimension.low is None:
        return str(stored)
    if not dimension.values:
        return dimension.text(stored)
    return min(dimension.values, key=lambda value: abs(float(value) - stored))


def _to_stored(dimension: SearchDimension, value: str) -> str | float:
    """Convert a value on the command line to a parameter of Optuna."""
    if dimension.low is None:
        return value
    return int(value) if dimension.integer else float(value)
