"""Folders of data files."""

from pathlib import Path

import pytest

from cnntrain.data.files import BadFile, byte_range, cache_folder, raise_if_bad
from cnntrain.errors import UserError


def test_the_cache_folder_needs_a_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(UserError, match=r"HOME or XDG_CACHE_HOME"):
        cache_folder()


def test_a_file_with_several_bad_objects_counts_once() -> None:
    with pytest.raises(UserError, match="1 of 2 files") as caught:
        raise_if_bad([BadFile("a.jpg", "is empty")] * 3, total=2)
    assert str(caught.value).count("a.jpg") == 1


def test_a_file_with_another_prefix_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abcdef")
    whole = byte_range(str(tmp_path / "a"))
    assert [whole.read(prefix=prefix) for prefix in (b"", b"abc", b"abd")] == [b"abcdef", b"abcdef", b""]
    assert whole._replace(offset=2, size=2).read(prefix=b"cd") == b"cd"
    assert whole._replace(offset=2, size=2).read(prefix=b"cde") == b""
