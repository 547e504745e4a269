"""Device, precision and memory layout of a run, and process-wide settings of torch."""

import contextlib
import functools
import importlib.util
import logging
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FunctionType
from typing import Any
from unittest import mock

import torch
import torch._decomp.decompositions
import torch._refs.nn.functional
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from cnntrain.data.parallel import usable_cores
from cnntrain.errors import MachineError, UserError
from cnntrain.models.modify import make_pooling_deterministic
from cnntrain.train.distributed import SINGLE, World

log = logging.getLogger("cnntrain")


@dataclass(frozen=True)
class Compute:
    """Where and how to compute: the device, the ranks, and the options that change speed or precision.

    Attributes:
        precision: dtype of the forward pass, one of fp32, bf16, fp16.
        channels_last: memory layout of images and 4-D weights.
        compile: "off" or a mode of torch.compile.
    """

    device: torch.device
    precision: str
    channels_last: bool
    world: World = SINGLE
    compile: str = "off"

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def place(self, model: nn.Module) -> None:
        """Move a model to the device in place, set its memory layout, and compile it if configured.

        Parameters, their names and the state dict stay the same.
        """
        model.to(self.device).to(memory_format=self.memory_format)
        if torch.are_deterministic_algorithms_enabled() and self.device.type == "cuda":
            make_pooling_deterministic(model)
        if self.compile != "off":
            if missing := missing_for_compiling(self.device):
                raise MachineError(f"compile: {self.compile} needs {missing}, which was not found; use compile=off")
            torch.compiler.reset()  # discard what an earlier run in this process compiled
            model.compile(mode=self.compile)

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        if self.precision == "fp32":
            return contextlib.nullcontext()
        dtype = torch.bfloat16 if self.precision == "bf16" else torch.float16
        return torch.autocast(self.device.type, dtype)

    def loss_scaler(self) -> torch.amp.GradScaler | None:
        return torch.amp.GradScaler(self.device.type) if self.precision == "fp16" else None


def choose_compute(
    device: str, precision: str, channels_last: bool, world: World = SINGLE, compile: str = "off"
) -> Compute:
    """Resolve `auto` values; with several ranks each gets its own GPU."""
    chosen = _choose_device(device)
    if precision == "auto":
        precision = _fast_precision(chosen)
    if precision == "fp16" and chosen.type != "cuda":
        raise UserError(f"precision: fp16 needs a CUDA device, this is {chosen}; use bf16, fp32 or auto")
    if world.size > 1 and chosen.type == "cuda":
        chosen = select_gpu(world.local_rank)
    if chosen.type == "cuda" and chosen.index is not None:
        torch.cuda.set_device(chosen)  # default device for streams, cuBLAS and libraries
    return Compute(chosen, precision, channels_last, world, compile)


def missing_for_compiling(device: torch.device) -> str | None:
    """Return the missing requirement of `torch.compile` on this device; None if it is complete.

    On CPUs it generates C++ code. On CUDA it generates Triton code, whose launchers need a C compiler.
    """
    if device.type == "cuda":
        if importlib.util.find_spec("triton") is None:
            return "Triton"
        compilers = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
        return None if any(map(shutil.which, compilers)) else f"a C compiler ({' or '.join(compilers)})"
    compiler = os.environ.get("CXX", "g++")
    return None if shutil.which(compiler) else f"a C++ compiler ({compiler})"


def select_gpu(local_rank: int) -> torch.device:
    """Return the GPU of a rank. If each rank sees only one GPU (`srun --gpus-per-task=1`), its index is always 0."""
    return torch.device("cuda", local_rank if torch.cuda.device_count() > 1 else 0)


def _choose_device(name: str) -> torch.device:
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps") if torch.backends.mps.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"device: {name!r} is not one of auto, cpu, cuda, cuda:N, mps") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device: {name!r} does not exist ({torch.cuda.device_count()} CUDA devices); use device=auto")
    if device.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"device: {name!r} is not one of auto, cpu, cuda, cuda:N, mps")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("device: 'mps' does not exist; use device=auto")
    return device


