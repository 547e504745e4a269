"""Folders of data files."""

from pathlib import Path

import pytest

from cnntrain.data.files import default_root
from cnntrain.errors import UserError


def test_default_root_needs_a_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(UserError, match=r"HOME or XDG_CACHE_HOME"):
        default_root()
