"""Reading the commit of a working directory without running git or anything named in its config."""

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from cnntrain.io import git as git_module
from cnntrain.io.git import Commit, find_commit
from cnntrain.train.run_dir import provenance

GIT = shutil.which("git")
needs_git = pytest.mark.skipif(GIT is None, reason="git is not installed")


def git(*words: str) -> str:
    who = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "init.defaultBranch=main")
    clean = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    done = subprocess.run(["git", *who, *words], check=True, capture_output=True, text=True, env=clean)
    return done.stdout.strip()


@pytest.fixture
def repository(own_folder: Path, request: pytest.FixtureRequest) -> Path:
    root = own_folder / "repo"
    (root / "below" / "deep").mkdir(parents=True)
    (root / "a.py").write_text("print(1)\n")
    (root / "below" / "b.py").write_text("print(2)\n")
    (root / "below" / "bé.py").write_text("")
    (root / "below" / ("x" * 150)).write_text("long")  # its length takes two bytes in an index of version 4
    for length in range(1, 10):  # all paddings of an index of version 2
        (root / ("c" * length)).touch()
    (root / "link").symlink_to("a.py")
    os.chdir(root)
    git("init", "-q", f"--object-format={getattr(request, 'param', 'sha1')}")
    git("add", ".")
    git("commit", "-qm", "first")
    return root


@needs_git
@pytest.mark.parametrize("version", ["2", "4"])
@pytest.mark.parametrize("how", ["branch", "packed", "detached", "worktree", "below"])
def test_the_commit_is_that_of_git_rev_parse(repository: Path, how: str, version: str) -> None:
    git("update-index", "--index-version", version)
    folder = repository
    match how:
        case "packed":
            git("pack-refs", "--all")
            assert not Path(".git/refs/heads/main").exists()
        case "detached":
            git("checkout", "-q", "--detach")
        case "worktree":
            git("worktree", "add", "-q", "../other", "-b", "another")
            folder = repository.parent / "other"
        case "below":
            folder = repository / "below" / "deep"
    assert find_commit(folder) == Commit(git("rev-parse", "HEAD"), False)


@needs_git
@pytest.mark.parametrize("repository", ["sha1", "sha256"], indirect=True)
def test_a_changed_tracked_file_makes_the_commit_dirty(repository: Path) -> None:
    file, name = Path("below/b.py"), git("rev-parse", "HEAD")
    before, later = file.stat(), time.time() + 5
    assert find_commit(repository) == Commit(name, False)
    os.utime(file, (later, later))
    assert find_commit(repository) == Commit(name, False), "touched, with the same content"
    file.write_text("print(3)\n")
    os.utime(file, (later, later))
    assert find_commit(repository) == Commit(name, True), "the same size"
    file.write_text("print(33)\n")
    assert find_commit(repository) == Commit(name, True)
    os.utime(file, ns=(0, before.st_mtime_ns))
    assert find_commit(repository) == Commit(name, True), "another size at the same time"
    file.unlink()
    assert find_commit(repository) == Commit(name, True)
    git("checkout", "-q", "below/b.py")
    Path("new.py").touch()
    assert find_commit(repository) == Commit(name, False), "git does not know it"


@needs_git
@pytest.mark.parametrize("version", ["2", "4"])
@pytest.mark.parametrize("flag", ["--assume-unchanged", "--skip-worktree"])
def test_files_marked_as_unchanged_are_ignored(repository: Path, flag: str, version: str) -> None:
    name = git("rev-parse", "HEAD")
    git("update-index", "--index-version", version)
    git("update-index", flag, "below/b.py")
    Path("below/b.py").unlink()
    assert find_commit(repository) == Commit(name, False)
    Path("c").write_text("comes later in the index")
    assert find_commit(repository) == Commit(name, True)


@needs_git
def test_submodules_are_ignored(repository: Path) -> None:
    name = git("rev-parse", "HEAD")
    git("update-index", "--add", "--cacheinfo", f"160000,{name},module")
    Path("module").mkdir()
    assert find_commit(repository) == Commit(name, False)


