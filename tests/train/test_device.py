"""Settings of the whole process; device, precision and compilation."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from cnntrain import compose, train
from cnntrain.errors import DivergedError, MachineError, explain_machine, is_out_of_memory
from cnntrain.report.console import explain_warning
from cnntrain.train import checkpoint
from cnntrain.train.device import choose_compute, missing_for_compiling, prepare_torch, preserve_process_settings
from cnntrain.transfer import free_bytes
from tests.simulated_cuda import simulated_cuda

CODE = """
import sys
import torch
from cnntrain import compose
from cnntrain.commands.train import train

train(compose("epochs=1", "limit_batches=2", "threads=2", f"run_dir={sys.argv[1]}"), test=False)
print("subnormal:", (torch.full((1_000_000,), 1e-30) * 1e-10).count_nonzero().item())
"""


@pytest.mark.slow
def test_no_thread_computes_subnormal_numbers(tmp_path: Path) -> None:
    """Threads that exist before the option is set keep their old setting, so there must be none."""
    command = [sys.executable, "-c", CODE, str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "subnormal: 0\n" in done.stdout


def test_a_numbered_gpu_becomes_the_current_device() -> None:
    """Streams, cuBLAS handles and libraries that are given no device use the current one."""
    with simulated_cuda():
        torch.cuda.device_count.return_value = 2
        assert choose_compute("cuda:1", "auto", True).device == torch.device("cuda", 1)
        torch.cuda.set_device.assert_called_once_with(torch.device("cuda", 1))
        torch.cuda.set_device.reset_mock()
        choose_compute("cuda", "auto", True)
        choose_compute("cpu", "auto", True)
        torch.cuda.set_device.assert_not_called()


@pytest.mark.parametrize(
    ("device", "environment", "there", "missing"),
    [
        ("cpu", {}, {"g++"}, None),
        ("cpu", {}, {"gcc"}, "C++"),
        ("cpu", {"CXX": "icpx"}, {"icpx"}, None),
        ("cuda", {}, {"gcc", "triton"}, None),
        ("cuda", {}, {"clang", "triton"}, None),
        ("cuda", {}, {"g++", "triton"}, "C compiler"),
        ("cuda", {"CC": "icx"}, {"gcc", "triton"}, "icx"),
        ("cuda", {}, {"gcc"}, "Triton"),
    ],
)
def test_missing_compilers_are_named(
    device: str, environment: dict[str, str], there: set[str], missing: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("shutil.which", lambda name: name if name in there else None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name if name in there else None)
    found = missing_for_compiling(torch.device(device))
    assert found is None if missing is None else missing in str(found)


@pytest.fixture
def strict_host() -> Iterator[None]:
    with preserve_process_settings():
        yield


@pytest.mark.usefixtures("strict_host")
def test_an_operation_without_a_deterministic_kernel_gives_a_warning() -> None:
    prepare_torch(threads=None, deterministic=True)
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.is_deterministic_algorithms_warn_only_enabled()
    assert not torch.backends.cudnn.allow_tf32
    assert torch.get_float32_matmul_precision() == "highest"
    prepare_torch(threads=None, deterministic=False)
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.backends.cudnn.allow_tf32


def test_the_warning_names_the_setting() -> None:
    torch_says = (
        "cumsum_cuda_kernel does not have a deterministic implementation, but you set "
        "'torch.use_deterministic_algorithms(True, warn_only=True)'. You can file an issue"
    )
    assert explain_warning(torch_says).startswith("deterministic=true: cumsum_cuda_kernel ")
    assert explain_warning("another warning") == "another warning"


def test_memory_in_torchs_cache_counts_as_free() -> None:
    with simulated_cuda(free_bytes=5 << 30):
        torch.cuda.memory_reserved.return_value = 3 << 30
        torch.cuda.memory_allocated.return_value = 1 << 30
        assert free_bytes(torch.device("cuda", 0)) == 7 << 30


def test_pooling_is_replaced_by_a_deterministic_one_only_on_cuda() -> None:
    for device, replaced in (("cpu", False), ("cuda", True)):
        with simulated_cuda(), preserve_process_settings():
            prepare_torch(threads=None, deterministic=True)
            model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.AdaptiveAvgPool2d(2))
            choose_compute(device, "fp32", False).place(model)
            assert ("forward" in vars(model[1])) == replaced


@pytest.mark.parametrize(
    ("text", "memory"),
    [
        ("CUDA out of memory. Tried to allocate 20.00 MiB", True),
        ("CUDA error: out of memory", True),
        ("cuDNN error: CUDNN_STATUS_ALLOC_FAILED", True),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
        ("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`", True),
        ("CUDA error: an illegal memory access was encountered", False),
        ("mat1 and mat2 shapes cannot be multiplied", False),
    ],
)
def test_failed_cuda_allocations_count_as_out_of_memory(text: str, memory: bool) -> None:
    assert is_out_of_memory(RuntimeError(text)) == memory
    assert (explain_machine(RuntimeError(text)) is not None) == memory


SKIP_DYNAMO = """
import sys
import torch
from cnntrain.train.device import skip_dynamo_import

