"""Folders of cats with .cat files."""

import logging
import shutil

import pytest

from cnntrain.data.sources.cat_folder import CatFolder
from cnntrain.errors import UserError

CAT_LINE = "9 175 60 239 62 199 99 149 21 137 7 166 9 281 10 312 9 296 33 "


def test_cat_files(tmp_path, save, pixels, caplog):
    for i in range(3):
        save(tmp_path / "CAT_00" / f"{i}.jpg", pixels(150, 350, seed=i))
        (tmp_path / "CAT_00" / f"{i}.jpg.cat").write_text(CAT_LINE)
    save(tmp_path / "CAT_00" / "extra.jpg", pixels(10, 10))
    source = CatFolder(str(tmp_path))
    assert source.spec().flip_pairs == (1, 0, 2, 8, 7, 6, 5, 4, 3)
    with caplog.at_level(logging.WARNING, "cnntrain"):
        train = CatFolder(str(tmp_path)).load()["train"]
    assert "1 images have no .cat file" in caplog.text
    assert train.names == [f"CAT_00/{i}.jpg" for i in range(3)]
    assert train.targets["valid"].all()
    (tmp_path / "CAT_00" / "1.jpg.cat").write_text("8 1 2")
    (tmp_path / "CAT_00" / "lone.jpg.cat").write_text("9")
    with pytest.raises(UserError, match=r"(?s)1.jpg.cat: must contain 9, .*lone.jpg.cat: has no image"):
        CatFolder(str(tmp_path)).spec()


def test_cats_in_split_folders(tmp_path, save, pixels):
    def cat(folder):
        save(tmp_path / folder / "0.jpg", pixels(150, 350))
        (tmp_path / folder / "0.jpg.cat").write_text(CAT_LINE)

    for folder in ("train/CAT_00", "train/CAT_01", "valid"):
        cat(folder)
    splits = CatFolder(str(tmp_path)).load()
    assert {split: examples.names for split, examples in splits.items()} == {
        "train": ["train/CAT_00/0.jpg", "train/CAT_01/0.jpg"],
        "val": ["valid/0.jpg"],
    }
    cat("CAT_02")
    with pytest.raises(UserError, match="CAT_02 is not a split"):
        CatFolder(str(tmp_path)).spec()
    shutil.rmtree(tmp_path / "train")
    with pytest.raises(UserError, match="has no train/"):
        CatFolder(str(tmp_path)).spec()
