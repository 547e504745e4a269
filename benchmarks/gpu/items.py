"""The items of the GPU report, one function each.

An item takes the harness and returns a dictionary: `ok`, figures, and lists of lines in `found`, `warnings` and `tail`.
"""

import json
import re
import shutil
import subprocess
import time

from harness import Found, Harness, last_lines, read_results

SKIPPED_ON_CPU: Found = {"ok": True, "note": "needs CUDA"}
SKIPPED_IN_SMOKE: Found = {"ok": True, "note": "skipped in a smoke run"}


def _fashion(harness: Harness) -> list[str]:
    return ["data=fashion_mnist", f"data.root={harness.data()}"]


def _small_or(harness: Harness, model: str) -> str:
    return f"model={'lenet5' if harness.smoke else model}"


# ------------------------------------------------------------------------------------------ training


def environment(harness: Harness) -> Found:
    """All dependencies can be imported; versions, GPU, and speed of a matrix product."""
    return harness.probe("environment", 60)


def digits(harness: Harness) -> Found:
    """`cnntrain` without arguments reaches a top-1 above 0.95 on digits."""
    found = harness.train("digits", 90, *harness.sizes("", "epochs=2 data.limit=600"))
    return found | {"ok": found["ok"] and found.get("test_top1", 0) > (0.0 if harness.smoke else 0.95)}


