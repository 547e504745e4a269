"""Items that need Python instead of the command line; run.py starts each in a separate process.

    python probes.py NAME --device cuda --data DATA

A probe prints its result as one line, `RESULT {...}`.
"""

import argparse
import importlib
import importlib.metadata
import json
import os
import subprocess
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

STEPS = 6
DISTRIBUTIONS = """
    torch torchvision simplejpeg hydra-core omegaconf antlr4-python3-runtime tensorboard rich scikit-learn scipy
    matplotlib optuna sqlalchemy alembic numpy pillow
""".split()
MODULES = """
    hydra omegaconf simplejpeg optuna sklearn scipy matplotlib tensorboard rich torchvision cnntrain.cli
""".split()


def print_result(**found: Any) -> None:
    print("RESULT " + json.dumps(found, default=str), flush=True)


def is_cuda(args: argparse.Namespace) -> bool:
    return args.device.startswith("cuda")


def environment(args: argparse.Namespace) -> None:
    """Report the versions of dependencies, missing ones, and properties of the GPU."""
    versions, missing = {}, []
    for name in DISTRIBUTIONS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    for module in MODULES:
        try:
            importlib.import_module(module)
        except Exception as error:
            missing.append(f"{module}: {error!r}")
    found = {"python": sys.version.split()[0], **versions, "cores": len(os.sched_getaffinity(0))}
    if is_cuda(args):
        found["gpu"] = torch.cuda.get_device_name(0)
        found["capability"] = str(torch.cuda.get_device_capability(0))
        found["free_and_total_gib"] = str([round(n / 2**30, 1) for n in torch.cuda.mem_get_info(0)])
        found["cudnn"], found["nccl"] = torch.backends.cudnn.version(), str(torch.cuda.nccl.version())
        found["bf16_tflops"] = _matrix_tflops()
    print_result(ok=not missing, missing=missing, **found)


def _matrix_tflops(side: int = 4096, repeats: int = 10) -> int:
    matrix = torch.randn(side, side, device="cuda", dtype=torch.bfloat16)
    for _ in range(3):
        matrix @ matrix
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(repeats):
        matrix @ matrix
    torch.cuda.synchronize()
    return round(repeats * 2 * side**3 / (time.perf_counter() - started) / 1e12)


class Training:
    """A training before its first step."""

    def __init__(self, words: list[str], device: str) -> None:
        from cnntrain.config.compose import read_settings
        from cnntrain.train.prepare import prepare_training
        from cnntrain.train.setup import build_components

        self.components = components = build_components(read_settings([*words, f"device={device}"], None))
        data = components.load()
        plan, self.state = prepare_training(components, data)
        self.plan = replace(plan, log_every_steps=10**9, total_steps=10**9)
        self.training, self.validation = (
            components.loader(data.train, augmented=True),
            components.loader(data.val),
        )

    def train_epoch(self) -> None:
        from cnntrain.train.loop import Logger, Trainer, train_epoch
        from cnntrain.train.nonfinite import NonFiniteGuard
        from cnntrain.train.signals import StopFlag

        state, components = self.state, self.components
        state.progress.batch = 0
        guard = NonFiniteGuard(
            components.compute.device, state.scaler is not None, lambda batch: RuntimeError(f"batch {batch}")
        )
        trainer = Trainer(components.task, components.pipeline, components.compute, self.plan, self.training)
        train_epoch(trainer, state, components.task.meter(), Logger(), guard, StopFlag())

    def evaluate(self) -> None:
        from cnntrain.train.evaluate import evaluate

        evaluate(self.components, self.state.eval_model, self.validation, self.plan.batch_size, STEPS)

    def close(self) -> None:
        self.training.close()
        self.validation.close()


def _sync_cases(args: argparse.Namespace) -> dict[str, list[str]]:
    fashion = ["data=fashion_mnist", f"data.root={args.data}", "data.limit=2000", "model=fmnist_cnn"]
    faces = ["data=toy_faces", "data.train_count=400"]
    shapes = ["data=toy_shapes", "model=unet_small"]
    fp16 = f"precision={'fp16' if is_cuda(args) else 'fp32'} ema_decay=0.9 clip_grad_norm=1 optimizer=sgd".split()
    cases = {
        "device": fashion,
        "stream": [*fashion, "data.cache=none", "data.workers=1"],
        "host": [*fashion, "data.cache=ram"],
        "fp16, EMA, clipping": [*fashion, *fp16],
        "accumulation": [*fashion, "accumulate=2"],
        "optimizer without fused kernels": [*fashion, "optimizer=torch"],
        "mixup": [*fashion, "augment=mixup_cutmix"],
        "keypoints": [*faces, "augment=[flip,rotation,jitter,blur,noise,random_erasing]"],
        "heat maps": [*faces, "model=unet_small", "task.head=heatmap"],
        "segmentation": [*shapes, "task.loss=ce_dice", "task.class_weights=balanced", "augment=[flip,crop,rotation]"],
    }
    common = [f"limit_batches={STEPS}", "batch_size=32", "log.tensorboard=false"]
    return {name: [*words, *common] for name, words in list(cases.items())[: 2 if args.smoke else None]}


