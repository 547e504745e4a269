"""Windows in which things are timed in turns, and which of them were clean."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from cnntrain.train.cpu_load import BUSY_CORES, others_cores, read_cpu
from cnntrain.train.signals import StopFlag


@dataclass
class Windows:
    """The windows in which one thing was timed.

    Attributes:
        seconds_per_image: of each window.
        others: cores that other processes kept busy in each; None where that can't be known.
    """

    seconds_per_image: list[float] = field(default_factory=list)
    others: list[float | None] = field(default_factory=list)

    def add(self, images: int, seconds: float, others: float | None) -> None:
        self.seconds_per_image.append(seconds / images)
        self.others.append(others)

    @property
    def clean(self) -> list[float]:
        """Seconds an image in the windows in which no other process took more than a tenth of a core."""
        pairs = zip(self.seconds_per_image, self.others, strict=True)
        return [seconds for seconds, others in pairs if others is None or others <= BUSY_CORES]

    @property
    def median(self) -> float:
        """Seconds an image: the median of the clean windows, of all where none is clean."""
        return statistics.median(self.clean or self.seconds_per_image)

    @property
    def images_per_s(self) -> float:
        return 1 / self.median

    @property
    def busiest(self) -> float:
        """The most cores that others kept busy in any window; 0 where that can't be known."""
        return max((others or 0.0 for others in self.others), default=0.0)


def interleave(
    runs: Mapping[str, Callable[[], tuple[int, float]]], rounds: int, ends_at: float, stop: StopFlag
) -> dict[str, Windows]:
    """Each run in turn, up to `rounds` times, and once at least; what disturbs the machine disturbs all alike.

    Args:
        runs: by name; one call is one window, and gives its images and seconds.
        ends_at: time.monotonic() after which no further round begins.
    """
    found = {name: Windows() for name in runs}
    for number in range(rounds):
        if number and time.monotonic() > ends_at:
            break
        for name, run in runs.items():
            stop.check()
            before = read_cpu()
            images, seconds = run()
            found[name].add(images, seconds, others_cores(before, read_cpu()))
    return found
