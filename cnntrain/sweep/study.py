"""The memory of a sweep: Optuna's storage, through its ask and tell. What ends is written down before anything else."""

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

READY_S = 30.0  # how long another machine may take to lay out the trials


@dataclass(frozen=True)
class Outcome:
    """How one run ended.

    Attributes:
        status: done, pruned, diverged, failed (it raised), killed (its process died) or stopped (by a signal).
        value: the metric that trials are ranked by; None where it has none.
        figures: results worth a column, by name.
        error: its first line, where it went wrong.
        time_s: seconds that it took.
    """

    status: str
    value: float | None = None
    figures: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    time_s: float = 0.0


@dataclass
class Trial:
    """A setting and its finished runs by repeat. `state` is `running` until all runs have finished."""

    number: int
    values: dict[str, str]
    outcomes: dict[Repeat, Outcome]
    state: str = "running"


class Study:
    """The trials of a sweep: those to come, those under way, those that ended.

    Args:
        plan: what to lay out, where nothing is stored yet.
        storage: where it is kept.
        name: of the study in the storage.
        owner: marks the trials that this sweep's folder holds, where several share a storage.
    """

    def __init__(
        self, plan: SweepPlan, storage: BaseStorage, name: str, owner: str, epochs: int | None
    ) -> None:
        self.plan, self.storage, self.owner = plan, storage, owner
        direction = "minimize" if plan.monitor and plan.monitor[1] == "min" else "maximize"
        arguments = {"study_name": name, "storage": storage, "pruner": _pruner(plan.sweep.pruner, epochs)}
        try:
            self.study = optuna.create_study(direction=direction, **arguments)
            self.study.set_user_attr("laid out by", owner)
        except DuplicatedStudyError:
            self.study = optuna.load_study(**arguments)
        if plan.sweep.storage is None or self.study.user_attrs.get("laid out by") == owner:
            self._lay_out()
        else:
            self._await_layout()
        self._open: dict[int, optuna.Trial] = {}
        # In a storage of its own all are; a kill may have come before the name.
        mine = (owner, None) if plan.sweep.storage is None else (owner,)
        self._unfinished = [t for t in self._trials(TrialState.RUNNING) if t.user_attrs.get("owner") in mine]

    def _lay_out(self) -> None:
        """Put every trial to come into the storage: each is then taken once, by whichever process comes first."""
        settings = self.plan.grid()
        for number in range(len(self._trials()), self.plan.trials):
            values = settings[number] if settings is not None else {}
            self.study.enqueue_trial({a.key: _stored(a, values[a.key]) for a in self.plan.axes if values})
        self.study.set_user_attr("ready", True)

    def _await_layout(self) -> None:
        """Let the machine that came first lay out the trials."""
        deadline = time.monotonic() + READY_S
        while not self.study.user_attrs.get("ready") and time.monotonic() < deadline:
            time.sleep(0.2)

    def ask(self) -> Trial | None:
        """The next trial: first those that were under way when the sweep broke off; None when all have been taken.

        A setting that a sampler draws again is not trained again: its earlier result is told once more, and another is
        drawn instead, at most as often as there are trials.
        """
        while True:
            if self._unfinished:
                frozen = self._unfinished.pop(0)
                study_id = self.storage.get_study_id_from_name(self.study.study_name)
                number = self.storage.get_trial_id_from_study_id_trial_number(study_id, frozen.number)
                asked = optuna.Trial(self.study, number)
            elif waiting := self._trials(TrialState.WAITING):
                self.study.sampler = _sampler(self.plan, waiting[0].number)
                asked = self.study.ask()
                asked.set_user_attr("owner", self.owner)
            else:
                return None
            values = {axis.key: _suggest(asked, axis) for axis in self.plan.axes}
            twin = next(
                (t for t in self._trials() if t.number < asked.number and self._values(t) == values), None
            )
            if twin is None:
                self._open[asked.number] = asked
                return self._trial(self._trials()[asked.number])
            asked.set_user_attr("same as", twin.number)
            known = twin.value if twin.state == TrialState.COMPLETE else None
            self.study.tell(asked, known, TrialState.FAIL if known is None else None)
            wanted = min(self.plan.trials, math.prod(axis.size for axis in self.plan.axes))
            if self.repeats <= self.plan.trials and len(self._trials()) - self.repeats < wanted:
                self.study.enqueue_trial({})

    def report(self, number: int, epoch: int, value: float) -> bool:
        """Note a trial's metric after an epoch (from 1); whether to give the trial up."""
        asked = self._open[number]
        if epoch not in self._trials()[number].intermediate_values:
            asked.report(value, epoch)
        return asked.should_prune()

    def record(self, number: int, repeat: Repeat, outcome: Outcome) -> None:
        """Note how a run ended; it is never run again."""
        self._open[number].set_user_attr(f"run {repeat}", asdict(outcome))

    def finish(self, number: int) -> None:
        """Tell what a trial came to, from its runs: their mean, the worst there is if one diverged."""
        asked, trial = self._open.pop(number), self._trial(self._trials()[number])
        ended = {outcome.status for outcome in trial.outcomes.values()}
        value = mean_value(trial)
        if "pruned" in ended:
            self.study.tell(asked, state=TrialState.PRUNED)
        elif "diverged" in ended and self.plan.monitor:
            self.study.tell(asked, -math.inf if self.plan.monitor[1] == "max" else math.inf)
        elif ended == {"done"} and value is not None:
            self.study.tell(asked, value)
        else:
            self.study.tell(asked, state=TrialState.FAIL)

    def trials(self) -> list[Trial]:
        """All that have begun, by number; without repeats of a setting."""
        begun = [t for t in self._trials() if t.state != TrialState.WAITING]
        return [self._trial(t) for t in begun if "same as" not in t.user_attrs]

    @property
    def waiting(self) -> int:
        """Trials that nobody has begun."""
        return len(self._trials(TrialState.WAITING))

    @property
    def repeats(self) -> int:
        """Settings that were drawn again and not trained again."""
        return sum("same as" in t.user_attrs for t in self._trials())

    def _trials(self, *states: TrialState) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False, states=states or None)

    def _values(self, frozen: FrozenTrial) -> dict[str, str]:
        return {a.key: _shown(a, frozen.params[a.key]) for a in self.plan.axes if a.key in frozen.params}

    def _trial(self, frozen: FrozenTrial) -> Trial:
        outcomes = {
            Repeat.parse(key.removeprefix("run ")): Outcome(**value)
            for key, value in frozen.user_attrs.items()
            if key.startswith("run ")
        }
        state = "ended" if frozen.state.is_finished() else "running"
        return Trial(frozen.number, self._values(frozen), outcomes, state)


