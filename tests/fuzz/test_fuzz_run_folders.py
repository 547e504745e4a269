"""Damaged run folders: each command ends with a documented exit code, starts no process and changes no other file.

A case is a seed, which selects the damage and the command.
"""

import hashlib
import io
import os
import random
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from cnntrain.cli import main

# `FUZZ_EXAMPLES=20000 python -m pytest -m long tests/fuzz/test_fuzz_run_folders.py` takes hours.
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "500"))
TIMEOUT_S = 60  # a command that takes longer counts as hanging
QUICK = (
    "model=mlp",
    "model.values.width=4",
    "threads=1",
    "data.limit=40",
    "batch_size=16",
    "log.figures=false",
    "device=cpu",
)
COMMANDS: dict[str, tuple[str, ...]] = {
    "resume": (*QUICK, "epochs=2", "run_dir=case/run", "resume=auto"),
    "resume elsewhere": (*QUICK, "epochs=2", "run_dir=case/new", "resume=case/run"),
    "resume a finished run": (*QUICK, "epochs=1", "run_dir=case/run", "resume=auto"),
    "evaluate": ("evaluate", "checkpoint=case/run", "threads=1", "device=cpu"),
    "predict": (
        "predict",
        "checkpoint=case/run",
        "images=image.png",
        "run_dir=case/out",
        "threads=1",
        "device=cpu",
    ),
    "compare": ("compare", "case/run", "run_dir=case/compared"),
}


def other_tensor(generator: random.Random, like: Tensor) -> Tensor:
    """Return a tensor that differs from `like` in shape, type, stride or content."""
    shape = tuple(like.shape)
    return generator.choice(
        [
            lambda: torch.zeros(0),
            lambda: torch.zeros(()),
            lambda: torch.zeros(3),
            lambda: torch.zeros(*shape, 1),
            lambda: torch.zeros(1).expand(shape or (1,)),
            lambda: torch.zeros(1).expand(10**8),
            lambda: torch.full(shape, float("nan")),
            lambda: torch.full(shape, float("inf")),
            lambda: -torch.ones(shape),
            lambda: torch.zeros(shape, dtype=torch.int64),
            lambda: torch.zeros(shape, dtype=torch.bool),
            lambda: torch.zeros(shape, dtype=torch.complex64),
            lambda: torch.zeros(shape, dtype=torch.float64),
            lambda: torch.zeros(shape, dtype=torch.float16),
            lambda: torch.zeros((*shape, 2)).select(-1, 0),
            lambda: torch.zeros(shape[::-1]).permute(tuple(range(len(shape) - 1, -1, -1))),
            lambda: torch.zeros(3).to_sparse(),
            lambda: torch.nn.Parameter(torch.zeros(shape)),
            lambda: torch.zeros(shape, requires_grad=True),
        ]
    )()


def exponential_list() -> list[Any]:
    """Return a list of shared lists that has 2**32 leaves."""
    nested: list[Any] = [0]
    for _ in range(32):
        nested = [nested, nested]
    return nested


JUNK: list[Any] = [
    None,
    "",
    "x",
    -1,
    0,
    1,
    2**31,
    2**63,
    10**400,
    0.5,
    float("nan"),
    float("inf"),
    True,
    [],
    {},
    (),
    [None],
    [[]],
    {"a": 1},
    {1: 2},
    {"_target_": "os.system", "command": "true"},
    {"_target_": "timm.models.load_state_dict"},
    "${oc.env:HOME}",
    "\x1b[2J",
    "../../canary",
    "/dev/zero",
    "~",
    "\udcff",
    exponential_list(),
    (1, 2),
    [1e9],
    b"raw",
    {"repeat": {"times": 1e9, "layers": ["relu"]}},
    "DEFAULT",
    "cuda",
    "fp16",
    10**9,
    "cnntrain.data.files.download",
]
TEXTS = [
    b"",
    b"{",
    b"[]",
    b"5",
    b"null",
    b"\xff\xfe\x00",
    b"\x00" * 99,
    b"9" * 5000,
    b'{"a": ' * 5000,
    b'{"best": 5}',
    b'{"best": {"val/top1": "x"}, "test": []}',
    b'{"steps": "x", "best": null}',
    b"epoch,step\n1e999,nan\n",
    b'epoch\n"',
    b"a,a\n1,1\n",
    b"epoch,val/top1\n1,\x1b[2J\n",
    b"x: !!python/object/apply:os.system ['true']",
    b"a: &a {b: *a}\n",
    b"- - - -\n",
    b"x: 2001-99-99\n",
    b"a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\n" * 3,
    b"? {a: b}\n: 1\n",
]