@needs_git
def test_an_unfinished_merge_is_dirty(repository: Path) -> None:
    for branch, text in (("one", "1"), ("two", "2")):
        git("checkout", "-q", "-b", branch, "main")
        Path("a.py").write_text(text)
        git("commit", "-qam", branch)
    with pytest.raises(subprocess.CalledProcessError):
        git("merge", "-q", "one")
    assert find_commit(repository) == Commit(git("rev-parse", "HEAD"), True)


@needs_git
@pytest.mark.parametrize("path", [b"../../b.py", b"/elow/b.py", b"below/../b"])
def test_paths_outside_the_repository_are_rejected(repository: Path, path: bytes) -> None:
    index = Path(".git/index").read_bytes()
    assert index.count(b"below/b.py") == 1
    Path(".git/index").write_bytes(index.replace(b"below/b.py", path))
    assert find_commit(repository) == Commit(git("rev-parse", "HEAD"), None)


@needs_git
def test_dirty_is_unknown_beyond_the_size_limit(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("large", "larger"):
        Path(name).write_bytes(bytes(60_000))
    git("add", ".")
    git("commit", "-qm", "second")
    commit = git("rev-parse", "HEAD")
    for name in ("large", "larger"):
        os.utime(name, (0, 0))
    assert find_commit(repository) == Commit(commit, False)
    monkeypatch.setattr(git_module, "MAX_BYTES", 119_999)
    assert find_commit(repository) == Commit(commit, None)
    monkeypatch.setattr(git_module, "MAX_BYTES", 120_000)
    assert find_commit(repository) == Commit(commit, False)


@needs_git
def test_no_program_is_started(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch = f"touch {repository / 'touched'}"
    Path(".gitattributes").write_text("* filter=evil diff=evil\n")
    for key in (
        "core.fsmonitor filter.evil.clean filter.evil.process diff.evil.textconv core.pager core.sshCommand core.editor"
    ).split():
        git("config", key, touch)
    hooks = repository / ".git" / "hooks"
    hooks.mkdir(exist_ok=True)
    (hooks / "post-index-change").write_text(f"#!/bin/sh\n{touch}\n")
    (hooks / "post-index-change").chmod(0o755)
    Path("a.py").write_text("print(4)\n")

    def refuse(*words: object, **more: object) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    monkeypatch.setattr(os, "system", refuse)
    monkeypatch.setattr(os, "posix_spawn", refuse)
    said = provenance("cnntrain")
    assert said["git_dirty"] is True and len(said["git"]) == 40 and not Path("touched").exists()


def head(text: str) -> None:
    Path(".git").mkdir()
    Path(".git/HEAD").write_text(text)


def test_invalid_git_files_give_no_commit(own_folder: Path) -> None:
    Path("secret").write_text("hunter2")
    for text in ("ref: ../secret", "ref: refs/../../secret", "hunter2", "", "ref: refs/heads/none", "\0"):
        head(text)
        assert find_commit(own_folder) is None
        shutil.rmtree(".git")
    head("ref: refs/heads/main")
    Path(".git/refs/heads").mkdir(parents=True)
    Path(".git/refs/heads/main").symlink_to(own_folder / "secret")
    assert find_commit(own_folder) is None
    shutil.rmtree(".git")
    head("0" * 40)
    for index in (b"", b"DIRC", b"DIRC\0\0\0\2\0\0\0\1", b"DIRC\0\0\0\2\xff\xff\xff\xff" + bytes(70)):
        Path(".git/index").write_bytes(index)
        assert find_commit(own_folder) == Commit("0" * 40, None)
    Path(".git/index").unlink()
    os.mkfifo(".git/index")
    assert find_commit(own_folder) == Commit("0" * 40, None)
    Path(".git/HEAD").unlink()
    os.mkfifo(".git/HEAD")
    assert find_commit(own_folder) is None


def test_a_packed_branch_is_found_by_its_whole_name(own_folder: Path) -> None:
    head("ref: refs/heads/main")
    lines = (f"{'1' * 40} refs/aaa/refs/heads/main", f"{'2' * 40} refs/heads/main", f"^{'3' * 40}")
    Path(".git/packed-refs").write_text("\n".join(["# pack-refs with: peeled", *lines]))
    assert find_commit(own_folder) == Commit("2" * 40, None)


def test_outside_a_repository_there_is_no_commit(own_folder: Path) -> None:
    assert find_commit(own_folder) is None and "git" not in provenance("cnntrain")
