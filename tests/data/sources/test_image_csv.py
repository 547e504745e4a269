"""Images listed in CSV files: splits, groups, and errors with their lines."""

import pytest

from cnntrain.config.schema import DataSettings
from cnntrain.data.load import load_data
from cnntrain.data.sources.image_csv import ImageCsv
from cnntrain.errors import UserError


def write_csv(root, text: str, encoding: str = "utf-8") -> str:
    (root / "list.csv").write_text(text, encoding=encoding)
    return str(root / "list.csv")


def test_each_name_of_the_validation_split_is_accepted(make_folder):
    root = make_folder("train")
    rows = [
        f"train/{label}/{i}.png,{label},{'valid' if i > 3 else 'train'}" for label in ("cat", "dog") for i in range(6)
    ]
    text = "path,label,split\n" + "\n".join(rows)
    splits = ImageCsv(write_csv(root, text), size=16).load()
    assert {split: len(examples) for split, examples in splits.items()} == {"train": 8, "val": 4}
    with pytest.raises(UserError, match="'valid' and 'val'"):
        ImageCsv(write_csv(root, text + "\ntrain/cat/3.png,cat,val"), size=16).load()


def test_image_csv_with_splits_groups_and_a_byte_order_mark(make_folder):
    root = make_folder("train")
    rows = [f"train/cat/{i}.png,{10 if i % 2 else 9},train,g{i // 2}" for i in range(6)]
    text = "path,label,split,group\n" + "\n".join(rows) + "\ntrain/dog/0.png,9,test,h\n"
    source = ImageCsv(write_csv(root, text, "utf-8-sig"), size=16)
    assert source.spec().classes == ("9", "10")
    data = load_data(source, DataSettings(val_fraction=0.4))
    assert data.test is not None
    assert len(data.test) == 1
    assert set(data.train.groups).isdisjoint(data.val.groups)


CSV_FAULTS = {
    "path,lable\na,b\n": ":1: unknown column 'lable'; did you mean 'label'?",
    "path\na\n": ":1: no column 'label'",
    "path,label\ntrain/cat/0.png,1\ntrain/cat/0.png,2\n": ":3: duplicate path 'train/cat/0.png'",
    "path,label\ntrain/cat/0.png,1\nmissing.png,2\n": ":3: no file 'missing.png'",
    "path,label\ntrain/cat/0.png,1,2\ntrain/cat/1.png\n": ":3: has 1 columns",
    "path,label\ntrain/cat/0.png,\n": ":2: has no label",
    "path,label,split\ntrain/cat/0.png,1,trian\n": "; did you mean 'train'?",
    "path,label,split\ntrain/cat/0.png,1,train\ntrain/cat/1.png,2,val\n": "label '2'",
    "path,label\n": "has no rows",
    "": "has no header line",
    'path,label\n"a,b\n': "cannot be read as a UTF-8 CSV",
    "path,label\ntrain/cat/0.png,1\ntrain/cat/1.png,1\n": "at least 2 are needed",
    "path,path\n1,2\n": "'path'",
    f"path,label\n{'a' * 5000},1\n": ":2: no file",
}


@pytest.mark.parametrize("text", CSV_FAULTS)
def test_csv_errors_name_file_and_line(make_folder, text):
    source = ImageCsv(write_csv(make_folder("train"), text))
    with pytest.raises(UserError) as caught:
        source.spec()
    assert CSV_FAULTS[text] in str(caught.value)
    assert "list.csv" in str(caught.value)
