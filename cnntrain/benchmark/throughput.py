"""The tables of `cnntrain bench`: how fast each setting is, where the time goes, and what to type."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

NOTICEABLE = 1.03  # times as fast; less is within what timings vary by
MEANING = {
    "step": "forward, backward, optimizer step",
    "metrics": "loss, metrics, gradient norm, divergence guard, average of the weights",
    "logging": "readings: bar, TensorBoard",
    "augment": "normalize and augment the batch",
    "transfer": "images to the device",
    "data": "taking the batch from the store, or waiting for workers",
}


@dataclass(frozen=True)
class Speed:
    """What was measured of one setting; None where it was not.

    Attributes:
        loop, bare: images/s of the training, and of its bare step on a batch that is on the device.
        peak_mib: most memory taken, in MiB.
        clean, windows: pairs of windows in which nobody else took the CPU, and of all that were taken.
        note: why something is missing.
    """

    precision: str
    channels_last: bool
    compile: str
    batch_size: int
    loop: float | None = None
    bare: float | None = None
    peak_mib: float | None = None
    clean: int = 0
    windows: int = 0
    note: str = ""

    @property
    def overrides(self) -> dict[str, str]:
        """What to type for this setting."""
        return {
            "precision": self.precision,
            "channels_last": str(self.channels_last).lower(),
            "compile": self.compile,
            "batch_size": str(self.batch_size),
        }


def speed_rows(speeds: Sequence[Speed]) -> list[dict[str, object]]:
    """One row a setting, the configured one first."""
    fastest = max((s.loop or 0 for s in speeds), default=0)
    rows = []
    for number, speed in enumerate(speeds):
        remarks = [*["configured"] * (number == 0), *["fastest"] * (speed.loop == fastest), speed.note]
        measured = bool(speed.loop and speed.bare)
        rows.append(
            {
                **speed.overrides,
                "images/s": None if speed.loop is None else round(speed.loop),
                "bare step": None if speed.bare is None else round(speed.bare),
                "share": round((speed.loop or 0) / (speed.bare or 1), 3) if measured else None,
                "peak MiB": None if speed.peak_mib is None else round(speed.peak_mib),
                "clean windows": f"{speed.clean} of {speed.windows}" if speed.windows else None,
                "remark": ", ".join(filter(None, remarks)),
            }
        )
    return rows


def part_rows(seconds_per_image: Mapping[str, float], images: int) -> list[dict[str, object]]:
    """Where the time of a step goes; the parts add up to the last row, the whole.

    Args:
        seconds_per_image: with one part more than the one before, up to the whole training; see `StepTimer.parts`. What
            a part adds may be a little below 0: that is noise.
        images: in a step.
    """
    whole = list(seconds_per_image.values())[-1]
    rows, before = [], 0.0
    for name, seconds in seconds_per_image.items():
        added = seconds - before
        rows.append(
            {"part": name, "ms a step": added * images * 1000, "share": added / whole, "what": MEANING[name]}
        )
        before = seconds
    return [*rows, {"part": "total", "ms a step": whole * images * 1000, "share": 1.0, "what": ""}]


def recommend(speeds: Sequence[Speed]) -> str:
    """The overrides to type; `speeds` begins with the configured setting."""
    configured = speeds[0]
    if configured.loop is None:
        return "nothing to recommend: the configured setting could not be timed"
    measured = [speed for speed in speeds if speed.loop is not None]
    if len(measured) == 1:
        return "nothing to compare with: only the configured setting could be timed"
    same = max((s for s in measured if s.batch_size == configured.batch_size), key=lambda s: s.loop or 0)
    gain = (same.loop or 0) / configured.loop
    if gain < NOTICEABLE:
        same, text = (
            configured,
            "keep precision, layout and compile as they are: nothing tried here is noticeably faster",
        )
    else:
        text = f"type {_changes(configured, same)}: {gain:.2f} x the images/s of now"
    best = max(measured, key=lambda s: s.loop or 0)
    more = (best.loop or 0) / (same.loop or 1)
    if best.batch_size != configured.batch_size and more >= NOTICEABLE:
        text += f"\n{_changes(same, best)} gives {more:.2f} x that; it is another training: look for optimizer.lr again"
    return text


def _changes(before: Speed, after: Speed) -> str:
    return " ".join(f"{k}={v}" for k, v in after.overrides.items() if v != before.overrides[k])


def load_line(clean: int, windows: int, busiest: float) -> str:
    """How quiet the machine was."""
    if clean == windows:
        return f"the machine was quiet: {windows} windows, all clean"
    return (
        f"the machine was busy: in {windows - clean} of {windows} windows other processes took CPU time (up to "
        f"{busiest:.1f} cores); these are left out where there are others, and the figures may be too low"
    )