if sys.argv[1] == "skip":
    skip_dynamo_import()
torch.manual_seed(0)
for make in (
    torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop, torch.optim.Adagrad, torch.optim.NAdam,
):
    net = torch.nn.Linear(3, 2)
    optimizer = make([{"params": [net.weight]}], lr=0.1)
    optimizer.add_param_group({"params": [net.bias], "lr": 0.01})
    grad_modes = []
    optimizer.register_step_post_hook(lambda *_: grad_modes.append(torch.is_grad_enabled()))
    for _ in range(3):
        optimizer.zero_grad()
        net(torch.ones(4, 3)).square().sum().backward()
        closure_value = optimizer.step(lambda: torch.ones((), requires_grad=True).mul(2).requires_grad)
    optimizer.load_state_dict(optimizer.state_dict())
    print(make.__name__, net.weight.tolist(), net.bias.tolist(), grad_modes, closure_value, net.weight.requires_grad)
linear = torch.nn.Linear(3, 2, device="meta")
print(torch.relu(linear(torch.empty(4, 3, device="meta"))).shape)
print("dynamo imported:", "torch._dynamo" in sys.modules)
"""
COMPILE = """
compiled = torch.compile(torch.nn.Linear(3, 2), backend="eager")
print(compiled(torch.ones(1, 3)).shape, "torch._dynamo" in sys.modules)
"""


def run_code(code: str, argument: str) -> str:
    return subprocess.run([sys.executable, "-c", code, argument], capture_output=True, text=True, check=True).stdout


def test_skip_dynamo_import_still_works_with_this_version_of_torch() -> None:
    """If this fails after an update of torch: adapt `skip_dynamo_import`, or each run starts 1.7 s later."""
    assert "dynamo imported: False" in run_code(SKIP_DYNAMO, "skip")


@pytest.mark.slow
def test_skip_dynamo_import_does_not_change_results_and_compiling_still_works() -> None:
    unchanged, skipped = (run_code(SKIP_DYNAMO + COMPILE, mode) for mode in ("import", "skip"))
    assert "dynamo imported: True" in unchanged
    assert skipped == unchanged.replace("dynamo imported: True", "dynamo imported: False")


FEW = "model=lenet5 data.limit=200 epochs=1 batch_size=32 limit_batches=4 threads=1 log.figures=false".split()

NEEDS_COMPILER = pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="no C++ compiler here")


def test_a_missing_compiler_is_an_error_before_the_first_step(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(MachineError, match=r"compile: default needs a C\+\+ compiler.*use compile=off"):
        train(compose(*FEW, "compile=default", f"run_dir={tmp_path}/run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("written", ["off", "false"])
def test_off_compiles_nothing(written: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """YAML reads an unquoted `off` as false."""
    monkeypatch.setattr(torch.nn.Module, "compile", lambda *_, **__: pytest.fail("compiled"))
    settings = compose(*FEW, f"compile={written}", f"run_dir={tmp_path}/run")
    assert settings.compile == "off"
    train(settings)


@pytest.mark.slow
@NEEDS_COMPILER
def test_a_compiled_run_equals_an_eager_run(tmp_path: Path) -> None:
    from torch._dynamo.utils import counters

    plain = train(compose(*FEW, f"run_dir={tmp_path}/plain"))
    counters.clear()
    compiled = train(compose(*FEW, "compile=default", f"run_dir={tmp_path}/compiled"))
    assert counters["stats"]["unique_graphs"] > 0
    assert compiled["best"]["train/loss"] == pytest.approx(plain["best"]["train/loss"], rel=1e-4)
    one, other = (
        checkpoint.load(tmp_path / run / "checkpoints" / "last.pt")["state"]["model"] for run in ("plain", "compiled")
    )
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(other[name], one[name], rtol=1e-3, atol=1e-4)
    on = train(compose(*FEW, "epochs=2", f"run_dir={tmp_path}/compiled", "resume=auto"))
    assert on["epochs"] == 2


@pytest.mark.slow
@NEEDS_COMPILER
def test_a_compiled_run_that_diverges_names_the_layer(tmp_path: Path) -> None:
    """Compiled code ignores hooks, so the eager network is replayed."""
    with pytest.raises(DivergedError, match=r"first not finite: the (activation|gradient)") as plain:
        train(compose(*FEW, "optimizer.lr=1e30", f"run_dir={tmp_path}/plain"))
    with pytest.raises(DivergedError) as compiled:
        train(compose(*FEW, "optimizer.lr=1e30", "compile=default", f"run_dir={tmp_path}/compiled"))
    assert str(compiled.value).replace("compiled", "plain") == str(plain.value)
