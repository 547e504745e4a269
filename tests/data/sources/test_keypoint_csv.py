"""Keypoints in CSV files: geometry, groups, boxes, and errors with their lines."""

import logging

import pytest
import torch

from cnntrain.config.schema import DataSettings
from cnntrain.data.decoder import apply_affine
from cnntrain.data.load import load_data
from cnntrain.data.sources.keypoint_csv import KeypointCsv
from cnntrain.errors import UserError

HEADER = "image_name,left_eye_x,left_eye_y,right_eye_x,right_eye_y"


def write(folder, *rows: str, header: str = HEADER, encoding: str = "utf-8") -> str:
    (folder / "points.csv").write_text("\n".join([header, *rows, ""]), encoding=encoding)
    return str(folder / "points.csv")


def test_points_are_at_their_marks_after_resizing(photographs):
    write(photographs, *(f"{i}.png,20,{10 + i},40,{10 + i}" for i in range(4)), encoding="utf-8-sig")
    for crop in ("none", "points"):
        source = KeypointCsv(root=str(photographs), size=[30, 50], crop=crop, channels=1)
        assert source.spec().keypoints == ("left_eye", "right_eye")
        assert source.spec().flip_pairs == (1, 0)
        train = source.load()["train"]
        for i in range(4):
            image, matrix = train.images.read(i)
            assert torch.allclose(matrix, train.source_to_image[i])
            marked = torch.tensor([[20.0, 10 + i], [40.0, 10 + i]])
            points = train.targets["points"][i]
            assert torch.allclose(points.double(), apply_affine(marked, matrix), atol=1e-4)
            for x, y in points.round().long().tolist():
                near = image[0, max(0, y - 2) : y + 3, max(0, x - 2) : x + 3]
                assert near.max() == image[0][:, max(0, x - 2) : x + 3].max() > 0


def test_points_outside_and_unlabeled_points_are_not_valid(photographs, caplog):
    write(photographs, "0.png,20,10,60,10", "1.png,,,40,11", "2.png,-3,5,59,39", "3.png,20,10,40,10")
    with caplog.at_level(logging.WARNING, "cnntrain"):
        train = KeypointCsv(root=str(photographs), crop="none").load()["train"]
    assert train.targets["valid"].tolist() == [[True, False], [False, True], [False, True], [True, True]]
    assert "2 of 7 labeled points" in caplog.text
    assert (train.targets["points"][~train.targets["valid"]] == 0).all()


def test_sizes_of_annotated_boxes_are_targets(photographs):
    header = f"{HEADER},box_left,box_top,box_right,box_bottom"
    path = write(photographs, "0.png,20,10,40,10,15,5,45,17", "1.png,20,10,40,10,15,5,5,17", header=header)
    targets = KeypointCsv(path, crop="none").load()["train"].targets
    assert targets["box_size"].tolist() == [[30, 12], [0, 0]]
    write(photographs, "0.png,20,10,40,10")
    assert "box_size" not in KeypointCsv(path, crop="none").load()["train"].targets


def test_groups_boxes_and_splits_of_a_csv(photographs):
    header = f"{HEADER},split,group,box_left,box_top,box_right,box_bottom"
    rows = [
        f"{i}.png,20,10,40,10,{'test' if i == 3 else 'train'},g{i // 2},10,5,50,{s}" for i in range(3) for s in (25, 30)
    ]
    path = write(photographs, *rows, "3.png,20,10,40,10,test,h,10,5,50,25", header=header)
    data = load_data(KeypointCsv(path, crop="box", crop_margin=0.0, size=[20, 40]), DataSettings(val_fraction=0.4))
    assert data.test is not None
    assert set(data.train.groups).isdisjoint(data.val.groups)
    assert torch.allclose(data.test.source_to_image[0], torch.tensor([[1.0, 0, -10], [0, 1, -5], [0, 0, 1]]).double())


def test_a_group_with_one_example_in_another_split_is_rejected(photographs):
    members = ("train,ann", "train,ann", "test,ann", "test,bob")
    rows = [f"{i}.png,20,10,40,10,{split_and_group}" for i, split_and_group in enumerate(members)]
    path = write(photographs, *rows, header=f"{HEADER},split,group")
    with pytest.raises(UserError, match="ann"):
        load_data(KeypointCsv(path, size=[20, 40]))


