"""Find the batch size for `batch_size=auto`: the largest that fits on a GPU, the fastest on a CPU."""

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
MIN_STEPS_PER_EPOCH = 16  # training with a few large steps per epoch learns little
GPU_SHARE = 0.9  # of the free GPU memory; the rest is a reserve because memory use varies between steps
CPU_SHARE = 0.25  # of the free host memory, which other programs need too
MIN_SPEEDUP = 1.05  # in images/s, when the batch size doubles on a CPU
SMALLEST_ON_CPU = 32
TRIALS = 3


def choose_batch_size(
    make_step_timer: Callable[[int], StepTimer], device: torch.device, num_images: int, min_size: int = 1
) -> int:
    """Find a power of two by training steps on copies; log the reason.

    On a GPU, return the largest size whose step needs at most 90 % of the free memory. On a CPU, return the smallest
    size of at least 32 for which doubling makes training less than 5 % faster or needs a quarter of the free memory.
    An epoch always has at least 16 steps.

    Args:
        make_step_timer: returns a copy of the training with the given batch size.
        num_images: size of the training set.
        min_size: smallest allowed batch size, 1 or 2 (BatchNorm may need more than one image).

    Raises:
        MachineError: even `min_size` does not fit.
    """
    max_size = max(min_size, power_of_two(num_images // MIN_STEPS_PER_EPOCH))
    if device.type == "cuda":
        allowed_mib = (torch.cuda.memory_allocated(device) + GPU_SHARE * free_bytes(device)) / 2**20
        size, reason = largest_that_fits(
            lambda size: _fits(make_step_timer, device, size, allowed_mib), max_size, min_size
        )
    else:
        size, reason = fastest(lambda size: _images_per_s(make_step_timer, device, size), max_size, min_size)
    log.info("batch_size=auto: using batch_size=%d (%s); optimizer.lr is not changed", size, reason)
    return size


def power_of_two(limit: int) -> int:
    """Return the largest power of two up to `limit`, at least 1."""
    return 1 << (max(limit, 1).bit_length() - 1)


def largest_that_fits(fits: Callable[[int], bool], max_size: int, min_size: int = 1) -> tuple[int, str]:
    """Return the largest power of two from `min_size` to `max_size` that `fits`, and the reason.

    Raises:
        MachineError: `min_size` does not fit.
    """
    size = min_size
    if not fits(size):
        raise MachineError(f"batch_size=auto: a step with batch_size={size} does not fit in the device's memory")
    while size * 2 <= max_size:
        if not fits(size * 2):
            return size, f"{size * 2} does not fit in the device's memory"
        size *= 2
    return size, f"with more, an epoch would have fewer than {MIN_STEPS_PER_EPOCH} steps"


def fastest(images_per_s: Callable[[int], float | None], max_size: int, min_size: int = 1) -> tuple[int, str]:
    """Return the smallest power of two from 32 to `max_size` for which doubling gains less than 5 %, and the reason.

    Smaller sizes are tried if 32 needs too much memory.

    Args:
        images_per_s: returns the speed for a batch size, or None if it needs too much memory.

    Raises:
        MachineError: `min_size` needs too much memory.
    """
    size = max(min_size, min(SMALLEST_ON_CPU, max_size))
    speed = images_per_s(size)
    while speed is None and size > min_size:
        size //= 2
        if (speed := images_per_s(size)) is not None:
            return size, f"{size * 2} needs more than a quarter of the free memory"
    if speed is None:
        raise MachineError(
            f"batch_size=auto: a step with batch_size={size} needs more than a quarter of the free memory"
        )
    while size * 2 <= max_size:
        doubled = images_per_s(size * 2)
        if doubled is None:
            return size, f"{size * 2} needs more than a quarter of the free memory"
        if doubled < MIN_SPEEDUP * speed:
            return size, f"{size * 2} is {doubled / speed:.2f} times as fast"
        size, speed = size * 2, doubled
    return size, f"with more, an epoch would have fewer than {MIN_STEPS_PER_EPOCH} steps"


def _fits(make_step_timer: Callable[[int], StepTimer], device: torch.device, size: int, allowed_mib: float) -> bool:
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


def _images_per_s(make_step_timer: Callable[[int], StepTimer], device: torch.device, size: int) -> float | None:
    """Return the speed of the fastest of a few windows; None if the steps need too much additional memory."""
    free_mib = free_host_bytes() / 2**20
    reset_peak_memory(device)
    before_mib = peak_memory_mib(device)
    timer = make_step_timer(size)
    timer.warm_up()
    if peak_memory_mib(device) - before_mib > CPU_SHARE * free_mib:
        return None
    started, best = time.monotonic(), 0.0
    for _ in range(TRIALS):
        images, seconds = timer.bare()
        best = max(best, images / seconds)
        if time.monotonic() - started > TRIALS:
            break
    return best
