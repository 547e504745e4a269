"""Files of a run folder: regular files only, written atomically, never through a link."""

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from cnntrain.errors import UserError
from cnntrain.io import safe_files as files

READERS: list[Callable[[Path], object]] = [files.open_read, files.read_bytes, files.read_text]
OPENERS: list[Callable[[Path], object]] = [*READERS, files.open_append, files.open_lock]


@pytest.fixture
def outside(own_folder: Path) -> Path:
    """A file outside the run folder `run`."""
    (own_folder / "run").mkdir()
    (own_folder / "outside").write_text("mine")
    return own_folder / "outside"


@pytest.mark.parametrize("opener", OPENERS)
@pytest.mark.parametrize("kind", ["link", "dangling", "fifo", "folder", "device"])
def test_only_regular_files_are_opened(opener: Callable[[Path], object], kind: str, outside: Path) -> None:
    path = Path("run/file")
    match kind:
        case "link":
            path.symlink_to(outside)
        case "dangling":
            path.symlink_to(outside.with_name("nothing"))
        case "fifo":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
        case "device":
            path.symlink_to("/dev/zero")
    with pytest.raises(UserError):
        opener(path)
    assert outside.read_text() == "mine" and not outside.with_name("nothing").exists()


@pytest.mark.parametrize("kind", ["link", "hard link", "dangling", "fifo", "temporary"])
def test_writing_replaces_links_and_special_files(kind: str, outside: Path) -> None:
    path = Path("run/file")
    match kind:
        case "link":
            path.symlink_to(outside)
        case "hard link":
            path.hardlink_to(outside)
        case "dangling":
            path.symlink_to(outside.with_name("nothing"))
        case "fifo":
            os.mkfifo(path)
        case "temporary":
            Path(f"run/.file.{os.getpid()}.tmp").symlink_to(outside)
    files.write_atomic(path, b"new")
    assert stat.S_ISREG(path.lstat().st_mode) and path.read_bytes() == b"new"
    assert outside.read_text() == "mine" and not outside.with_name("nothing").exists()
    assert [each.name for each in Path("run").iterdir()] == ["file"]


@pytest.mark.parametrize("sync", [True, False])
def test_content_is_synced_before_the_file_is_renamed(sync: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the file could be empty after a power failure."""
    path, calls, (fsync, replace) = Path("file"), [], (os.fsync, os.replace)

    def record_fsync(descriptor: int) -> None:
        status = os.fstat(descriptor)
        calls.append("folder" if stat.S_ISDIR(status.st_mode) else f"{status.st_size} bytes")
        fsync(descriptor)

    def record_replace(*arguments: str, **folders: int) -> None:
        calls.append("replace")
        replace(*arguments, **folders)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", record_replace)
    files.write_atomic(path, b"new", sync=sync)
    assert calls == (["3 bytes", "replace", "folder"] if sync else ["replace"])
    assert path.read_bytes() == b"new"


def test_a_failed_write_leaves_the_old_file_and_no_temporary_file(outside: Path) -> None:
    path = Path("run/file")
    path.write_text("old")
    with pytest.raises(RuntimeError, match="half"), files.open_atomic(path) as file:  # noqa: PT012
        file.write(b"half")
        raise RuntimeError("half")
    assert path.read_text() == "old" and len(list(Path("run").iterdir())) == 1
    Path("run/folder").mkdir()
    with pytest.raises(IsADirectoryError) as caught:
        files.write_atomic(Path("run/folder"), b"new")
    assert caught.value.filename == "run/folder" and len(list(Path("run").iterdir())) == 2


def test_line_endings_are_not_translated() -> None:
    with files.open_atomic_text(Path("file")) as file:
        file.write("é\udcff\r\n")
    assert Path("file").read_bytes() == "é\\udcff\r\n".encode()


OPEN = (files.open_read, files.open_append, files.open_new, files.open_lock)
CHANGE = (lambda path, root: files.write_atomic(path, b"new", root), files.make_folder, files.remove)


@pytest.mark.parametrize("call", [*OPEN, *CHANGE])
def test_linked_folders_are_not_followed(call: Callable[[Path, Path], object]) -> None:
    Path("elsewhere").mkdir()
    Path("elsewhere/file").write_text("mine")
    Path("run").mkdir()
    Path("run/figures").symlink_to("../elsewhere")
    with pytest.raises(UserError):
        call(Path("run/figures/file"), Path("run"))
    with pytest.raises(UserError):
        call(Path("run/figures/../../elsewhere/file"), Path("run"))
    assert Path("elsewhere/file").read_text() == "mine" and len(list(Path("elsewhere").iterdir())) == 1
    assert not files.is_regular(Path("run/figures/file"), Path("run"))


@pytest.mark.parametrize("path", ["run/../outside", "run/figures/../../outside", "run/figures/.."])
def test_paths_outside_the_root_are_rejected(path: str, outside: Path) -> None:
    Path("run/figures").mkdir()
    for call in (files.open_read, files.open_append, files.remove):
        with pytest.raises(UserError, match="lies outside"):
            call(Path(path), Path("run"))
    assert outside.read_text() == "mine"


def test_links_above_the_root_are_followed() -> None:
    Path("disk").mkdir()
    Path("outputs").symlink_to("disk")
    root = Path("outputs/run")
    files.make_folder(root / "figures", Path("outputs"))
    files.write_atomic(root / "figures/a.png", b"png", root)
    assert Path("disk/run/figures/a.png").read_bytes() == b"png"
    assert files.is_regular(root / "figures/a.png", root) and files.is_folder(root / "figures", root)


def test_hard_links_are_not_appended_to(outside: Path) -> None:
    Path("run/log.txt").hardlink_to(outside)
    with pytest.raises(UserError):
        files.open_append(Path("run/log.txt"))
    with files.open_append(Path("run/other.txt")) as file:
        file.write(b"a")
    with files.open_append(Path("run/other.txt")) as file:
        file.write(b"b")
    assert outside.read_text() == "mine" and Path("run/other.txt").read_bytes() == b"ab"


def test_opened_files_have_their_name() -> None:
    """A child process finds the log of its parent by this name."""
    with files.open_append_text(Path("log.txt")) as log:
        print("é", file=log)
        assert log.name == "log.txt" and Path("log.txt").read_text("utf-8") == "é\n"


def test_a_lock_file_keeps_its_content() -> None:
    Path(".lock").write_text("kept")
    files.open_lock(Path(".lock")).close()
    assert Path(".lock").read_text() == "kept"


def test_size_and_encoding_are_validated() -> None:
    Path("file").write_bytes(b"ab\n\xff")
    with pytest.raises(UserError, match=r"file:2:"):
        files.read_text(Path("file"))
    with pytest.raises(UserError):
        files.read_bytes(Path("file"), max_bytes=3)
    assert files.read_bytes(Path("file"), max_bytes=4) == b"ab\n\xff"
    with pytest.raises(FileNotFoundError):
        files.read_text(Path("missing"))


def test_no_file_descriptors_leak() -> None:
    Path("run").mkdir()
    Path("run/link").symlink_to("nothing")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        files.write_atomic(Path("run/a/b").parent.with_name("c"), b"")
        files.make_folder(Path("run/a/b"), Path("run"))
        for call in (files.open_read, files.open_append, files.make_folder):
            with pytest.raises(UserError):
                call(Path("run/link"))
    assert len(os.listdir("/proc/self/fd")) == before
