"""Run `cnntrain check` on every planted bug and on sound set-ups: the tables in docs/checks.md.

python -m tests.bugs.tables bugs FILE       # about half an hour on one core; skips rows that FILE already has
python -m tests.bugs.tables sound FILE      # about two hours; with SHARED data if they exist
python -m tests.bugs.tables show FILE FILE  # both tables in Markdown
"""

import contextlib
import io
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cnntrain import compose
from cnntrain.checks.check_run import check
from cnntrain.errors import CnntrainError
from tests.bugs import test_check_data as data
from tests.bugs import test_check_learning as learning
from tests.bugs import test_check_machinery as machinery
from tests.bugs import test_check_start as start
from tests.bugs import test_check_wiring as wiring

PLANTED = Path(__file__).parent / "planted"
SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
SEEDS = (0, 1, 2)

FASHION = ("data=fashion_mnist", f"data.root={SHARED}")
FACES = ("data=toy_faces", "data.size=32")
SOUND = [
    *((f"model={name}", "data=digits") for name in ("lenet5", "mlp", "sequential", "cifar_resnet", "cifar_plain")),
    *((f"model={name}", "data=digits") for name in ("fmnist_cnn", "batchnorm_cnn", "resnet18", "mobilenet_v2")),
    ("model=mlp", "data=digits", "optimizer=sgd", "task.label_smoothing=0.1"),
    ("model=lenet5", "data=digits", "optimizer=adam", "task.class_weights=balanced", "accumulate=2"),
    *((f"model={name}", *FASHION) for name in ("lenet5", "lenet5_1998", "mlp", "fmnist_cnn", "batchnorm_cnn")),
    *((f"model={name}", *FASHION) for name in ("resnet18", "cifar_resnet", "mobilenet_v1", "shufflenet")),
    ("model=fmnist_cnn", *FASHION, "optimizer=sgd", "schedule=one_cycle", "augment=[flip,crop]"),
    ("model=cifar_resnet", *FASHION, "model.norm=group", "augment=mixup"),
    *((f"model={name}", *FACES) for name in ("keypoint_cnn", "lenet5", "cifar_resnet", "resnet18", "mobilenet_v1")),
    *((f"model={name}", *FACES) for name in ("mobilenet_v2", "shufflenet", "googlenet", "densenet121", "mlp")),
    ("data=toy_faces",),
    ("model=keypoint_cnn", *FACES, "task.loss=mse"),
    ("model=keypoint_cnn", *FACES, "task.loss=l1", "optimizer=sgd"),
    ("model=unet_small", *FACES, "task.head=heatmap", "model.width=8"),
    ("data=faces68", f"data.root={SHARED}/faces", "data.size=64", "batch_size=16"),
    *((f"model={name}", "data=toy_shapes", "data.size=32") for name in ("unet_small", "fcn")),
    ("model=unet", "data=toy_shapes", "data.size=32", "model.width=8"),
    ("model=unet_small", "data=toy_shapes", "data.size=32", "task.loss=dice"),
    ("model=unet_small", "data=toy_shapes", "data.size=32", "optimizer=sgd", "model.upsampling=unpool"),
    ("data=camvid", f"data.root={SHARED}/camvid", "model=unet_small", "data.limit=100"),
]


def bugs() -> Iterator[tuple[str, list[str], str, str]]:
    """Yield name, overrides, the check that must detect the bug, and words of its finding."""
    of_machinery = {name: (["model=sound", *row[0]], *row[1:]) for name, row in machinery.BROKEN.items()}
    for table in (data.BROKEN, start.BROKEN, wiring.BROKEN, learning.BROKEN, of_machinery):
        for name, (overrides, wanted, *_, words) in table.items():
            yield name, list(overrides), wanted, words
    for name, (overrides, words) in data.REFUSED.items():
        yield name, overrides, "refused", words
    for name, overrides in learning.MISALIGNED.items():
        yield f"{name} of another image", overrides, "generalizes", learning.WRONG_TARGETS
    own_norm = ["model=sound", "model._target_=planted_learning.OwnNorm"]
    yield "a custom norm, wrong in eval mode", own_norm, "batch norm gap", "eval mode"


