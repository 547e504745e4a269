"""Run the command in its own process, and break things around it."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from PIL import Image

from tests.fork_server import ForkServer

COMMAND = shutil.which("cnntrain", path=os.path.dirname(sys.executable)) or shutil.which("cnntrain")
QUICK = ("model=mlp", "threads=1", "log.figures=false", "log.tensorboard=false", "data.limit=200")


@dataclass
class Cnntrain:
    """The command, with arguments that make a run take a second."""

    fork_server: ForkServer
    quick: tuple[str, ...] = QUICK
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    def start(self, *arguments: str, around: Sequence[str] = (), **environment: str) -> subprocess.Popen[str]:
        """Start the installed command in a process group of its own.

        Args:
            around: a command that runs it, as `unshare -n`.
        """
        assert COMMAND, "the package is not installed: pip install -e ."
        process = subprocess.Popen(
            [*around, COMMAND, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env={**os.environ, **environment},
        )
        self.started.append(process)
        return process

    def __call__(
        self, *arguments: str, code: int = 0, around: Sequence[str] = (), timeout_s: float = 240, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Run the command to its end; it must exit with `code`, and only a bug may show a traceback."""
        if around:
            return self.end(self.start(*arguments, around=around, **environment), code, timeout_s)
        environment = {**os.environ, **environment}
        done = self.fork_server.run(*arguments, environment=environment, timeout_s=timeout_s)
        return check_ended(done, code)

    def end(
        self, process: subprocess.Popen[str], code: int, timeout_s: float = 240
    ) -> subprocess.CompletedProcess[str]:
        out, error = process.communicate(timeout=timeout_s)
        return check_ended(subprocess.CompletedProcess(process.args, process.returncode, out, error), code)

    def refused(self, *arguments: str, code: int = 2, around: Sequence[str] = (), **environment: str) -> str:
        """The message of a call that must be refused: the last block on stderr; nothing may have been written."""
        before = files()
        said = self(*arguments, code=code, around=around, **environment).stderr
        assert files() == before, "a refused call left something behind"
        return message(said)


def check_ended(done: subprocess.CompletedProcess[str], code: int) -> subprocess.CompletedProcess[str]:
    assert done.returncode == code, f"{done.returncode}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr, done.stderr
    return done


def files() -> set[str]:
    """Return the paths below the working folder, without the program's cache."""
    return {str(p) for p in Path().rglob("*") if not str(p).startswith("cache")}


def message(stderr: str) -> str:
    """Return the last block of stderr, which must be an error message."""
    lines = stderr.rstrip("\n").split("\n")
    begins = [number for number, line in enumerate(lines) if line.startswith("error: ")]
    assert begins, stderr
    return "\n".join(lines[begins[-1] :])


def kill_group(process: subprocess.Popen[str], number: int = signal.SIGKILL) -> None:
    os.killpg(process.pid, number)


@pytest.fixture
def cnntrain(monkeypatch: pytest.MonkeyPatch, own_folder: Path, fork_server: ForkServer) -> Iterator[Cnntrain]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(own_folder / "cache"))
    command = Cnntrain(fork_server)
    yield command
    for process in command.started:
        if process.poll() is None:
            kill_group(process)
            process.communicate()


@pytest.fixture(scope="session")
def trained_once(tmp_path_factory: pytest.TempPathFactory, fork_server: ForkServer) -> Path:
    """A finished run of one epoch."""
    folder = tmp_path_factory.mktemp("once") / "run"
    Cnntrain(fork_server)(*QUICK, "epochs=1", f"run_dir={folder}")
    return folder


@pytest.fixture
def trained(trained_once: Path, own_folder: Path) -> Path:
    """A finished run of one epoch in `run`, which tests may modify."""
    shutil.copytree(trained_once, own_folder / "run")
    return Path("run")


@pytest.fixture
def wait_for() -> Callable[..., None]:
    def wait(true: Callable[[], object], process: subprocess.Popen[str], seconds: float = 120) -> None:
        """Until `true()`, which must come while the process runs."""
        until = time.monotonic() + seconds
        while not true():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < until, "it never came"
            time.sleep(0.01)

    return wait


@pytest.fixture
def make_images(own_folder: Path) -> Callable[..., Path]:
    def make(root: str = "images", splits: Sequence[str] = ("train",), count: int = 6) -> Path:
        """root/SPLIT/CLASS/N.png, two classes of `count` images of 12 x 12 px, one darker than the other."""
        for split in splits:
            for shade, name in ((60, "dark"), (180, "light")):
                folder = own_folder / root / split / name
                folder.mkdir(parents=True)
                for number in range(count):
                    Image.new("RGB", (12, 12), (shade + number, shade, shade - number)).save(folder / f"{number}.png")
        return Path(root)

    return make


@pytest.fixture
def inside_namespace() -> Callable[..., list[str]]:
    def around(script: str, *options: str) -> list[str]:
        """A command that runs another in namespaces of its own, after `script`; skips where that is not allowed."""
        command = ["unshare", "--user", "--map-root-user", *options]
        allowed = shutil.which("unshare") and subprocess.run(
            [*command, "sh", "-c", script], capture_output=True, check=False
        )
        if not allowed or allowed.returncode:
            why = allowed.stderr.decode().strip() if allowed else "there is no unshare"
            pytest.skip(f"namespaces and tmpfs are not allowed here: {why}")
        return [*command, "sh", "-c", f'{script} && exec "$@"', "sh"]

    return around