def _fast_precision(device: torch.device) -> str:
    """Return the fastest precision: bf16 on recent GPUs and CPUs, fp16 on GPUs before Ampere, else fp32."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device)[0] >= 8 else "fp16"
    if device.type == "cpu":
        has = (getattr(torch.cpu, f"_is_{feature}_supported", None) for feature in ("avx512_bf16", "amx_tile"))
        return "bf16" if any(ask is not None and ask() for ask in has) else "fp32"
    return "fp32"


def skip_dynamo_import() -> None:
    """Let eager mode run without importing torch._dynamo, which takes longer than the rest of the start of a run.

    Many Python functions of torch import it in their first call, only to exclude themselves from compilation. Most look
    for the attribute `__dynamo_disable` first, which is set here. `Optimizer.step` imports it to insert graph breaks;
    it is replaced by a version without them. `torch.compile` of a network is not affected. If a version of torch does
    this in another way, only the saved time is lost, and a test fails.
    """
    if "torch._dynamo" in sys.modules:
        return
    owners = (Optimizer, DistributedDataParallel, torch._refs, torch._refs.nn.functional, torch._decomp.decompositions)
    for function in (value for owner in owners for value in vars(owner).values()):
        while isinstance(function, FunctionType):
            variables = function.__code__.co_freevars
            if function.__globals__["__name__"] == "torch._compile" and "fn" in variables:
                disabled = (function.__closure__ or ())[variables.index("fn")].cell_contents
                vars(disabled).setdefault("__dynamo_disable", disabled)
            function = getattr(function, "__wrapped__", None)
    for cls in vars(torch.optim).values():
        step = vars(cls).get("step") if isinstance(cls, type) and issubclass(cls, Optimizer) else None
        if isinstance(step, FunctionType) and step.__code__.co_name == "_use_grad":
            cls.step = _set_grad_mode(vars(step)["__wrapped__"])


def _set_grad_mode(step: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `Optimizer.step` as torch does: gradients are enabled only if the optimizer is differentiable."""

    @functools.wraps(step)
    def wrapper(self: Optimizer, *args: Any, **kwargs: Any) -> Any:
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            return step(self, *args, **kwargs)

    return wrapper


def prepare_torch(threads: int | None, deterministic: bool, world: World = SINGLE) -> None:
    """Set process-wide options: CPU threads, determinism, TF32, and flushing of subnormal numbers on CPUs.

    CUDA computes fp32 products in TF32 unless `deterministic` is set. With `deterministic`, an operation without a
    deterministic kernel gives a warning instead of an error.

    Subnormal numbers are flushed to zero because CPUs compute with them about 100 times slower. When the gradient of a
    weight becomes zero (dead units), the moment estimates of an optimizer decay until they are subnormal: after 700
    steps of lenet5 the optimizer step was 2.6 times slower. The option applies to the calling thread and to threads
    that torch starts afterwards.
    """
    skip_dynamo_import()
    torch.set_flush_denormal(True)
    # NumPy before 2.4 warns that the smallest subnormal is zero.
    warnings.filterwarnings("ignore", "The value of the smallest subnormal")
    if deterministic:  # must be set before the first kernel (cuBLAS documentation, section 2.1.4)
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if threads is None and world.size > 1:
        threads = max(1, usable_cores() // world.local_size)
    if threads is not None:
        torch.set_num_threads(threads)
    _use_deterministic_algorithms(deterministic, warn_only=deterministic)
    torch.backends.cudnn.deterministic = deterministic
    torch.backends.cudnn.benchmark = not deterministic
    torch.backends.cudnn.allow_tf32 = not deterministic
    torch.set_float32_matmul_precision("highest" if deterministic else "high")


@contextlib.contextmanager
def preserve_process_settings() -> Iterator[None]:
    """Restore process-wide settings at the end: torch's flags and random state, warning filters, environment."""
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    cudnn = {name: getattr(torch.backends.cudnn, name) for name in ("deterministic", "benchmark", "allow_tf32")}
    flushes = not bool(torch.tensor(1e-310, dtype=torch.float64) * 1)  # torch has no getter
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    current = torch.cuda.current_device() if devices else 0  # CUDA's default device
    try:
        with torch.random.fork_rng(devices), warnings.catch_warnings(), mock.patch.dict(os.environ):
            yield
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)
        torch.set_flush_denormal(flushes)
        for name, value in cudnn.items():
            setattr(torch.backends.cudnn, name, value)
        if torch.cuda.is_initialized():
            torch.cuda.set_device(current)
        _use_deterministic_algorithms(deterministic, warn_only)


def _use_deterministic_algorithms(on: bool, warn_only: bool) -> None:
    now = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    if now != (on, warn_only):  # skip if unchanged: the call imports the compiler, which takes seconds
        torch.use_deterministic_algorithms(on, warn_only=warn_only)


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """Disable TensorFloat-32 on CUDA inside the context, so that float32 products have full precision."""
    products, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(products)
        torch.backends.cudnn.allow_tf32 = convolutions