def run_check(*overrides: str) -> dict[str, Any]:
    """Return the verdict of a whole check, its warnings and failures, and its seconds."""
    started, here = time.monotonic(), Path.cwd()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        os.chdir(folder)
        try:
            settings = compose("threads=1", "log.figures=false", "run_dir=run", *overrides, config_dir=PLANTED)
            report = check(settings)
        except CnntrainError as error:
            refusal = {"name": "refused", "verdict": "FAIL", "cause": str(error), "evidence": ""}
            report = {"verdict": "FAIL", "findings": [refusal]}
        finally:
            os.chdir(here)
    found = [row for row in report["findings"] if row["verdict"] in ("FAIL", "WARN")]
    return {"verdict": report["verdict"], "found": found, "seconds": round(time.monotonic() - started, 1)}


def run(what: str, file: Path) -> None:
    done = {row["name"] for row in read(file)}
    jobs: dict[str, dict[str, Any]] = {}
    if what == "bugs":
        for name, overrides, wanted, words in bugs():
            jobs[f"{name} | {wanted}"] = {"overrides": overrides, "wanted": wanted, "words": words}
    else:
        for seed in SEEDS:
            for pair in SOUND:
                if not any(str(SHARED) in word for word in pair) or SHARED.is_dir():
                    shown = " ".join(word for word in pair if "data.root" not in word)
                    jobs[f"{shown} seed={seed}"] = {"overrides": [*pair, f"seed={seed}"]}
    reports: dict[str, dict[str, Any]] = {}  # one set-up may be listed for several checks
    for name, job in jobs.items():
        if name not in done:
            key = " ".join(job["overrides"])
            reports[key] = reports.get(key) or run_check(*job["overrides"])
            row = {"name": name, **job, **reports[key]}
            with file.open("a") as out:
                out.write(json.dumps(row) + "\n")
            print(name, row["verdict"], [f["name"] for f in row["found"]], row["seconds"], file=sys.stderr)


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def show(bugs_file: Path, sound_file: Path) -> None:
    rows = read(bugs_file)
    named = [row for row in rows if any(_names(row, each) for each in row["found"])]
    print(f"{len(named)} of {len(rows)} planted bugs are detected by the intended check.\n")
    print("| bug | detected by | also reported by |\n|---|---|---|")
    for row in rows:
        by = ", ".join(f"{each['name']} ({each['verdict']})" for each in row["found"] if _names(row, each))
        also = ", ".join(each["name"] for each in row["found"] if not _names(row, each))
        print(f"| {row['name'].partition(' | ')[0]} | {by or '**missed**'} | {also} |")
    rows = read(sound_file)
    alarmed = [row for row in rows if row["found"]]
    fails = sum(each["verdict"] == "FAIL" for row in rows for each in row["found"])
    print(f"\nOf {len(rows)} checks of sound set-ups, {len(alarmed)} report something, {fails} as a FAIL.\n")
    print("| set-up | seeds | findings |\n|---|---|---|")
    setups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        setups.setdefault(row["name"].rpartition(" ")[0], []).append(row)
    for name, each in setups.items():
        findings = sorted({f"{f['name']} ({f['verdict']}): {f['cause']}" for row in each for f in row["found"]})
        print(f"| `{name}` | {len(each)} | {'; '.join(findings) or 'none'} |")


def _names(row: dict[str, Any], finding: dict[str, Any]) -> bool:
    return finding["name"] == row["wanted"] and row["words"] in f"{finding}"


if __name__ == "__main__":
    if sys.argv[1] == "show":
        show(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        run(sys.argv[1], Path(sys.argv[2]).resolve())
