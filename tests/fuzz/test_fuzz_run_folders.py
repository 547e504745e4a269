"""Run folders from anyone: each command ends with a documented exit code, starts no process and touches nothing else.

A case is a number: it says what is damaged, and how, and which command meets it.
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
CASE_S = 60  # after which a command counts as one that hangs
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
    "resume what is done": (*QUICK, "epochs=1", "run_dir=case/run", "resume=auto"),
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


def kinds_of_tensors(generator: random.Random, like: Tensor) -> Tensor:
    """A tensor in place of `like`: other in shape, type, stride, or in what it holds."""
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


def doubled() -> list[Any]:
    found: list[Any] = [0]
    for _ in range(32):
        found = [found, found]
    return found


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
    doubled(),
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


def places(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where something stands in nested dictionaries and lists, down to 8 levels: one may be doubled 32 times."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    items = () if len(path) > 8 else items
    return [path, *(place for key, value in items for place in places(value, (*path, key)))][not path :]


def regular(path: Path) -> Path:
    """`path`, which is still a file: what was made of it before may be a FIFO."""
    if path.is_symlink() or not path.is_file():
        raise FileNotFoundError(path)
    return path


def spoil_content(generator: random.Random, run: Path) -> str:
    """Something else in a few places of a checkpoint."""
    name = generator.choice(["last", "best"])
    saved = torch.load(regular(run / "checkpoints" / f"{name}.pt"), weights_only=True)
    told, every = [], places(saved)
    for _ in range(generator.choice([1, 1, 1, 2, 4])):
        wanted = generator.choice(["state", "state", "optimizer", "config", "spec", ""])
        where = generator.choice([place for place in every if wanted in place]) if wanted else generator.choice(every)
        parent = saved
        try:
            for key in where[:-1]:
                parent = parent[key]
            old = parent[where[-1]]
        except (LookupError, TypeError):  # what was there is gone
            continue
        if isinstance(old, Tensor) and generator.random() < 0.7:
            parent[where[-1]] = kinds_of_tensors(generator, old)
        elif generator.random() < 0.1 and isinstance(parent, dict):
            del parent[where[-1]]
        else:
            parent[where[-1]] = generator.choice(JUNK)
        told.append(f"{name}.pt: {where}")
    buffer = io.BytesIO()
    torch.save(saved, buffer)
    for each in {name, generator.choice(["last", "best"])}:
        regular(run / "checkpoints" / f"{each}.pt").write_bytes(buffer.getvalue())
    return "; ".join(told)


def spoil_text(generator: random.Random, run: Path) -> str:
    file = run / generator.choice(["metrics.csv", "results.json", "run.json", "config.yaml", "checkpoints/last.pt"])
    whole = regular(file).read_bytes()
    half = whole[: generator.randrange(len(whole))]
    noise = bytearray(whole)
    for _ in range(5):
        noise[generator.randrange(len(noise))] = generator.randrange(256)
    file.write_bytes(generator.choice([*TEXTS, half, half, bytes(noise), bytes(noise), whole * 2]))
    return f"bytes of {file.name}"


def spoil_kind(generator: random.Random, run: Path) -> str:
    """Another kind of file, or a link, in place of one."""
    names = [str(path.relative_to(run)) for path in run.rglob("*")]
    made = [
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
    path = run / generator.choice([*names, *made])
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = path.read_bytes() if path.is_file() else None
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
            if kept is not None:
                target = canary / "same"  # what was there, elsewhere: a link that would work
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
    """Files that nobody may touch; some are what a link in a run folder would be taken for."""
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


def look(folder: Path) -> dict[str, tuple[float, str]]:
    """Time and content of everything below a folder."""
    return {
        str(path): (
            path.lstat().st_mtime,
            hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "",
        )
        for path in (folder, *sorted(folder.rglob("*")))
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two runs: one that ended with an epoch, one that ended in the middle of its first."""
    folder = tmp_path_factory.mktemp("whole")
    for name, length in (("run", "epochs=1"), ("part", "steps=2")):
        assert main([*QUICK, length, f"run_dir={folder / name}"]) == 0
    return folder


class Hangs(BaseException):
    """No Exception: nothing that is tested takes it for its own."""


@contextmanager
def ends_in_time(what: str) -> Iterator[None]:
    def hang(*_: object) -> None:
        raise Hangs(what)

    before = signal.signal(signal.SIGALRM, hang)
    signal.alarm(CASE_S)
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

    import matplotlib.font_manager  # noqa: F401  (its first import on a machine asks `fc-list` for fonts)

    monkeypatch.setattr(subprocess, "Popen", refuse("Popen"))
    for name in (
        "system",
        "popen",
        "posix_spawn",
        "posix_spawnp",
        "fork",
        "forkpty",
        "execv",
        "execve",
        "execvp",
        "execvpe",
        "execl",
        "execle",
        "execlp",
        "spawnv",
        "spawnve",
        "spawnvp",
    ):
        monkeypatch.setattr(os, name, refuse(name))
    return started


def run_case(number: int, whole: Path, started: list[str]) -> int:
    """Damage a copy of the run, and let a command meet it; the exit code."""
    generator = random.Random(number)
    shutil.rmtree("case", ignore_errors=True)
    shutil.copytree(whole / generator.choice(["run", "part"]), "case/run")
    run = Path("case/run")
    told = []
    for _ in range(generator.choice([1, 1, 2])):
        spoil = generator.choice([spoil_content, spoil_content, spoil_text, spoil_kind, spoil_kind])
        try:
            told.append(spoil(generator, run))
        except Exception:  # two that don't go together, as bytes and then content
            continue
    command = generator.choice(list(COMMANDS))
    what = f"case {number}: {command}: {'; '.join(told)}"
    before = look(Path("canary"))
    started.clear()
    with ends_in_time(what):
        try:
            code = main(list(COMMANDS[command]))
        except BaseException as error:
            raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error
    assert code in (0, 1, 2, 3, 4), f"{what}: exit code {code}"
    assert look(Path("canary")) == before, f"{what}: touched what is not its own"
    assert not started, f"{what}: {started}"
    return code


@pytest.fixture
def case(whole: Path, no_process: list[str]) -> Callable[[int], int]:
    make_canary(whole / "run")
    Image.new("RGB", (12, 10), (90, 120, 30)).save("image.png")
    return lambda number: run_case(number, whole, no_process)


@pytest.mark.slow
def test_a_sound_folder_passes(case: Callable[[int], int], whole: Path) -> None:
    for command, words in COMMANDS.items():
        shutil.rmtree("case", ignore_errors=True)
        shutil.copytree(whole / "run", "case/run")
        assert main(list(words)) == 0, command


def test_a_sample_of_damaged_folders(case: Callable[[int], int]) -> None:
    codes = [case(number) for number in range(4)]
    assert 2 in codes


@pytest.mark.long
def test_damaged_folders(case: Callable[[int], int]) -> None:
    codes, findings = [], []
    for number in range(1000, 1000 + EXAMPLES):
        try:
            codes.append(case(number))
        except AssertionError as finding:
            findings.append(str(finding).splitlines()[0][:400])
    print({code: codes.count(code) for code in sorted(set(codes))})
    assert not findings, "\n".join([f"{len(findings)} findings", *findings])
