"""The reference of config keys, read from YAML comments."""

from pathlib import Path

import pytest

from cnntrain.config.reference import KeyReference, common_keys, describe, group_options, option_keys, read_keys
from cnntrain.errors import UserError

TEXT = """# A header.
_target_: nets.Net
width: 8                # channels,
                        # of all layers
word: 'a # b'           # quoted
plain:
sizes: [1, 2]           # a list
part:                   # keys below
  depth: 2.5            # of the part
layers:
  - conv: 3             # of a list
"""


def test_keys_defaults_and_comments_are_read() -> None:
    assert read_keys(TEXT, "model.") == [
        KeyReference("model.width", "8", "channels, of all layers"),
        KeyReference("model.word", "'a # b'", "quoted"),
        KeyReference("model.sizes", "[1, 2]", "a list"),
        KeyReference("model.part", "", "keys below"),
        KeyReference("model.part.depth", "2.5", "of the part"),
        KeyReference("model.layers", "[...]", ""),
    ]


def test_every_common_key_has_a_comment() -> None:
    keys = common_keys()
    parents = {each.key.rpartition(".")[0] for each in keys}
    assert [each.key for each in keys if not each.comment and each.key not in parents] == []


@pytest.mark.parametrize("group", sorted(group_options()))
def test_every_option_has_a_reference(group: str) -> None:
    for option in group_options()[group]:
        text = describe(f"{group}={option}")
        assert text.startswith(f"{group}={option}\n  "), option
        assert all(each.key in text for each in option_keys(group, option))


def test_options_of_the_user_are_included(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "own.yaml").write_text(TEXT)
    assert "model.part.depth: 2.5" in describe("model=own", tmp_path)
    assert "own" in describe("model.width", tmp_path) and "A header." in describe("model", tmp_path)


@pytest.mark.parametrize("word", ["", "nothing", "data=", "data=nowhere", "optimizer.", "a=b"])
def test_unknown_words_are_rejected(word: str) -> None:
    if word == "data=":
        assert describe(word) == describe("data")
    else:
        with pytest.raises(UserError):
            describe(word)