def mean_value(trial: Trial) -> float | None:
    """The mean metric of a trial's runs that are done; None where there is none."""
    values = [o.value for o in trial.outcomes.values() if o.status == "done" and o.value is not None]
    return sum(values) / len(values) if values else None


def _sampler(plan: SweepPlan, number: int) -> optuna.samplers.BaseSampler:
    """A sampler whose draws for a trial are a function of the sweep's seed and the trial's number."""
    seed = hash_seed(plan.sweep.seed, "sweep", number) % 2**32
    if plan.sweep.sampler == "tpe":
        return optuna.samplers.TPESampler(n_startup_trials=min(10, max(2, plan.trials // 3)), seed=seed)
    return optuna.samplers.RandomSampler(seed=seed)


def _pruner(name: str, epochs: int | None) -> optuna.pruners.BasePruner:
    if name == "median":
        # Not before a third of the training: what learns slowly at first may end best.
        return optuna.pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=max(1, (epochs or 0) // 3))
    if name == "asha":
        return optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=3)
    if name == "hyperband":
        return optuna.pruners.HyperbandPruner(1, epochs or "auto", reduction_factor=3)
    return optuna.pruners.NopPruner()


def _suggest(trial: optuna.Trial, axis: SearchDimension) -> str:
    """A value of the axis, drawn or as laid out; asked again, the same."""
    if axis.low is None or axis.high is None:
        return trial.suggest_categorical(axis.key, axis.values)
    if axis.whole:
        step = int(axis.step or 1)
        return _shown(
            axis, trial.suggest_int(axis.key, int(axis.low), int(axis.high), step=step, log=axis.log)
        )
    return _shown(axis, trial.suggest_float(axis.key, axis.low, axis.high, step=axis.step, log=axis.log))


def _shown(axis: SearchDimension, stored: Any) -> str:
    """A parameter of Optuna's as on the command line."""
    if axis.low is None:
        return str(stored)
    if not axis.values:
        return axis.text(stored)
    return min(axis.values, key=lambda value: abs(float(value) - stored))


def _stored(axis: SearchDimension, value: str) -> str | float:
    """The other way round."""
    return value if axis.low is None else int(value) if axis.whole else float(value)
