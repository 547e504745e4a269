"""Tables of `cnntrain bench`: speed of each setting, time per part of a step, and recommended overrides."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

MIN_SPEEDUP = 1.03  # smaller speedups are within the variation of the timings
DESCRIPTIONS = {
    "step": "forward, backward, optimizer step",
    "metrics": "metrics, gradient norm, check for non-finite values, average of the weights",
    "logging": "progress bar, TensorBoard",
    "augment": "normalize and augment the batch",
    "transfer": "copy the images to the device",
    "data": "load the batch: from the cache, or wait for workers",
}


@dataclass(frozen=True)
class Speed:
    """Measurements of one setting; None if not measured.

    Attributes:
        loop: images/s of the training loop.
        bare: images/s of the bare step (forward, backward, optimizer step) on a batch that is on the device.
        peak_mib: peak memory in MiB.
        clean, windows: number of pairs of timing windows without load from other processes, and of all pairs.
        note: reason for a missing value.
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
        """The overrides of this setting for the command line."""
        return {
            "precision": self.precision,
            "channels_last": str(self.channels_last).lower(),
            "compile": self.compile,
            "batch_size": str(self.batch_size),
        }


def speed_rows(speeds: Sequence[Speed]) -> list[dict[str, object]]:
    """Return one row per setting; the configured one is first."""
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
    """Return the time per part of a step, and the total in the last row.

    Args:
        seconds_per_image: cumulative times, each with one part more than the one before; see `StepTimer.parts`. The
            difference may be slightly negative because of noise.
        images: number of images per step.
    """
    total = list(seconds_per_image.values())[-1]
    rows, before = [], 0.0
    for name, seconds in seconds_per_image.items():
        added = seconds - before
        rows.append(
            {
                "part": name,
                "ms per step": added * images * 1000,
                "share": added / total,
                "description": DESCRIPTIONS[name],
            }
        )
        before = seconds
    return [*rows, {"part": "total", "ms per step": total * images * 1000, "share": 1.0, "description": ""}]


def recommend(speeds: Sequence[Speed]) -> str:
    """Return the recommended overrides; the first of `speeds` is the configured setting."""
    configured = speeds[0]
    if configured.loop is None:
        return "no recommendation: the configured setting could not be timed"
    measured = [speed for speed in speeds if speed.loop is not None]
    if len(measured) == 1:
        return "no recommendation: only the configured setting could be timed"
    same = max((s for s in measured if s.batch_size == configured.batch_size), key=lambda s: s.loop or 0)
    speedup = (same.loop or 0) / configured.loop
    if speedup < MIN_SPEEDUP:
        same = configured
        text = "keep precision, channels_last and compile: no other setting is noticeably faster"
    else:
        text = f"use {_changes(configured, same)}: {speedup:.2f} times the images/s"
    best = max(measured, key=lambda s: s.loop or 0)
    further = (best.loop or 0) / (same.loop or 1)
    if best.batch_size != configured.batch_size and further >= MIN_SPEEDUP:
        text += (
            f"\n{_changes(same, best)} gives another factor of {further:.2f}, but changes the training: "
            "find optimizer.lr again"
        )
    return text


def _changes(before: Speed, after: Speed) -> str:
    return " ".join(f"{k}={v}" for k, v in after.overrides.items() if v != before.overrides[k])


def load_line(clean: int, windows: int, max_other_cores: float) -> str:
    """Describe the load from other processes during the measurement."""
    if clean == windows:
        return f"no load from other processes in {windows} timing windows"
    return (
        f"other processes used CPU time in {windows - clean} of {windows} timing windows (up to {max_other_cores:.1f} "
        "cores); these windows are ignored where possible, and the speeds may be too low"
    )
