"""Run items, each with a time limit, and write down what they found after each."""

import csv
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULT = "RESULT "  # begins the line in which a probe prints what it found
SHOWN_BELOW = ("tail", "warnings", "found")  # lists of lines, printed below an item's own line

Found = dict[str, Any]  # `ok`, and whatever an item reports


class Harness:
    """Commands of one run, their limits, and the report.

    Attributes:
        cuda: whether the device is a CUDA device.
        smoke: whether sizes are tiny: it tries the items, and measures nothing.
        out: folder of the report.
        work: temporary folder in which all commands run.
    """

    def __init__(self, device: str, smoke: bool, out: str, kit: str, budget_s: float, patience: float) -> None:
        self.device, self.cuda, self.smoke, self.patience = device, device.startswith("cuda"), smoke, patience
        self.out, self.kit = Path(out).resolve(), Path(kit).resolve()
        self.out.mkdir(parents=True, exist_ok=True)
        self.work = Path(tempfile.mkdtemp(prefix="cnntrain-gpu-"))
        (self.work / "cache").mkdir()
        self.product = self._unpack_product()
        self.started = time.monotonic()
        self.budget_s = budget_s
        self.items: list[Found] = []
        self._lock = threading.Lock()
        path = os.pathsep.join(filter(None, [str(self.product), os.environ.get("PYTHONPATH")]))
        self.environment = {
            **os.environ,
            "PYTHONPATH": path,
            "PYTHONUNBUFFERED": "1",
            "XDG_CACHE_HOME": str(self.work / "cache"),
            "COLUMNS": "160",
        }

    def _unpack_product(self) -> Path:
        """The packed files of the project, or those of the working folder where none are packed."""
        packed = self.kit / "product.tar.gz"
        if not packed.is_file():
            return Path.cwd()
        with tarfile.open(packed) as archive:
            archive.extractall(self.work / "product", filter="data")
        return self.work / "product"

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self.started

    @property
    def left_s(self) -> float:
        return self.budget_s - self.elapsed_s

    def data(self, name: str = "") -> Path:
        return self.kit / "data" / name

    def sizes(self, full: str, smoke: str) -> list[str]:
        """Settings for a full run, or for a smoke run."""
        return (smoke if self.smoke else full).split()

    # -------------------------------------------------------------------------------------------- commands

    def call(
        self,
        command: Sequence[str],
        limit_s: float,
        log: str,
        env: dict[str, str] | None = None,
        kill_when: Callable[[], bool] | None = None,
    ) -> tuple[int | str, float, str]:
        """Run a command.

        Args:
            limit_s: after this many seconds (times `patience`) its process group is ended.
            log: name of the file that its output goes to.
            kill_when: asked ten times a second; once it is true, the process group gets SIGKILL.

        Returns:
            (exit code, or 'timeout', or 'killed'; seconds; output).
        """
        started, limit_s, path = time.monotonic(), limit_s * self.patience, self.work / f"{log}.log"
        with path.open("w") as file:
            process = subprocess.Popen(
                command,
                stdout=file,
                stderr=subprocess.STDOUT,
                cwd=self.work,
                env={**self.environment, **(env or {})},
                start_new_session=True,
            )
            code: int | str | None = None
            while code is None:
                if time.monotonic() - started > limit_s:
                    code = "timeout"
                elif kill_when is not None and kill_when():
                    code = "killed"
                else:
                    try:
                        code = process.wait(0.1)
                    except subprocess.TimeoutExpired:
                        continue
            if code in ("timeout", "killed"):
                _end(process, at_once=code == "killed")
        return code, time.monotonic() - started, path.read_text(errors="replace")

    def cnntrain(self, *words: object) -> list[str]:
        """The command line of cnntrain on this device."""
        chosen = [] if any(str(word).startswith("device=") for word in words) else [f"device={self.device}"]
        return [sys.executable, "-m", "cnntrain", *map(str, words), *chosen]

    def run(self, name: str, limit_s: float, *words: object, lines: int = 6, codes: tuple[int, ...] = (0,)) -> Found:
        """A command of cnntrain; good if it ends with one of `codes`. `found` has its last lines."""
        code, seconds, output = self.call(self.cnntrain(*words, f"run_dir={self.work / name}"), limit_s, name)
        found = {
            "ok": code in codes,
            "exit": code,
            "seconds": round(seconds, 1),
            "found": last_lines(output, lines),
        }
        return found if found["ok"] else {**found, "found": [], "tail": last_lines(output)}

    def train(self, name: str, limit_s: float, *words: object, codes: tuple[int, ...] = (0,)) -> Found:
        """A training: its results, images/s of each epoch, and warnings."""
        folder = self.work / name
        command = self.cnntrain(*words, f"run_dir={folder}", "log.figures=false")
        code, seconds, output = self.call(command, limit_s, name)
        found = {"ok": code in codes, "exit": code, "seconds": round(seconds, 1), **read_results(folder)}
        warned = {line for line in output.splitlines() if re.search(r"\bwarning\b", line, re.IGNORECASE)}
        if warned:
            found["warnings"] = sorted(warned)[:6]
        return found if found["ok"] else {**found, "tail": last_lines(output)}

    def probe(self, name: str, limit_s: float, *words: str, env: dict[str, str] | None = None) -> Found:
        """A function of probes.py in a process of its own, and what it printed as its result."""
        code, seconds, output = self.call(self.probe_command(name, *words), limit_s, f"probe-{name}", env)
        results = [json.loads(x[len(RESULT) :]) for x in output.splitlines() if x.startswith(RESULT)]
        result = results[-1] if results else {}
        found = {
            "ok": code == 0 and result.pop("ok", True),
            "exit": code,
            "seconds": round(seconds, 1),
            **result,
        }
        return found if code == 0 else {**found, "tail": last_lines(output)}

    def probe_command(self, name: str, *words: str) -> list[str]:
        smoke = ["--smoke"] if self.smoke else []
        given = ["--device", self.device, "--data", str(self.data()), *smoke, *words]
        return [sys.executable, str(HERE / "probes.py"), name, *given]

    # -------------------------------------------------------------------------------------------- the report

    def record(self, name: str, found: Found, gpu: Found) -> None:
        """Print what an item found, and write the reports anew."""
        with self._lock:
            item = {"item": name, **found, **({"gpu": gpu} if gpu else {}), "at_s": round(self.elapsed_s)}
            self.items.append(item)
            used = f" | gpu {gpu}" if gpu else ""
            print(f"[{self.elapsed_s:5.0f} s] {one_line(name, found)}{used}", flush=True)
            for line in [line for key in SHOWN_BELOW for line in (found.get(key) or [])[-25:]]:
                print(f"          {line}", flush=True)
            report = json.dumps({"device": self.device, "items": self.items}, indent=1, default=str)
            (self.out / "report.json").write_text(report)
            text = "".join(f"{one_line(each['item'], each)}\n" for each in self.items)
            (self.out / "report.txt").write_text(text)


