"""The trials of a sweep in Optuna's storage. Every outcome is stored before anything else happens."""

import math
import time
from dataclasses import asdict, dataclass, field
from typing import Any

import optuna
from optuna.exceptions import DuplicatedStudyError
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from cnntrain.randomness import hash_seed
from cnntrain.sweep.plan import Repeat, SweepPlan
from cnntrain.sweep.search_space import SearchDimension

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
    """A setting and its finished runs by repeat.

    Attributes:
        is_finished: whether all of its runs have finished.
    """

    number: int
    values: dict[str, str]
    outcomes: dict[Repeat, Outcome]
    is_finished: bool = False


class Study:
    """The trials of a sweep: waiting, running and finished.

    Args:
        plan: the trials to enqueue if the storage is empty.
        name: name of the study in the storage.
        owner: id of the sweep; marks its running trials if several sweeps share a storage.
        epochs: epochs of each run, for the pruner; None: unknown.
    """

    def __init__(self, plan: SweepPlan, storage: BaseStorage, name: str, owner: str, epochs: int | None) -> None:
        self.plan, self.storage, self.owner = plan, storage, owner
        direction = "minimize" if plan.monitor and plan.monitor[1] == "min" else "maximize"
        arguments = {"study_name": name, "storage": storage, "pruner": _pruner(plan.sweep.pruner, epochs)}
        try:
            self.study = optuna.create_study(direction=direction, **arguments)
            self.study.set_user_attr("laid out by", owner)
        except DuplicatedStudyError:
            self.study = optuna.load_study(**arguments)
        if plan.sweep.storage is None or self.study.user_attrs.get("laid out by") == owner:
            self._enqueue_trials()
        else:
            self._wait_until_enqueued()
        self._running: dict[int, optuna.Trial] = {}
        # In a storage that is not shared, trials without an owner belong to this sweep too: it may have been killed
        # before it stored the owner.
        owners = (owner, None) if plan.sweep.storage is None else (owner,)
        running = self._frozen_trials(TrialState.RUNNING)
        self._interrupted = [trial for trial in running if trial.user_attrs.get("owner") in owners]

    def _enqueue_trials(self) -> None:
        """Store all trials as waiting, so that machines that share the storage take each one once."""
        settings = self.plan.grid()
        for number in range(len(self._frozen_trials()), self.plan.num_trials):
            values = settings[number] if settings is not None else {}
            self.study.enqueue_trial({d.key: _to_stored(d, values[d.key]) for d in self.plan.dimensions if values})
        self.study.set_user_attr("ready", True)

    def _wait_until_enqueued(self) -> None:
        """Wait until the machine that created the study has enqueued the trials."""
        deadline = time.monotonic() + ENQUEUE_TIMEOUT_S
        while not self.study.user_attrs.get("ready") and time.monotonic() < deadline:
            time.sleep(0.2)

    def next_trial(self) -> Trial | None:
        """Return the next trial, interrupted ones first; None if no trial is waiting.

        A setting that the sampler draws again is not trained again. Its earlier value is stored again, and another
        setting is drawn. The number of additional draws is limited to the number of trials.
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
                self._running[trial.number] = trial
                return self._to_trial(self._frozen_trials()[trial.number])
            trial.set_user_attr("same as", original.number)
            value = original.value if original.state == TrialState.COMPLETE else None
            self.study.tell(trial, value, TrialState.FAIL if value is None else None)
            duplicates = self.num_duplicates
            wanted = min(self.plan.num_trials, math.prod(d.size for d in self.plan.dimensions))
            if duplicates <= self.plan.num_trials and len(self._frozen_trials()) - duplicates < wanted:
                self.study.enqueue_trial({})

    def should_prune(self, number: int, epoch: int, value: float) -> bool:
        """Store a trial's metric after an epoch (from 1) and return True if the trial should be pruned."""
        trial = self._running[number]
        if epoch not in self._frozen_trials()[number].intermediate_values:
            trial.report(value, epoch)
        return trial.should_prune()

    def record(self, number: int, repeat: Repeat, outcome: Outcome) -> None:
        """Store the outcome of a run, which is then never executed again."""
        self._running[number].set_user_attr(f"run {repeat}", _outcome_to_json(outcome))

    def finish(self, number: int) -> None:
        """Store the value of a trial: the mean over its runs, or the worst possible value if a run diverged."""
        frozen, trial = self._running.pop(number), self._to_trial(self._frozen_trials()[number])
        statuses = {outcome.status for outcome in trial.outcomes.values()}
        value = mean_value(trial)
        if "pruned" in statuses:
            self.study.tell(frozen, state=TrialState.PRUNED)
        elif "diverged" in statuses and self.plan.monitor:
            self.study.tell(frozen, -math.inf if self.plan.monitor[1] == "max" else math.inf)
        elif statuses == {"done"} and value is not None:
            self.study.tell(frozen, value)
        else:
            self.study.tell(frozen, state=TrialState.FAIL)

    def trials(self) -> list[Trial]:
        """Return the running and finished trials by number, without duplicates."""
        started = [t for t in self._frozen_trials() if t.state != TrialState.WAITING]
        return [self._to_trial(t) for t in started if "same as" not in t.user_attrs]

    @property
    def num_waiting(self) -> int:
        """Number of trials that have not started."""
        return len(self._frozen_trials(TrialState.WAITING))

    @property
    def num_duplicates(self) -> int:
        """Number of times that the sampler drew a setting again."""
        return sum("same as" in t.user_attrs for t in self._frozen_trials())

    def _frozen_trials(self, *states: TrialState) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False, states=states or None)

    def _values(self, frozen: FrozenTrial) -> dict[str, str]:
        return {d.key: _from_stored(d, frozen.params[d.key]) for d in self.plan.dimensions if d.key in frozen.params}

    def _to_trial(self, frozen: FrozenTrial) -> Trial:
        outcomes = {
            Repeat.parse(key.removeprefix("run ")): _outcome_from_json(value)
            for key, value in frozen.user_attrs.items()
            if key.startswith("run ")
        }
        return Trial(frozen.number, self._values(frozen), outcomes, frozen.state.is_finished())


def _outcome_to_json(outcome: Outcome) -> dict[str, Any]:
    """Convert an outcome for the storage, where its metrics are called `figures`."""
    values = asdict(outcome)
    return {("figures" if key == "metrics" else key): value for key, value in values.items()}


def _outcome_from_json(values: dict[str, Any]) -> Outcome:
    return Outcome(**{("metrics" if key == "figures" else key): value for key, value in values.items()})


def mean_value(trial: Trial) -> float | None:
    """Return the mean metric of a trial's completed runs; None if there is none."""
    values = [o.value for o in trial.outcomes.values() if o.status == "done" and o.value is not None]
    return sum(values) / len(values) if values else None


def _sampler(plan: SweepPlan, number: int) -> optuna.samplers.BaseSampler:
    """Return a sampler whose draws for a trial are a function of the sweep's seed and the trial's number."""
    seed = hash_seed(plan.sweep.seed, "sweep", number) % 2**32
    if plan.sweep.sampler == "tpe":
        return optuna.samplers.TPESampler(n_startup_trials=min(10, max(2, plan.num_trials // 3)), seed=seed)
    return optuna.samplers.RandomSampler(seed=seed)


def _pruner(name: str, epochs: int | None) -> optuna.pruners.BasePruner:
    if name == "median":
        # Only after a third of the training, because a run that learns slowly at first may still become the best.
        return optuna.pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=max(1, (epochs or 0) // 3))
    if name == "asha":
        return optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=3)
    if name == "hyperband":
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