def syncs(args: argparse.Namespace) -> None:
    """Count the host syncs of an epoch of six batches and of a validation by place, after one epoch to warm up.

    A place that occurs once is allowed, because the end of an epoch reads its metrics; one that occurs more often does
    so at each step.
    """
    lines, per_step = [], 0
    for name, words in _sync_cases(args).items():
        try:
            training = Training(words, args.device)
            training.train_epoch()  # creates constants and initializes the libraries
            training.evaluate()
            for region, work in (("train_epoch", training.train_epoch), ("evaluate", training.evaluate)):
                places = _count_syncs(work, is_cuda(args))
                lines += [f"{name}, {region}: x{count} {place}" for place, count in places.items()]
                per_step += sum(count for count in places.values() if count > 1)
            training.close()
        except Exception:
            lines += [f"{name}: failed", *traceback.format_exc().splitlines()[-8:]]
            per_step += 1
    print_result(ok=not per_step, each_step=per_step, found=lines)


def _count_syncs(work: Callable[[], None], cuda: bool) -> Counter[str]:
    """Count the host syncs of `work` by place in cnntrain (innermost first)."""
    places: Counter[str] = Counter()

    def count(message: Any, *rest: Any, **more: Any) -> None:
        if "called a synchronizing" in str(message):
            frames = [frame for frame in traceback.extract_stack() if "/cnntrain/" in frame.filename]
            names = [f"{frame.filename.split('/cnntrain/')[-1]}:{frame.lineno}" for frame in reversed(frames[-4:])]
            places[" < ".join(names)] += 1

    with warnings.catch_warnings(), _sync_debug_mode(cuda):
        warnings.simplefilter("always")
        warnings.showwarning = count
        work()
    return places


@contextmanager
def _sync_debug_mode(cuda: bool) -> Iterator[None]:
    if cuda:
        torch.cuda.set_sync_debug_mode("warn")
    try:
        yield
    finally:
        if cuda:
            torch.cuda.set_sync_debug_mode("default")


def compare(args: argparse.Namespace) -> None:
    """Compare the bits of three checkpoints: of an uninterrupted run, of a repeated one, and of a resumed one."""
    states = [torch.load(path, map_location="cpu", weights_only=True)["state"] for path in args.paths.split(",")]
    whole, repeated, resumed = (dict(_tensors(state)) for state in states)
    of_repeated, of_resumed = _differences(whole, repeated), _differences(whole, resumed)
    print_result(
        ok=not of_repeated and not of_resumed,
        tensors=len(whole),
        repeat_differs=len(of_repeated),
        resumed_differs=len(of_resumed),
        steps=str([state["progress"]["step"] for state in states]),
        names=(of_repeated + of_resumed)[:6],
    )


def _tensors(value: Any, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, dict | list | tuple):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _tensors(part, f"{name}.{key}")