CSV_FAULTS = {
    (HEADER, "0.png,20,nan,40,10"): ":2: left_eye_y is 'nan'; expected pixels",
    (HEADER, "0.png,20,,40,10"): ":2: left_eye_y is ''",
    (HEADER, "0.png,20,10,40"): ":2: has 4 columns",
    (HEADER, "0.png,20,10,40,10,7"): ":2: has 6 columns",
    (HEADER, "9.png,20,10,40,10"): ":2: no file '9.png'",
    (HEADER, "0.png,20,10,40,10\n0.png,20,10,40,10"): ":3: duplicate image '0.png'",
    (HEADER, "0.png,20,10,40,1e300"): ":2: right_eye_y is '1e300'",
    ("image_name,a_x,b_y", "0.png,1,2"): ":1: expected 'a_y' after 'a_x'",
    ("image_name,a_x,a_y,b", "0.png,1,2,3"): ":1: expected a column NAME_x, found 'b'",
    ("image_name,a_x,a_y,b_x", "0.png,1,2,3"): ":1: expected 'b_y' after 'b_x'",
    ("image_name", "0.png"): ":1: no points",
    ("image_name,a_x,a_y,box_left", "0.png,1,2,3"): ":1: a box needs",
}


@pytest.mark.parametrize(("header", "rows"), CSV_FAULTS)
def test_csv_errors_name_file_and_line(photographs, header, rows):
    with pytest.raises(UserError) as caught:
        KeypointCsv(write(photographs, rows, header=header)).spec()
    assert CSV_FAULTS[header, rows] in str(caught.value)
    assert "points.csv" in str(caught.value)


def test_all_bad_lines_are_reported_together(photographs):
    with pytest.raises(UserError) as caught:
        KeypointCsv(write(photographs, "0.png,x,1,2,3", "9.png,1,1,2,2", "1.png,1,2")).spec()
    assert all(f"points.csv:{line}: " in str(caught.value) for line in (2, 3, 4))


def test_a_left_point_without_right_point_is_named(photographs):
    path = write(photographs, "0.png,1,2", "1.png,3,4", header="image_name,left_eye_x,left_eye_y")
    with pytest.raises(UserError, match="'left_eye' has no partner"):
        KeypointCsv(path).spec()
    assert KeypointCsv(path, flip_pairs={}).spec().flip_pairs == (0,)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ({"crop": "boxes"}, "did you mean 'box'"),
        ({"crop_margin": -1}, "data.crop_margin"),
        ({"keypoint_set": "ibug"}, "did you mean 'ibug68'"),
        ({"file": "nothing.csv"}, "no file"),
    ],
)
def test_invalid_arguments_name_their_key(photographs, arguments, part):
    write(photographs, "0.png,1,2,3,4")
    with pytest.raises(UserError) as caught:
        KeypointCsv(root=str(photographs), **arguments)
    assert part in str(caught.value)


def test_a_keypoint_set_of_another_length_is_rejected(photographs):
    write(photographs, "0.png,1,2,3,4")
    with pytest.raises(UserError, match=r"data\.keypoint_set: has 68 points"):
        KeypointCsv(root=str(photographs), keypoint_set="ibug68").spec()


def test_real_faces(shared):
    source = KeypointCsv(root=str(shared("faces")), keypoint_set="ibug68", size=64)
    data = load_data(source, DataSettings(folds=5, fold=2))
    assert len(data.train) + len(data.val) == 69
    assert data.test is None
    assert data.spec.flip_pairs is not None
    points, valid = data.train.targets["points"], data.train.targets["valid"]
    assert valid.float().mean() > 0.98
    right, left = (points[:, data.spec.keypoints.index(f"{side}_eye_1"), 0] for side in ("right", "left"))
    assert (right < left).float().mean() > 0.95


def test_each_name_of_the_validation_split_is_accepted(photographs):
    path = write(photographs, "0.png,20,10,40,10,train", "1.png,20,10,40,10,validation", header=f"{HEADER},split")
    splits = KeypointCsv(path, size=[30, 60], crop="none").load()
    assert {split: examples.names for split, examples in splits.items()} == {
        "train": ["0.png"],
        "val": ["1.png"],
    }
