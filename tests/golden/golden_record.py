"""Record the results of short commands, and compare them with those of a changed code base.

    python tests/golden/golden_record.py record [NAME ...]   # write record.json, or renew commands in it
    python tests/golden/golden_record.py compare [NAME ...]  # run again and print every difference
    python tests/golden/golden_record.py list [NAME ...]     # print the names and the command lines

For each command (golden_commands.py) the record contains the exit codes, and for each folder that it writes:
the rows of metrics.csv, the results and findings in JSON and CSV files, predictions, and hashes of the
weights and of the optimizer's state in the checkpoints. Elapsed times, throughput, paths, dates, versions and
messages are left out. `compare` has the exit code 1 if there is a difference.

Another kind of CPU or another build of torch gives other bits. `compare` reports if they differ from those of
the record. `--tolerance NAME=1E-5` compares the numbers of a command with a relative tolerance, and ignores
its hashes.

When something is renamed, add it to the mappings below instead of recording again.
"""

import argparse
import contextlib
import csv
import hashlib
import json
import math
import os
import platform
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")  # before torch is imported
HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
sys.path[:0] = [str(REPOSITORY), str(HERE)]

from golden_commands import COMMANDS, COMMON, TRAINING, Command  # noqa: E402
from golden_inputs import COUNTDOWN, write_inputs  # noqa: E402

# Text replaced in the words of the command lines, old -> new:
# {"data.store=device": "data.store=gpu", "ema_decay=": "ema.decay="}.
RENAMED_OVERRIDES: dict[str, str] = {}

# Names in results, old -> new: columns, JSON keys, keys in checkpoints, file names, names of checks and
# verdicts. A name also applies to each part of a composed one: {"top1": "accuracy"} renames `val/top1` and
# `val/top1 std`.
RENAMED_KEYS: dict[str, str] = {}

# Names of random draws, new -> old: the keys of augmentations, and other strings that cnntrain hashes into
# seeds. The old name is hashed, so that the draws stay the same: {"horizontal_flip": "flip"}.
DRAW_NAMES: dict[str, str] = {}

RECORD = HERE / "record.json"
TIMINGS = ("wall_s", "time_s", "images_per_s", "seconds")
MESSAGES = ("line", "evidence", "cause", "remedy", "keys", "error", "checkpoint", "run_dir")  # and paths
JSON_FILES = ("results.json", "check.json", "overfit.json", "lr_find.json", "summary.json", "comparison.json")
TABLES = ("metrics.csv", "results.csv", "compare.csv", "predictions.csv")
GROUP_SETTINGS = ("lr", "momentum", "betas", "weight_decay")  # torch's names
WORST_SHOWN = 3  # rows of an evaluation's examples.csv
HASH_DIGITS = 16
UNREADABLE = "can't be read: "
LOG_LINES = 15  # shown where an exit code differs
LONGEST_VALUE = 100  # characters of a value in a difference


def patch_draw_names() -> None:
    """Make cnntrain hash the old names of renamed draws."""
    from cnntrain import randomness

    original = randomness._chain  # every seed and every draw is a function of the parts that it hashes

    def chain(*parts: int | str) -> int:
        return original(*(DRAW_NAMES.get(part, part) if isinstance(part, str) else part for part in parts))

    randomness._chain = chain


if DRAW_NAMES:  # at import, because processes that are spawned import this file, too
    patch_draw_names()


def current(name: str) -> str:
    """Return the present name of a name in results."""
    if name in RENAMED_KEYS:
        return RENAMED_KEYS[name]
    return re.sub(r"[^/ ]+", lambda part: RENAMED_KEYS.get(part[0], part[0]), name)


def renamed(content: Any) -> Any:
    """Return recorded results with the present names as keys and as string values."""
    if isinstance(content, Mapping):
        return {current(key): renamed(value) for key, value in content.items()}
    if isinstance(content, list):
        return [renamed(value) for value in content]
    return current(content) if isinstance(content, str) else content


def words_of(line: str, inputs: Path) -> list[str]:
    """Return the words of a command line, with the common ones added and renamed text replaced."""
    words = line.split()
    if any(word.startswith("checkpoint=") for word in words):
        common = COMMON["evaluate"]
    else:
        common = COMMON.get(words[0], TRAINING)
    keys = {word.partition("=")[0] for word in words}
    words += [word for word in common.split() if word.partition("=")[0] not in keys]
    words = [re.sub(r"\bIN\b", str(inputs), word) for word in words]
    if not RENAMED_OVERRIDES:
        return words
    pattern = "|".join(map(re.escape, sorted(RENAMED_OVERRIDES, key=len, reverse=True)))
    return [re.sub(pattern, lambda found: RENAMED_OVERRIDES[found[0]], word) for word in words]