def own_gpu_tests(harness: Harness) -> Found:
    """Tests of the project that are marked `gpu`."""
    folder = harness.project / "tests"
    files = [str(f) for f in sorted(folder.rglob("test_*.py")) if "mark.gpu" in f.read_text()]
    if not files:
        return {"ok": False, "note": "no test is marked gpu"}
    command = [*harness.cnntrain()[:1], "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *files]
    code, seconds, output = harness.call(command + ["--collect-only"] * harness.smoke, 150, "pytest")
    ok = code == 0 or (harness.smoke and code == 5)
    return {"ok": ok, "exit": code, "seconds": round(seconds, 1), "found": last_lines(output, 12)}


def fashion(harness: Harness) -> Found:
    """resnet18 on Fashion-MNIST, 3 epochs: top-1 above 0.88, images/s."""
    few = harness.sizes("epochs=3 batch_size=256", "epochs=1 limit_batches=4 data.limit=600 batch_size=32")
    found = harness.train("fashion", 120, *_fashion(harness), _small_or(harness, "resnet18"), *few)
    return found | {"ok": found["ok"] and found.get("test_top1", 0) > (0.0 if harness.smoke else 0.88)}


def fast(harness: Harness) -> Found:
    """The recipe for 93.5 % on Fashion-MNIST: top-1, seconds."""
    few = harness.sizes("", "epochs=1 limit_batches=3 data.limit=600")
    codes = (0, 1) if harness.smoke else (0,)
    root = f"data.root={harness.data()}"
    return harness.train("fast", 120, "experiment=fashion_mnist_fast", root, *few, codes=codes)


def keypoints(harness: Harness) -> Found:
    """Keypoint regression."""
    few = harness.sizes("epochs=4", "epochs=1 data.train_count=64")
    return harness.train("keypoints", 90, "data=toy_faces", "augment=[flip,rotation,jitter,random_erasing]", *few)


def heatmaps(harness: Harness) -> Found:
    """Keypoint heatmaps."""
    few = harness.sizes("epochs=2", "epochs=1 data.train_count=32 batch_size=8")
    return harness.train("heatmaps", 90, "data=toy_faces", "model=unet_small", "task.head=heatmap", *few)


def segmentation(harness: Harness) -> Found:
    """Segmentation with balanced class weights."""
    few = harness.sizes("epochs=3", "epochs=1 limit_batches=2 batch_size=8")
    words = ["data=toy_shapes", "model=unet_small", "task.loss=ce_dice", "task.class_weights=balanced"]
    return harness.train("segmentation", 90, *words, *few)


def fp16(harness: Harness) -> Found:
    """fp16 with loss scaling, gradient accumulation, clipping and an average of the weights."""
    words = "precision=fp16 optimizer=sgd accumulate=2 clip_grad_norm=1 ema_decay=0.9 epochs=5"
    return harness.train("fp16", 60, *words.split()) if harness.cuda else SKIPPED_ON_CPU


def augmentations(harness: Harness) -> Found:
    """Geometric augmentations, color augmentations and random erasing."""
    every = "[flip,crop,jitter,hue,blur,noise,random_erasing,rotation,perspective,zoom,trivial_augment]"
    words = "data=toy_shapes model=unet_small epochs=1 limit_batches=4 batch_size=8"
    return harness.train("augmentations", 60, *words.split(), f"augment={every}")


def mixing(harness: Harness) -> Found:
    """Mixup and CutMix with label smoothing and class weights."""
    words = "augment=mixup_cutmix task.label_smoothing=0.1 task.class_weights=balanced"
    return harness.train("mixing", 60, *words.split(), *harness.sizes("epochs=2", "epochs=1 data.limit=300"))


def faces(harness: Harness) -> Found:
    """Photographs of faces with 68 keypoints, if the kit contains them."""
    if not harness.data("faces").is_dir():
        return {"ok": True, "note": "the kit contains no faces"}
    words = ["data=faces68", f"data.root={harness.data('faces')}", "batch_size=4"]
    return harness.train("faces", 60, *words, *harness.sizes("epochs=5", "epochs=1"))


def camvid(harness: Harness) -> Found:
    """Street scenes with masks, if the kit contains them."""
    if not harness.data("camvid").is_dir():
        return {"ok": True, "note": "the kit contains no street scenes"}
    words = ["data=camvid", f"data.root={harness.data('camvid')}", "batch_size=4", "epochs=1"]
    return harness.train("camvid", 60, *words, *harness.sizes("", "limit_batches=1"))


# ------------------------------------------------------------------------------------------ speed


def syncs(harness: Harness) -> Found:
    """No host syncs at each step of `train_epoch` and `evaluate`."""
    return harness.probe("syncs", 150)


def caches(harness: Harness) -> Found:
    """Images/s by cache: GPU, RAM, or none (decoded by workers)."""
    few = harness.sizes(
        "epochs=2 limit_batches=150 data.workers=8", "epochs=1 limit_batches=3 data.limit=400 data.workers=1"
    )
    found: Found = {"ok": True}
    for cache in ("gpu", "ram", "none"):
        words = ["model=fmnist_cnn", *_fashion(harness), "batch_size=256", f"data.cache={cache}", *few]
        one = harness.train(f"cache-{cache}", 60, *words)
        found["ok"] = found["ok"] and one["ok"]
        found[cache] = one.get("images_per_s_last")
        found.setdefault("tail", []).extend(one.get("tail", []))
    return found


def _bench(harness: Harness, name: str, *words: str, limit_s: float = 100) -> Found:
    """Measure the images/s of the loop and of the bare step, and the time of each part of a step."""
    folder = harness.work / f"bench-{name}"
    budget = f"bench.budget_s={8 if harness.smoke else 26}"
    command = harness.cnntrain("bench", budget, f"run_dir={folder}", *words)
    code, seconds, output = harness.call(command, limit_s, f"bench-{name}")
    found: Found = {"ok": code == 0, "exit": code, "seconds": round(seconds, 1)}
    try:
        report = json.loads((folder / "bench.json").read_text())
        table = [_bench_row(setting) for setting in report["settings"]]
        first = report["settings"][0]
        if first.get("loop") and first.get("bare"):
            found |= {"share": f"{first['loop'] / first['bare']:.1%}", "loop": round(first["loop"])}
            found["bare"] = round(first["bare"])
        found["found"] = [*table, *(str(part) for part in report["parts"]), report["recommendation"]]
        shutil.copy(folder / "bench.json", harness.out / f"bench-{name}.json")
    except (OSError, ValueError, KeyError) as error:
        found |= {"ok": False, "tail": [repr(error), *last_lines(output)]}
    return found


def _bench_row(setting: Found) -> str:
    loop, bare = setting.get("loop") or 0, setting.get("bare") or 0
    layout = "nhwc" if setting["channels_last"] else "nchw"
    return (
        f"{setting['precision']:5s} {layout} compile={setting['compile']} batch={setting['batch_size']:<5d} "
        f"loop {loop:9.0f} bare {bare:9.0f} images/s share {f'{loop / bare:.1%}' if bare else '-':7s} "
        f"peak {setting.get('peak_mib') or 0:7.0f} MiB {setting.get('note') or ''}"
    )


def bench_fmnist_cnn(harness: Harness) -> Found:
    """A small network at batch size 128, where the overhead of the loop is largest."""
    few = harness.sizes("", "data.limit=400")
    return _bench(harness, "fmnist_cnn-128", *_fashion(harness), "model=fmnist_cnn", "batch_size=128", *few)


def bench_resnet_128(harness: Harness) -> Found:
    """resnet18 at batch size 128."""
    few = harness.sizes("batch_size=128", "batch_size=32 data.limit=400")
    return _bench(harness, "resnet18-128", *_fashion(harness), _small_or(harness, "resnet18"), *few)


def bench_resnet_512(harness: Harness) -> Found:
    """resnet18 at batch size 512, which should reach the speed of the bare step."""
    few = harness.sizes("batch_size=512", "batch_size=64 data.limit=400")
    return _bench(harness, "resnet18-512", *_fashion(harness), _small_or(harness, "resnet18"), *few)


def bench_keypoints(harness: Harness) -> Found:
    """Keypoints, whose loss and metrics consist of many small operations."""
    few = harness.sizes("batch_size=64", "batch_size=16 data.train_count=64")
    return _bench(harness, "keypoints-64", "data=toy_faces", *few)


def bench_compile(harness: Harness) -> Found:
    """resnet18 at batch size 128, compiled."""
    if harness.smoke:
        return SKIPPED_IN_SMOKE
    words = ["model=resnet18", "batch_size=128", "compile=default"]
    return _bench(harness, "resnet18-128-compiled", *_fashion(harness), *words, limit_s=150)


def compiled(harness: Harness) -> Found:
    """A training with `compile=default`."""
    if harness.smoke:
        return SKIPPED_IN_SMOKE
    words = ["compile=default", "model=fmnist_cnn", *_fashion(harness), "epochs=1", "batch_size=256"]
    return harness.train("compiled", 150, *words)


# ------------------------------------------------------------------------------------------ correctness


def resume_bits(harness: Harness) -> Found:
    """A run killed within an epoch and resumed, and a repeated run, have the same bits as an uninterrupted one."""
    few = harness.sizes(
        "model=resnet18 data.limit=12000 batch_size=128 epochs=4 checkpoint.every_steps=20",
        "model=lenet5 data.limit=300 batch_size=32 epochs=2 checkpoint.every_steps=2",
    )
    words = [*_fashion(harness), "deterministic=true", "log.tensorboard=false", "seed=3", *few]
    whole, repeated = harness.train("whole", 90, *words), harness.train("repeated", 90, *words)
    folder = harness.work / "killed"
    last = folder / "checkpoints" / "last.pt"
    command = harness.cnntrain(*words, f"run_dir={folder}", "log.figures=false")
    code, _, _ = harness.call(command, 90, "killed-first", kill_when=last.exists)
    resumed = harness.train("killed", 90, *words, "resume=auto")
    checkpoints = [str(harness.work / run / "checkpoints" / "last.pt") for run in ("whole", "repeated", "killed")]
    compared = harness.probe("compare", 60, "--paths", ",".join(checkpoints))
    log = (harness.work / "killed.log").read_text().splitlines()
    parts = (whole, repeated, resumed, compared)
    return {
        **{key: value for key, value in compared.items() if key not in ("exit", "seconds")},
        "ok": code == "killed" and all(part["ok"] for part in parts),
        "first_end": code,
        "seconds": whole["seconds"],
        "found": [line for line in log if line.startswith("resume: state")],
        "tail": next((part["tail"] for part in parts if part.get("tail")), []),
    }


def overfit(harness: Harness) -> Found:
    """`cnntrain overfit` passes."""
    few = harness.sizes("", "data.limit=300")
    return harness.run("overfit", 80, "overfit", _small_or(harness, "resnet18"), *_fashion(harness), *few)


def _check(harness: Harness, name: str, *words: str, expected: str = "") -> Found:
    """On a correct configuration no check may fail, except those whose names start with `expected`."""
    folder = f"run_dir={harness.work / f'check-{name}'}"
    command = harness.cnntrain("check", f"check.budget_s={10 if harness.smoke else 30}", folder, *words)
    code, seconds, output = harness.call(command, 80, f"check-{name}")
    shown = [line for line in output.splitlines() if re.match(r"FAIL|WARN|\s+likely", line)]
    fails = [line for line in shown if line.startswith("FAIL  ")]
    as_expected = bool(expected) and all(line.split()[1].startswith(expected) for line in fails)
    ok = code == 0 or (code == 1 and bool(fails) and as_expected)
    found = {"ok": ok, "exit": code, "seconds": round(seconds, 1), "fails": len(fails), "found": shown[:16]}
    return found if code in (0, 1) else {**found, "tail": last_lines(output)}


def check_resnet(harness: Harness) -> Found:
    """`cnntrain check` reports no failure for resnet18 on Fashion-MNIST."""
    few = harness.sizes("", "data.limit=300")
    words = [_small_or(harness, "resnet18"), *_fashion(harness), *few]
    return _check(harness, "resnet", *words, expected="leakage" if harness.smoke else "")


def check_digits(harness: Harness) -> Found:
    """`cnntrain check` reports no failure for digits, except their near duplicates."""
    return _check(harness, "digits", expected="leakage")


def check_faces(harness: Harness) -> Found:
    """`cnntrain check` reports no failure for keypoints."""
    return _check(harness, "faces", "data=toy_faces", *harness.sizes("", "data.train_count=100"))


def across(harness: Harness) -> Found:
    """A checkpoint of the GPU is evaluated on the CPU and vice versa; that of the CPU is resumed on the GPU."""
    few = harness.sizes("epochs=2", "epochs=1 data.limit=300")
    found: Found = {"ok": True, "found": []}
    parts = {
        "cpu_trains": ["device=cpu", *few],
        "here_trains": few,
    }
    for name, words in parts.items():
        found[name] = harness.run(name, 60, *words)["exit"]
    for name, run, device in (
        ("here_to_cpu", "here_trains", "cpu"),
        ("cpu_to_here", "cpu_trains", harness.device),
    ):
        checkpoint = f"checkpoint={harness.work / run}"
        one = harness.run(name, 60, "evaluate", checkpoint, "split=test", f"device={device}", lines=8)
        found[name] = one["exit"]
        found["found"] += one.get("tail") or one["found"]
    epochs = f"epochs={2 if harness.smoke else 3}"
    resumed = harness.run("cpu_trains", 60, epochs, "resume=auto", *[word for word in few if "epochs" not in word])
    found["cpu_resumed_here"] = resumed["exit"]
    found["found"] += resumed.get("tail") or []
    found["ok"] = all(value == 0 for key, value in found.items() if key not in ("ok", "found"))
    return found


def diverges(harness: Harness) -> Found:
    """A learning rate of 1e30 gives exit code 3 and the first layer that is not finite."""
    found = harness.run("diverges", 60, "optimizer=sgd", "optimizer.lr=1e30", "epochs=1", codes=(3,))
    return found | {"ok": found["ok"] and any("first not finite" in line for line in found["found"])}


def lr_find(harness: Harness) -> Found:
    """`cnntrain lr-find`."""
    return harness.run("lr-find", 60, "lr-find", lines=4)


def sweep(harness: Harness) -> Found:
    """Two learning rates by two seeds."""
    words = ["-m", "optimizer.lr=1e-3,1e-2", "epochs=1", "sweep.seeds=2", "log.figures=false"]
    return harness.run("sweep", 100, *words, *harness.sizes("", "data.limit=300"), lines=8)


# ------------------------------------------------------------------------------------------ device limits


def deterministic_segmentation(harness: Harness) -> Found:
    """Segmentation with `deterministic=true`."""
    few = harness.sizes("epochs=1", "epochs=1 limit_batches=2 batch_size=8")
    words = ["data=toy_shapes", "model=unet_small", "task.loss=ce_dice", "deterministic=true"]
    return harness.train("segmentation-deterministic", 90, *words, *few)


def deterministic_pooling(harness: Harness) -> Found:
    """`deterministic=true` trains with adaptive pooling, which has no deterministic kernel on CUDA."""
    words = "data=toy_faces data.size=96 model=alexnet_torchvision epochs=1 limit_batches=2 batch_size=8"
    few = harness.sizes("", "data.train_count=32")
    return harness.train("pooling-deterministic", 60, *words.split(), "deterministic=true", *few)


def auto_batch(harness: Harness) -> Found:
    """`batch_size=auto`."""
    few = harness.sizes("", "data.limit=600")
    words = [*_fashion(harness), "batch_size=auto", "epochs=1", _small_or(harness, "resnet18"), *few]
    found = harness.train("auto-batch", 90, *words)
    log = (harness.work / "auto-batch.log").read_text().splitlines()
    return found | {"found": [line for line in log if "batch_size=auto" in line]}


def memory(harness: Harness) -> Found:
    """Allocated GPU memory does not grow from epoch to epoch."""
    return harness.probe("memory", 60)


def full_gpu(harness: Harness) -> Found:
    """With little free GPU memory a training works, or ends with exit code 4 and no traceback."""
    return harness.probe("full_gpu", 110) if harness.cuda else SKIPPED_ON_CPU


def launch_refused(harness: Harness) -> Found:
    """More processes than GPUs are refused; two processes on the CPU of this machine work."""
    if not harness.cuda:
        return SKIPPED_ON_CPU
    nine = harness.run("nine", 60, "launch.devices=9", codes=(2,))
    two_on_cpu = harness.run("two-on-cpu", 90, "launch.devices=2", "device=cpu", "epochs=1")
    tail = nine.get("tail", []) + two_on_cpu.get("tail", [])
    ok = nine["ok"] and two_on_cpu["ok"] and any("GPU" in line for line in nine["found"])
    return {
        "ok": ok,
        "exit": nine["exit"],
        "two_on_cpu": two_on_cpu["exit"],
        "found": nine["found"],
        "tail": tail,
    }


def group(harness: Harness) -> Found:
    """A process group of one rank with NCCL: all-reduce, broadcast, SyncBatchNorm, DDP."""
    return harness.probe("group", 90, env={"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29512"})


def two(harness: Harness) -> Found:
    """Two processes on this GPU with gloo (NCCL refuses one GPU twice) reach the top-1 of one process."""
    words = [
        "data=digits",
        "epochs=2",
        "batch_size=64",
        "seed=1",
        "log.tensorboard=false",
        "model=batchnorm_cnn",
    ]
    words += harness.sizes("", "data.limit=200")
    one = harness.train("one-process", 60, *words)
    folder, processes = harness.work / "two-processes", []
    common = [f"run_dir={folder}", "log.figures=false", f"device={'cuda' if harness.cuda else 'cpu'}"]
    command = harness.probe_command("rank", "--words", json.dumps([*words, *common]))
    logs = [harness.work / f"rank{rank}.log" for rank in (0, 1)]
    for rank, log in enumerate(logs):
        variables = {
            "RANK": rank,
            "WORLD_SIZE": 2,
            "LOCAL_RANK": rank,
            "LOCAL_WORLD_SIZE": 2,
            "MASTER_PORT": 29513,
        }
        env = {**harness.environment, "MASTER_ADDR": "127.0.0.1", **{k: str(v) for k, v in variables.items()}}
        processes.append(
            subprocess.Popen(command, env=env, cwd=harness.work, stdout=log.open("w"), stderr=subprocess.STDOUT)
        )
    deadline, codes = time.monotonic() + 90 * harness.patience, []
    for process in processes:
        try:
            codes.append(process.wait(max(1, deadline - time.monotonic())))
        except subprocess.TimeoutExpired:
            process.kill()
            codes.append("timeout")
    results = read_results(folder)
    gap = abs(one.get("test_top1", 0) - results.get("test_top1", 9))
    succeeded = codes == [0, 0] and one["ok"]
    return {
        "ok": succeeded and gap < (1 if harness.smoke else 0.05),
        "codes": str(codes),
        "one": one.get("test_top1"),
        "two": results.get("test_top1"),
        "one_loss": one.get("best", {}).get("val/loss"),
        "two_loss": results.get("best", {}).get("val/loss"),
        "tail": [] if succeeded else [line for log in logs for line in last_lines(log.read_text())],
    }


# In order of importance. Timed items run alone in their stage; other items of a stage run in parallel.
STAGES = [
    [environment],
    [digits],
    [bench_resnet_128],
    [
        own_gpu_tests,
        syncs,
        resume_bits,
        check_resnet,
        overfit,
        keypoints,
        segmentation,
        group,
        two,
        check_digits,
        check_faces,
        heatmaps,
        fp16,
        deterministic_segmentation,
        deterministic_pooling,
    ],
    [fashion],
    [fast],
    [caches],
    [bench_fmnist_cnn],
    [across, mixing, augmentations, diverges, launch_refused, memory, lr_find, faces, camvid, sweep],
    [auto_batch],
    [full_gpu],
    [bench_resnet_512],
    [bench_keypoints],
    [bench_compile],
    [compiled],
]