def _end(process: subprocess.Popen[bytes], at_once: bool) -> None:
    """End a process and its children; SIGTERM first, unless `at_once`."""
    for number in (signal.SIGKILL,) if at_once else (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(3)
            return
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


def one_line(name: str, found: Found) -> str:
    """`ok   name: key=value key=value`, without lists."""
    hidden = ("ok", "item", "gpu", *SHOWN_BELOW)
    values = [f"{k}={v}" for k, v in found.items() if k not in hidden and not isinstance(v, list | dict)]
    return f"{'ok  ' if found.get('ok') else 'FAIL'} {name}: {' '.join(values)}"


def last_lines(text: str, count: int = 25) -> list[str]:
    lines = [line[:300] for line in text.splitlines() if line.strip() and not line.startswith(RESULT)]
    return lines[-count:]


def read_results(folder: Path) -> Found:
    """What a run folder says: test and best metrics, seconds, images/s of each epoch; empty where there is none."""
    found: Found = {}
    try:
        results = json.loads((folder / "results.json").read_text())
        found["test"] = {key.split("/")[1]: round(value, 5) for key, value in (results["test"] or {}).items()}
        found["best"] = {key: round(value, 5) for key, value in results["best"].items() if "/" in key}
        found["wall_s"], found["steps"] = results["wall_s"], results["steps"]
        found |= {f"test_{key}": found["test"][key] for key in ("top1", "nme", "miou") if key in found["test"]}
        rows = list(csv.DictReader((folder / "metrics.csv").open()))
        found["images_per_s"] = [round(float(row["images_per_s"])) for row in rows if row.get("images_per_s")]
        found["images_per_s_last"] = found["images_per_s"][-1]
    except (OSError, ValueError, KeyError, IndexError):
        pass
    return found


class GpuMonitor:
    """nvidia-smi beside an item: mean and largest use, memory and power."""

    def __init__(self, on: bool) -> None:
        self.rows: list[list[float]] = []
        self.process: subprocess.Popen[str] | None = None
        if on and shutil.which("nvidia-smi"):
            query = ["--query-gpu=utilization.gpu,memory.used,power.draw", "--format=csv,noheader,nounits"]
            self.process = subprocess.Popen(
                ["nvidia-smi", *query, "-lms", "500"],
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
            threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process is not None and self.process.stdout is not None
        for line in self.process.stdout:
            try:
                self.rows.append([float(part) for part in line.split(",")])
            except ValueError:
                continue

    def end(self) -> Found:
        if self.process is not None:
            self.process.terminate()
        if not self.rows:
            return {}
        use, memory, power = zip(*self.rows, strict=True)
        return {
            "use_mean": round(statistics.mean(use)),
            "use_max": round(max(use)),
            "mib_max": round(max(memory)),
            "watt_max": round(max(power)),
        }