def run_command(command: Command, inputs: Path, folder: Path) -> dict[str, Any]:
    """Run the lines of a command in `folder`, an empty one, and return its results.

    Output goes to the file `log.txt` in the folder above.
    """
    codes: list[Any] = []
    with working_folder(folder), output_to(folder.parent / "log.txt"):
        from cnntrain.cli import main

        for number, line in enumerate(command.lines):
            if number in command.stop_after:
                (folder / COUNTDOWN).write_text(str(command.stop_after[number]))
            try:
                codes.append(main(words_of(line, inputs)))
            except Exception as error:  # an error in the code under test is a result
                traceback.print_exc()
                codes.append(f"{type(error).__name__}: {error}")
    return collect(command, codes, folder)


@contextlib.contextmanager
def working_folder(folder: Path) -> Iterator[None]:
    """Run the block in a folder with its own cache; restore environment and import path at the end."""
    before, environment, path = Path.cwd(), dict(os.environ), list(sys.path)
    os.environ["XDG_CACHE_HOME"] = str(folder.parent / "cache")
    os.environ["PYTHONPATH"] = str(REPOSITORY)  # of processes that cnntrain starts
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
        sys.path[:] = path
        os.environ.clear()
        os.environ.update(environment)


@contextlib.contextmanager
def output_to(path: Path) -> Iterator[None]:
    """Send standard output and standard error, also those of child processes, to a file."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    with path.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for descriptor, number in zip(kept, (1, 2), strict=True):
            os.dup2(descriptor, number)
            os.close(descriptor)


def collect(command: Command, codes: list[Any], folder: Path) -> dict[str, Any]:
    """Return what is recorded of the files below a working folder."""
    results: dict[str, Any] = {"exit codes": codes}
    for name, subfolder in result_folders(folder).items():
        found = results_in(subfolder)
        if command.files and subfolder.parent == folder:
            paths = sorted(str(path.relative_to(subfolder)) for path in subfolder.rglob("*") if path.is_file())
            shown = [path for path in paths if not path.startswith(".")]
            found["files"] = [re.sub(r"events\.out.*", "events", path) for path in shown]
        if found:
            results[name] = found
    for one, other in command.equal:
        results[f"{one} = {other}"] = one in results and results[one] == results.get(other)
    return results


def result_folders(folder: Path) -> dict[str, Path]:
    """Return the folders that commands wrote to, and those in them, by name.

    The runs of a sweep are numbered.
    """
    folders: dict[str, Path] = {}
    for outer in sorted(path for path in folder.iterdir() if path.is_dir()):
        folders[outer.name] = outer
        inner = sorted(path for path in outer.iterdir() if path.is_dir())
        if (outer / current("results.csv")).exists():
            folders |= {f"{outer.name}/{number}": path for number, path in enumerate(inner)}
        else:
            folders |= {f"{outer.name}/{path.name}": path for path in inner}
    return folders


def results_in(folder: Path) -> dict[str, Any]:
    """Return the results in the files of one folder, by file name."""
    readers: dict[str, Callable[[Path], Any]] = {
        **dict.fromkeys(JSON_FILES, lambda path: without_timings(json.loads(path.read_text()))),
        **dict.fromkeys(TABLES, read_table),
        "examples.csv": lambda path: read_table(path)[:WORST_SHOWN],
        "results.md": read_markdown_table,
        "checkpoints/last.pt": read_checkpoint,
        "checkpoints/best.pt": read_checkpoint,
    }
    names = {current(name): read for name, read in readers.items()}
    found: dict[str, Any] = {}
    for name, read in names.items():
        try:
            if (folder / name).is_file():
                found[name] = read(folder / name)
        except Exception as error:  # a renamed key, or a damaged file: a difference
            found[name] = f"{UNREADABLE}{error!r}"
    if current("predictions.csv") in found:
        for path in sorted((folder / current("masks")).glob("*.png")):
            found[f"{current('masks')}/{path.name}"] = image_hash(path)
    return found


def is_excluded(key: str) -> bool:
    """Return True for a key of timings, messages or paths."""
    return any(key.startswith((name, current(name))) for name in TIMINGS) or any(
        key in (name, current(name)) for name in MESSAGES
    )


def without_timings(content: Any) -> Any:
    """Return JSON content without timings, messages and paths; a list of findings becomes name -> verdict."""
    if isinstance(content, list):
        return [without_timings(value) for value in content]
    if not isinstance(content, dict):
        return content
    name, verdict, findings = current("name"), current("verdict"), current("findings")
    kept = {}
    for key, value in content.items():
        if key == findings:
            kept[key] = {finding[name]: finding[verdict] for finding in value}
        elif not is_excluded(key):
            kept[key] = without_timings(value)
    return kept


def read_table(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a CSV file without timings; cells that are numbers as such."""
    with path.open(newline="") as file:
        return [
            {key: number_or_text(cell) for key, cell in row.items() if not is_excluded(key)}
            for row in csv.DictReader(file)
        ]


