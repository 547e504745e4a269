"""`batch_size=auto`: as many images as fit on a GPU, as many as still make a CPU faster."""

import logging
import time
from collections.abc import Callable

import torch

from cnntrain.errors import MachineError, is_out_of_memory
from cnntrain.memory import free_host_bytes
from cnntrain.train.measurement import peak_memory_mib, reset_peak_memory
from cnntrain.train.step_timer import StepTimer
from cnntrain.transfer import free_bytes

log = logging.getLogger("cnntrain")
FEWEST_STEPS = 16  # of an epoch: a training of a few large steps learns little
SHARE = 0.9  # of the free GPU memory that a step may take: sizes vary a little from step to step
HOST_SHARE = 0.25  # of the free memory of a CPU, which other programs need too; twice that is never taken
GAIN = 1.05  # times the images/s that doubling the batch must bring on a CPU
SMALLEST_ON_CPU = 32
TRIALS = 3


def choose_batch_size(
    make_step_timer: Callable[[int], StepTimer], device: torch.device, images: int, least: int = 1
) -> int:
    """A power of two, found by training steps on copies; the log says why.

    On a GPU the largest whose step takes no more than 90 % of the free memory. On a CPU the smallest of 32 and more
    from which doubling brings less than 5 % more images/s, or takes a quarter of the free memory. With either an epoch
    keeps 16 steps.

    Args:
        make_rig: a copy of the training with batches of that many images.
        images: in the training set.
        least: images that a batch must have, 1 or 2: a BatchNorm may need more than one.

    Raises:
        MachineError: not even the least fits.
    """
    most = max(least, power_of_two(images // FEWEST_STEPS))
    if device.type == "cuda":
        allowed = torch.cuda.memory_allocated(device) + SHARE * free_bytes(device)
        chosen, reason = largest_that_fits(
            lambda size: _fits(make_step_timer, device, size, allowed / 2**20), most, least
        )
    else:
        chosen, reason = fastest(lambda size: _images_per_s(make_step_timer, device, size), most, least)
    log.info("batch_size=auto: %d images, for %s; optimizer.lr stays as it is", chosen, reason)
    return chosen


def power_of_two(limit: int) -> int:
    """The largest power of two up to `limit`; 1 at least."""
    return 1 << (max(limit, 1).bit_length() - 1)


def largest_that_fits(fits: Callable[[int], bool], most: int, least: int = 1) -> tuple[int, str]:
    """The largest power of two from `least` to `most` for which `fits` holds, as it does for all smaller ones; and why.

    Raises:
        MachineError: it does not hold for `least`.
    """
    size = least
    if not fits(size):
        raise MachineError(
            f"batch_size=auto: a step with {size} image(s) does not fit in the device's memory"
        )
    while size * 2 <= most:
        if not fits(size * 2):
            return size, f"{size * 2} do not fit in the device's memory"
        size *= 2
    return size, f"an epoch of larger batches would have fewer than {FEWEST_STEPS} steps"


def fastest(images_per_s: Callable[[int], float | None], most: int, least: int = 1) -> tuple[int, str]:
    """The smallest power of two from 32 to `most` from which doubling gains less than 5 %, or a smaller one where even
    32 take too much; and why.

    Args:
        images_per_s: None for a batch that would take too much memory.

    Raises:
        MachineError: `least` would.
    """
    size = max(least, min(SMALLEST_ON_CPU, most))
    speed = images_per_s(size)
    if speed is None:
        while speed is None and size > least:
            size //= 2
            speed = images_per_s(size)
        if speed is None:
            raise MachineError(
                f"batch_size=auto: a step with {size} image(s) takes over a quarter of the free memory"
            )
        return size, f"{size * 2} take more than a quarter of the free memory"
    while speed is not None and size * 2 <= most:
        doubled = images_per_s(size * 2)
        if doubled is None:
            return size, f"{size * 2} take more than a quarter of the free memory"
        if doubled < GAIN * speed:
            return size, f"{size * 2} would be {doubled / speed:.2f} x as fast"
        size, speed = size * 2, doubled
    return size, f"an epoch of larger batches would have fewer than {FEWEST_STEPS} steps"


def _fits(
    make_step_timer: Callable[[int], StepTimer], device: torch.device, size: int, allowed_mib: float
) -> bool:
    reset_peak_memory(device)
    try:
        make_step_timer(size).warm_up()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return False
    finally:
        torch.cuda.empty_cache()
    return peak_memory_mib(device) <= allowed_mib


def _images_per_s(
    make_step_timer: Callable[[int], StepTimer], device: torch.device, size: int
) -> float | None:
    """Of the best of some steps; None when they take too much memory beyond what was taken before."""
    free_mib = free_host_bytes() / 2**20
    reset_peak_memory(device)
    before = peak_memory_mib(device)
    rig = make_step_timer(size)
    rig.warm_up()
    if peak_memory_mib(device) - before > HOST_SHARE * free_mib:
        return None
    started, best = time.monotonic(), 0.0
    for _ in range(TRIALS):
        images, seconds = rig.bare()
        best = max(best, images / seconds)
        if time.monotonic() - started > TRIALS:
            break
    return best
