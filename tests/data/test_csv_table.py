"""CSV files: where they are found, coordinates, and labels that resemble numbers."""

import math
from pathlib import Path

import pytest

from cnntrain.data.csv_table import find_csv, parse_number, sort_labels
from cnntrain.errors import UserError


def test_a_moved_csv_file_is_found_in_the_new_root(tmp_path: Path) -> None:
    file = tmp_path / "list.csv"
    file.write_text("path,label\n")
    assert find_csv("/where/it/was/list.csv", str(tmp_path), "") == (file, tmp_path)
    assert find_csv(None, str(tmp_path), "") == (file, tmp_path)
    assert find_csv(str(file), None, "") == (file, tmp_path)


def test_several_csv_files_in_the_root_are_rejected(tmp_path: Path) -> None:
    for name in ("a.csv", "b.csv"):
        (tmp_path / name).write_text("")
    with pytest.raises(UserError, match=r"data\.file: .*a\.csv, b\.csv"):
        find_csv(None, str(tmp_path), "")


@pytest.mark.parametrize("label", ["--5", "9" * 5000, "\u0663"])
def test_labels_that_resemble_numbers_are_names(label: str) -> None:
    assert sort_labels(["10", "9", label]) == tuple(sorted(["10", "9", label]))
    assert sort_labels(["10", "9"]) == ("9", "10")


@pytest.mark.parametrize(("text", "value"), [("1.5", 1.5), ("-1e6", -1e6)])
def test_coordinates(text: str, value: float) -> None:
    assert parse_number(text) == value
    assert all(math.isnan(parse_number(wrong)) for wrong in ("", "x", "nan", "inf", "1e7"))
