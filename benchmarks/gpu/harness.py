"""Run commands with time limits, and write a report after each item."""

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
RESULT = "RESULT "  # start of the line with a probe's result
LINE_LISTS = ("tail", "warnings", "found")  # keys of lists of lines, printed below the line of an item

Found = dict[str, Any]  # `ok`, and the figures of an item


class Harness:
    """Run the commands of all items and write the report.

    Attributes:
        cuda: whether the device is a CUDA device.
        smoke: whether sizes are tiny, to test the items without measuring.
        out: folder of the report.
        work: temporary working folder of all commands.
    """

    def __init__(self, device: str, smoke: bool, out: str, kit: str, budget_s: float, patience: float) -> None:
        self.device, self.cuda, self.smoke, self.patience = device, device.startswith("cuda"), smoke, patience
        self.out, self.kit = Path(out).resolve(), Path(kit).resolve()
        self.out.mkdir(parents=True, exist_ok=True)
        self.work = Path(tempfile.mkdtemp(prefix="cnntrain-gpu-"))
        (self.work / "cache").mkdir()
        self.project = self._unpack_project()
        self.started = time.monotonic()
        self.budget_s = budget_s
        self.items: list[Found] = []
        self._lock = threading.Lock()
        path = os.pathsep.join(filter(None, [str(self.project), os.environ.get("PYTHONPATH")]))
        self.environment = {
            **os.environ,
            "PYTHONPATH": path,
            "PYTHONUNBUFFERED": "1",
            "XDG_CACHE_HOME": str(self.work / "cache"),
            "COLUMNS": "160",
        }

    def _unpack_project(self) -> Path:
        """Unpack the project from the kit, or return the working folder if the kit has none."""
        packed = self.kit / "project.tar.gz"
        if not packed.is_file():
            return Path.cwd()
        with tarfile.open(packed) as archive:
            archive.extractall(self.work / "project", filter="data")
        return self.work / "project"

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self.started

    @property
    def remaining_s(self) -> float:
        return self.budget_s - self.elapsed_s

    def data(self, name: str = "") -> Path:
        return self.kit / "data" / name

    def sizes(self, full: str, smoke: str) -> list[str]:
        """Return the settings of a full run or of a smoke run."""
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
            limit_s: seconds (times `patience`) until its process group is terminated.
            log: name of the file for its output.
            kill_when: polled ten times per second; when it returns true, the process group is killed (SIGKILL).

        Returns:
            exit code or 'timeout' or 'killed', seconds, output.
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
                _terminate(process, immediately=code == "killed")
        return code, time.monotonic() - started, path.read_text(errors="replace")

    def cnntrain(self, *words: object) -> list[str]:
        """Return a command line of cnntrain on this device."""
        device = [] if any(str(word).startswith("device=") for word in words) else [f"device={self.device}"]
        return [sys.executable, "-m", "cnntrain", *map(str, words), *device]

    def run(self, name: str, limit_s: float, *words: object, lines: int = 6, codes: tuple[int, ...] = (0,)) -> Found:
        """Run a command of cnntrain, which must exit with one of `codes`; `found` contains its last lines."""
        code, seconds, output = self.call(self.cnntrain(*words, f"run_dir={self.work / name}"), limit_s, name)
        found = {
            "ok": code in codes,
            "exit": code,
            "seconds": round(seconds, 1),
            "found": last_lines(output, lines),
        }
        return found if found["ok"] else {**found, "found": [], "tail": last_lines(output)}

    def train(self, name: str, limit_s: float, *words: object, codes: tuple[int, ...] = (0,)) -> Found:
        """Train, and return the results, the images/s of each epoch, and warnings."""
        folder = self.work / name
        command = self.cnntrain(*words, f"run_dir={folder}", "log.figures=false")
        code, seconds, output = self.call(command, limit_s, name)
        found = {"ok": code in codes, "exit": code, "seconds": round(seconds, 1), **read_results(folder)}
        warnings = {line for line in output.splitlines() if re.search(r"\bwarning\b", line, re.IGNORECASE)}
        if warnings:
            found["warnings"] = sorted(warnings)[:6]
        return found if found["ok"] else {**found, "tail": last_lines(output)}

    def probe(self, name: str, limit_s: float, *words: str, env: dict[str, str] | None = None) -> Found:
        """Run a function of probes.py in a separate process and return its result."""
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
        options = ["--device", self.device, "--data", str(self.data()), *smoke, *words]
        return [sys.executable, str(HERE / "probes.py"), name, *options]

    # -------------------------------------------------------------------------------------------- the report

    def record(self, name: str, found: Found, gpu: Found) -> None:
        """Print the result of an item and rewrite the reports."""
        with self._lock:
            item = {"item": name, **found, **({"gpu": gpu} if gpu else {}), "at_s": round(self.elapsed_s)}
            self.items.append(item)
            gpu_text = f" | gpu {gpu}" if gpu else ""
            print(f"[{self.elapsed_s:5.0f} s] {one_line(name, found)}{gpu_text}", flush=True)
            for line in [line for key in LINE_LISTS for line in (found.get(key) or [])[-25:]]:
                print(f"          {line}", flush=True)
            report = json.dumps({"device": self.device, "items": self.items}, indent=1, default=str)
            (self.out / "report.json").write_text(report)
            text = "".join(f"{one_line(each['item'], each)}\n" for each in self.items)
            (self.out / "report.txt").write_text(text)


def _terminate(process: subprocess.Popen[bytes], immediately: bool) -> None:
    """Terminate a process and its children, first with SIGTERM unless `immediately`."""
    for signal_number in (signal.SIGKILL,) if immediately else (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, signal_number)
            process.wait(3)
            return
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


def one_line(name: str, found: Found) -> str:
    """Format a result as `ok   name: key=value key=value`, without lists."""
    hidden = ("ok", "item", "gpu", *LINE_LISTS)
    values = [f"{k}={v}" for k, v in found.items() if k not in hidden and not isinstance(v, list | dict)]
    return f"{'ok  ' if found.get('ok') else 'FAIL'} {name}: {' '.join(values)}"


def last_lines(text: str, count: int = 25) -> list[str]:
    lines = [line[:300] for line in text.splitlines() if line.strip() and not line.startswith(RESULT)]
    return lines[-count:]


def read_results(folder: Path) -> Found:
    """Return test and best metrics, seconds and images/s of each epoch of a run folder, as far as they exist."""
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
    """Sample nvidia-smi during an item: mean and maximum utilization, maximum memory and power."""

    def __init__(self, enabled: bool) -> None:
        self.rows: list[list[float]] = []
        self.process: subprocess.Popen[str] | None = None
        if enabled and shutil.which("nvidia-smi"):
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

    def stop(self) -> Found:
        if self.process is not None:
            self.process.terminate()
        if not self.rows:
            return {}
        utilization, memory, power = zip(*self.rows, strict=True)
        return {
            "use_mean": round(statistics.mean(utilization)),
            "use_max": round(max(utilization)),
            "mib_max": round(max(memory)),
            "watt_max": round(max(power)),
        }