def read_markdown_table(path: Path) -> list[dict[str, Any]]:
    """Return the rows of the first table in a Markdown file without timings."""
    rows = [line.strip("| ").split("|") for line in path.read_text().splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in row] for row in rows]
    return [
        {key: number_or_text(cell) for key, cell in zip(cells[0], row, strict=False) if not is_excluded(key)}
        for row in cells[2:]
    ]


def number_or_text(cell: str) -> int | float | str:
    for convert in (int, float):
        with contextlib.suppress(ValueError):
            return convert(cell)
    return cell


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Return hashes of the tensors in a checkpoint, and the settings of the optimizer's parameter groups."""
    import torch

    state = torch.load(path, map_location="cpu", weights_only=True)[current("state")]
    optimizer = state[current("optimizer")]
    moments = [
        value if isinstance(value, torch.Tensor) else torch.tensor(value, dtype=torch.float64)
        for _, values in sorted(optimizer["state"].items())
        for _, value in sorted(values.items())
        if value is not None
    ]
    model, average = state[current("model")], state[current("ema")]
    groups = optimizer["param_groups"]
    return {
        current("model"): tensor_hash(model.values()),
        current("ema"): tensor_hash(average.values()) if average else None,
        current("optimizer"): tensor_hash(moments),
        "groups": [[group[key] for key in GROUP_SETTINGS if key in group] for group in groups],
    }


def tensor_hash(tensors: Iterable[Any]) -> str:
    """Return the SHA-256 of the raw bytes of tensors in their order (without names), shortened."""
    import torch

    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return f"sha256:{digest.hexdigest()[:HASH_DIGITS]}"


def image_hash(path: Path) -> str:
    """Return the SHA-256 of an image's size and pixels, shortened."""
    from PIL import Image

    with Image.open(path) as image:
        digest = hashlib.sha256(f"{image.mode} {image.size}".encode() + image.tobytes())
    return f"sha256:{digest.hexdigest()[:HASH_DIGITS]}"


def differences(recorded: Any, found: Any, path: str = "", tolerance: float = 0.0) -> Iterator[tuple[str, Any, Any]]:
    """Yield key, recorded value and found value of all differences."""
    if isinstance(recorded, dict) and isinstance(found, dict):
        for key in dict.fromkeys([*recorded, *found]):
            inner = f"{path}: {key}" if path else key
            yield from differences(recorded.get(key, ABSENT), found.get(key, ABSENT), inner, tolerance)
    elif isinstance(recorded, list) and isinstance(found, list):
        for index in range(max(len(recorded), len(found))):
            one, other = (each[index] if index < len(each) else ABSENT for each in (recorded, found))
            yield from differences(one, other, f"{path}[{index}]", tolerance)
    elif not is_same(recorded, found, tolerance):
        yield path, recorded, found


class Absent:
    """A missing value."""

    def __repr__(self) -> str:
        return "nothing"


ABSENT = Absent()


def is_same(recorded: Any, found: Any, tolerance: float) -> bool:
    """Compare two values; numbers and hashes with the tolerance of their command."""
    numbers = [isinstance(value, int | float) and not isinstance(value, bool) for value in (recorded, found)]
    if all(numbers):
        if math.isnan(recorded) and math.isnan(found):
            return True
        return recorded == found or (
            tolerance > 0 and math.isclose(recorded, found, rel_tol=tolerance, abs_tol=tolerance)
        )
    if tolerance and all(isinstance(value, str) and value.startswith("sha256:") for value in (recorded, found)):
        return True
    return type(recorded) is type(found) and recorded == found


def describe_machine() -> dict[str, str]:
    """Return the hardware and versions that the bits of the results depend on."""
    import numpy
    import PIL
    import torch
    import torchvision

    processors = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", processors.read_text() if processors.exists() else "")
    return {
        "cpu": found[1] if found else platform.processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        **{module.__name__: module.__version__ for module in (torch, torchvision, numpy, PIL)},
    }