def _differences(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    shared = one.keys() & other.keys()
    return sorted(one.keys() ^ other.keys()) + sorted(k for k in shared if not torch.equal(one[k], other[k]))


def group(args: argparse.Namespace) -> None:
    """Test distributed training as far as a process group of one rank allows."""
    import torch.distributed as dist
    from torch import nn

    from cnntrain.train.distributed import RankInfo, check_replicas_equal, convert_sync_batchnorm, replica_tensors
    from cnntrain.train.process_group import join_process_group

    cuda, device = is_cuda(args), torch.device(args.device)
    info = RankInfo(0, 1, 0, 1, os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    found: dict[str, Any] = {}
    with join_process_group(info, cuda) as world:
        found["backend"] = str(dist.get_backend_config())
        training = Training(
            ["data=digits", "model=batchnorm_cnn", "limit_batches=4", "log.tensorboard=false"], args.device
        )
        spec, pipeline, state = training.components.spec, training.components.pipeline, training.state
        ones = torch.ones(3, 4, device=device)
        world.all_reduce_([ones, torch.arange(5.0, device=device)])
        found["all_reduce"] = bool((ones == 1).all())
        found["all_gather"] = world.all_gather({"a": torch.ones(2)})[0]["a"].tolist()
        found["broadcast"] = world.broadcast("word")
        world.broadcast_(list(replica_tensors(state).values()))
        if cuda:
            state.model = convert_sync_batchnorm(state.model)
            found["sync_norms"] = sum(isinstance(module, nn.SyncBatchNorm) for module in state.model.modules())
        replica = world.replicate(state.model.train())
        for precision in ("fp32", "bf16"):
            images = torch.randn(8, spec.channels, *pipeline.output_size, device=device)
            for sync in (False, True):
                with (
                    world.gradient_sync(replica, sync),
                    torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"),
                ):
                    outputs = replica(images.contiguous(memory_format=torch.channels_last)).float()
                    outputs.square().mean().backward()
            world.sync_step(state.model, torch.ones(2, device=device), torch.zeros((), device=device))
            world.stop.check()
            found[precision] = bool(outputs.isfinite().all())
        found["replicas_equal"] = check_replicas_equal(state, world)
        training.close()
    print_result(ok=all(value is not False for value in found.values()), **found)


def rank(args: argparse.Namespace) -> None:
    """Run one of two processes, which share a GPU and use gloo, because NCCL refuses one GPU twice."""
    import torch.distributed as dist

    from cnntrain import cli
    from cnntrain.commands import train
    from cnntrain.train import device, process_group

    if is_cuda(args):
        init_process_group = dist.init_process_group

        def with_gloo(backend: str, device_id: Any = None, **more: Any) -> None:
            init_process_group("gloo", **more)

        dist.init_process_group = with_gloo
        train.check_launch = lambda *_: None
        device.select_gpu = process_group.select_gpu = lambda rank: torch.device("cuda", 0)
    sys.exit(cli.main(json.loads(args.words)))


def memory(args: argparse.Namespace) -> None:
    """Compare the GPU memory after each of several epochs."""
    training = Training(["data=digits", "model=batchnorm_cnn", "log.tensorboard=false"], args.device)
    allocated_mib = []
    for _ in range(2 if args.smoke else 6):
        training.train_epoch()
        allocated_mib.append(torch.cuda.memory_allocated() / 2**20 if is_cuda(args) else 0)
    print_result(ok=allocated_mib[-1] <= allocated_mib[1] + 1, mib=str([round(each, 1) for each in allocated_mib]))


def full_gpu(args: argparse.Namespace) -> None:
    """Train beside a process that leaves little GPU memory; CUDA, cuDNN and cuBLAS fail in different ways."""
    settings = "model=resnet18 data=fashion_mnist data.limit=4000 batch_size=1024 limit_batches=3 epochs=1 device=cuda"
    command = [sys.executable, "-m", "cnntrain", *settings.split(), f"data.root={args.data}", "log.tensorboard=false"]
    torch.zeros(1, device="cuda")
    codes, lines, ok = {}, [], True
    for free_mib in (1800, 900, 600, 450, 300):
        torch.cuda.empty_cache()
        excess = torch.cuda.mem_get_info()[0] - free_mib * 2**20
        allocation = torch.empty(max(excess, 1), dtype=torch.uint8, device="cuda")
        done = subprocess.run(
            [*command, f"run_dir=full-{free_mib}"], capture_output=True, text=True, timeout=60, check=False
        )
        del allocation
        codes[free_mib] = done.returncode
        output = (done.stdout + done.stderr).splitlines()
        failed = done.returncode not in (0, 4) or any(line.startswith("Traceback") for line in output)
        ok = ok and not failed
        lines += [f"{free_mib} MiB free: exit {done.returncode}: {line}" for line in output[-8 if failed else -1 :]]
    print_result(ok=ok, codes=str(codes), found=lines)


PROBES = (environment, syncs, compare, group, rank, memory, full_gpu)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("probe", choices=[probe.__name__ for probe in PROBES])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--data", default=str(Path.cwd()), help="folder with FashionMNIST/raw")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--paths", help="compare: three checkpoints, separated by commas")
    parser.add_argument("--words", help="rank: the command line as a JSON list")
    args = parser.parse_args()
    next(probe for probe in PROBES if probe.__name__ == args.probe)(args)


if __name__ == "__main__":
    main()