def paths_of(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the paths of all values in nested dictionaries and lists, down to 8 levels (see `exponential_list`)."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    items = () if len(path) > 8 else items
    return [path, *(inner for key, value in items for inner in paths_of(value, (*path, key)))][not path :]


def require_file(path: Path) -> Path:
    """Return `path` if it is still a regular file; earlier damage may have made it a FIFO or a link."""
    if path.is_symlink() or not path.is_file():
        raise FileNotFoundError(path)
    return path


def damage_content(generator: random.Random, run: Path) -> str:
    """Replace or delete a few values of a checkpoint."""
    name = generator.choice(["last", "best"])
    saved = torch.load(require_file(run / "checkpoints" / f"{name}.pt"), weights_only=True)
    changes, paths = [], paths_of(saved)
    for _ in range(generator.choice([1, 1, 1, 2, 4])):
        part = generator.choice(["state", "state", "optimizer", "config", "spec", ""])
        path = generator.choice([path for path in paths if part in path] if part else paths)
        parent = saved
        try:
            for key in path[:-1]:
                parent = parent[key]
            old = parent[path[-1]]
        except (LookupError, TypeError):  # removed by an earlier change
            continue
        if isinstance(old, Tensor) and generator.random() < 0.7:
            parent[path[-1]] = other_tensor(generator, old)
        elif generator.random() < 0.1 and isinstance(parent, dict):
            del parent[path[-1]]
        else:
            parent[path[-1]] = generator.choice(JUNK)
        changes.append(f"{name}.pt: {path}")
    buffer = io.BytesIO()
    torch.save(saved, buffer)
    for target in {name, generator.choice(["last", "best"])}:
        require_file(run / "checkpoints" / f"{target}.pt").write_bytes(buffer.getvalue())
    return "; ".join(changes)


def damage_text(generator: random.Random, run: Path) -> str:
    """Truncate a file, overwrite some bytes, or replace its content."""
    file = run / generator.choice(["metrics.csv", "results.json", "run.json", "config.yaml", "checkpoints/last.pt"])
    content = require_file(file).read_bytes()
    truncated = content[: generator.randrange(len(content))]
    noise = bytearray(content)
    for _ in range(5):
        noise[generator.randrange(len(noise))] = generator.randrange(256)
    file.write_bytes(generator.choice([*TEXTS, truncated, truncated, bytes(noise), bytes(noise), content * 2]))
    return f"bytes of {file.name}"


def damage_file_type(generator: random.Random, run: Path) -> str:
    """Replace a file by another type of file or a link."""
    names = [str(path.relative_to(run)) for path in run.rglob("*")]
    new_names = [
        "figures",
        "figures/curves.png",
        "evaluate-test",
        "evaluate-test/results.json",
        ".lock",
        "config.yaml",
        "evaluate-test/examples.csv",
        "evaluate-test/.lock",
        f".config.yaml.{os.getpid()}.tmp",
    ]
    path = run / generator.choice([*names, *new_names])
    path.parent.mkdir(parents=True, exist_ok=True)
    content = path.read_bytes() if path.is_file() else None
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    canary = Path("canary").resolve()
    kind = generator.choice(
        ["file link", "folder link", "no link", "own link", "fifo", "folder", "hard link", "device"]
    )
    match kind:
        case "file link":
            target = canary / f"copy-{path.name}"
            if content is not None:
                target = canary / "same"  # a valid link to a copy
            path.symlink_to(target)
        case "folder link":
            path.symlink_to(canary / "folder")
        case "no link":
            path.symlink_to(canary / "new")
        case "own link":
            path.symlink_to(path.name)
        case "fifo":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
        case "hard link":
            path.hardlink_to(canary / "same")
        case "device":
            path.symlink_to("/dev/zero")
    return f"{kind} at {path.relative_to(run)}"


def make_canary(run: Path) -> None:
    """Write files that no command may change; some have the content of files in a run folder."""
    shutil.rmtree("canary", ignore_errors=True)
    folder = Path("canary/folder")
    folder.mkdir(parents=True)
    for name in ("last.pt", "best.pt"):
        shutil.copy(run / "checkpoints" / name, folder / name)
    (folder / "mine.txt").write_text("mine")
    (folder / ".last.pt.1.tmp").write_text("mine")
    Path("canary/same").write_bytes((run / "metrics.csv").read_bytes())
    for path in Path("canary").rglob("*"):
        os.utime(path, (1e9, 1e9))
    os.utime("canary", (1e9, 1e9))


def snapshot(folder: Path) -> dict[str, tuple[float, str]]:
    """Return modification time and hash of everything below a folder."""
    return {
        str(path): (
            path.lstat().st_mtime,
            hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "",
        )
        for path in (folder, *sorted(folder.rglob("*")))
    }


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create a folder with two runs: one that ended after an epoch, and one within its first epoch."""
    folder = tmp_path_factory.mktemp("runs")
    for name, length in (("run", "epochs=1"), ("part", "steps=2")):
        assert main([*QUICK, length, f"run_dir={folder / name}"]) == 0
    return folder


class CommandHangs(BaseException):
    """Not an Exception, so that the tested code does not catch it."""


@contextmanager
def time_limit(what: str) -> Iterator[None]:
    def hang(*_: object) -> None:
        raise CommandHangs(what)

    before = signal.signal(signal.SIGALRM, hang)
    signal.alarm(TIMEOUT_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture
def no_process(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    started: list[str] = []

    def refuse(name: str) -> Callable[..., Any]:
        def start(*words: object, **more: object) -> Any:
            started.append(f"{name} {words!r}"[:200])
            raise PermissionError("no process may be started")

        return start

    import matplotlib.font_manager  # noqa: F401  (its first import on a machine runs `fc-list`)

    monkeypatch.setattr(subprocess, "Popen", refuse("Popen"))
    functions = """
        system popen posix_spawn posix_spawnp fork forkpty execv execve execvp execvpe execl execle execlp spawnv
        spawnve spawnvp
    """
    for name in functions.split():
        monkeypatch.setattr(os, name, refuse(name))
    return started


def run_case(number: int, runs: Path, started: list[str]) -> int:
    """Damage a copy of a run, run a command on it and return the exit code."""
    generator = random.Random(number)
    shutil.rmtree("case", ignore_errors=True)
    shutil.copytree(runs / generator.choice(["run", "part"]), "case/run")
    run = Path("case/run")
    changes = []
    for _ in range(generator.choice([1, 1, 2])):
        damage = generator.choice([damage_content, damage_content, damage_text, damage_file_type, damage_file_type])
        try:
            changes.append(damage(generator, run))
        except Exception:  # incompatible with the previous damage
            continue
    command = generator.choice(list(COMMANDS))
    what = f"case {number}: {command}: {'; '.join(changes)}"
    before = snapshot(Path("canary"))
    started.clear()
    with time_limit(what):
        try:
            code = main(list(COMMANDS[command]))
        except BaseException as error:
            raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error
    assert code in (0, 1, 2, 3, 4), f"{what}: exit code {code}"
    assert snapshot(Path("canary")) == before, f"{what}: changed other files"
    assert not started, f"{what}: {started}"
    return code


@pytest.fixture
def case(runs: Path, no_process: list[str]) -> Callable[[int], int]:
    make_canary(runs / "run")
    Image.new("RGB", (12, 10), (90, 120, 30)).save("image.png")
    return lambda number: run_case(number, runs, no_process)


@pytest.mark.slow
def test_valid_run_folders_are_accepted(case: Callable[[int], int], runs: Path) -> None:
    for command, words in COMMANDS.items():
        shutil.rmtree("case", ignore_errors=True)
        shutil.copytree(runs / "run", "case/run")
        assert main(list(words)) == 0, command


def test_a_sample_of_damaged_run_folders_is_handled(case: Callable[[int], int]) -> None:
    codes = [case(number) for number in range(4)]
    assert 2 in codes


@pytest.mark.long
def test_many_damaged_run_folders_are_handled(case: Callable[[int], int]) -> None:
    codes, findings = [], []
    for number in range(1000, 1000 + EXAMPLES):
        try:
            codes.append(case(number))
        except AssertionError as finding:
            findings.append(str(finding).splitlines()[0][:400])
    print({code: codes.count(code) for code in sorted(set(codes))})
    assert not findings, "\n".join([f"{len(findings)} findings", *findings])