def run_all(names: Iterable[str]) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Run commands; yield name, results and the last lines of the output of each."""
    import matplotlib

    os.environ["MPLCONFIGDIR"] = matplotlib.get_cachedir()  # an empty cache costs seconds
    with tempfile.TemporaryDirectory(prefix="golden-") as temporary:
        inputs = Path(temporary) / "inputs"
        write_inputs(inputs)
        for name in names:
            started, cpu = time.monotonic(), cpu_seconds()
            folder = Path(temporary) / name / "work"
            folder.mkdir(parents=True)
            results = run_command(COMMANDS[name], inputs, folder)
            wall = f"{time.monotonic() - started:.1f} s, {cpu_seconds() - cpu:.1f} s of CPU time"
            print(f"{name}: exit codes {results['exit codes']}, {wall}", file=sys.stderr, flush=True)
            log = (folder.parent / "log.txt").read_text(errors="backslashreplace")
            # As read from a file: tuples become lists.
            yield name, json.loads(json.dumps(results)), "\n".join(log.splitlines()[-LOG_LINES:])


def cpu_seconds() -> float:
    """Return the CPU time of this process and of its children that have ended."""
    return sum(os.times()[:4])


def read_record() -> dict[str, Any]:
    if not RECORD.exists():
        return {"machine": {}, "commands": {}}
    return json.loads(RECORD.read_text())


def write_record(record: Mapping[str, Any]) -> None:
    """Write the record as JSON with one line per folder of a command."""
    lines = []
    for name, results in record["commands"].items():
        parts = [f"    {json.dumps(key)}: {json.dumps(value)}" for key, value in results.items()]
        lines.append(f"  {json.dumps(name)}: {{\n" + ",\n".join(parts) + "\n  }")
    machine = json.dumps(record["machine"])
    RECORD.write_text(f'{{"machine": {machine}, "commands": {{\n' + ",\n".join(lines) + "\n}}\n")


def record_commands(names: Iterable[str]) -> int:
    """Run commands and write their results to the record."""
    known = read_record()["commands"]
    for name, results, log in run_all(names):
        if UNREADABLE in str(results) or any(isinstance(code, str) for code in results["exit codes"]):
            raise SystemExit(f"{name}: failed, not recorded\n{log}")
        known[name] = results
    commands = {name: known[name] for name in COMMANDS if name in known}
    write_record({"machine": describe_machine(), "commands": commands})
    return 0


def compare_commands(names: Iterable[str], tolerances: Mapping[str, float]) -> int:
    """Run commands and print how their results differ from the record; return 1 if any differ, else 0."""
    record, count = read_record(), 0
    for name, value in describe_machine().items():
        if record["machine"].get(name) != value:
            before = record["machine"].get(name)
            print(f"note: {name} was {before!r} when recorded, is {value!r}: bits may differ")
    for name, results, log in run_all(names):
        recorded = renamed(record["commands"].get(name, {}))
        found = list(differences(recorded, results, tolerance=tolerances.get(name, 0.0)))
        for key, before, after in found:
            print(f"{name}: {key}: recorded {shortened(before)}, found {shortened(after)}")
        if recorded.get("exit codes") != results["exit codes"]:
            print("".join(f"    | {line}\n" for line in log.splitlines()), end="")
        count += len(found)
        sys.stdout.flush()
    print(f"{count} differences" if count else "no difference")
    return 1 if count else 0


def shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}..."


def read_tolerance(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    if name not in COMMANDS:
        raise argparse.ArgumentTypeError(f"there is no command {name!r}")
    return name, float(value)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("record", "compare", "list"))
    parser.add_argument("names", nargs="*", metavar="NAME", help="commands; all if none is given")
    parser.add_argument(
        "--tolerance",
        type=read_tolerance,
        action="append",
        default=[],
        metavar="NAME=NUMBER",
        help="relative tolerance of a command's numbers; its hashes are ignored",
    )
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.names if name not in COMMANDS]:
        parser.error(f"there is no command {', '.join(unknown)}; there are {', '.join(COMMANDS)}")
    names = arguments.names or list(COMMANDS)
    if arguments.action == "list":
        for name in names:
            print("\n    ".join([name, *COMMANDS[name].lines]))
        return 0
    if arguments.action == "record":
        return record_commands(names)
    return compare_commands(names, dict(arguments.tolerance))


if __name__ == "__main__":
    sys.exit(main())
