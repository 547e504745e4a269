"""Limits of config files; tests/faults/test_security.py has more cases."""

from pathlib import Path

import pytest

from cnntrain.config.yaml_files import MAX_BYTES, check_yaml_files, check_yaml_text, yaml_files
from cnntrain.errors import UserError

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9)
)


@pytest.mark.parametrize(
    ("text", "where"),
    [(BOMB, "x.yaml:5: .*values"), ("a: &a [*a]", "x.yaml:1: .*itself"), ("[" * 60 + "]" * 60, "x.yaml:1: .*deep")],
)
def test_texts_that_expand_too_far_are_rejected(text: str, where: str) -> None:
    with pytest.raises(UserError, match=where):
        check_yaml_text(Path("x.yaml"), text)


def test_shared_anchors_are_accepted() -> None:
    check_yaml_text(Path("x.yaml"), "base: &b {width: 1}\nlayers: [*b, *b]\n")


def test_files_of_all_levels_are_checked(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "top.yaml").write_text("a: 1\n")
    (tmp_path / "model" / "large.yaml").write_text("# " + "x" * MAX_BYTES)
    assert [file.name for file in yaml_files(tmp_path)] == ["large.yaml", "top.yaml"]
    with pytest.raises(UserError, match=r"large\.yaml"):
        check_yaml_files(tmp_path)
