"""Keypoint sources: annotation formats, geometry and errors."""

import copy
import json
import logging
import shutil

import numpy as np
import pytest
import torch

from cnntrain.config.schema import DataSettings
from cnntrain.data.decoder import transform_points
from cnntrain.data.load import load_data
from cnntrain.data.sources.cat_folder import CatFolder
from cnntrain.data.sources.coco_keypoints import CocoKeypoints
from cnntrain.data.sources.dlib_xml import DlibXml
from cnntrain.data.sources.keypoint_base import CAT9, COCO17, IBUG68, KEYPOINT_SETS
from cnntrain.data.sources.keypoint_csv import KeypointCsv
from cnntrain.errors import UserError
from cnntrain.types import flip_permutation, infer_flip_pairs

IBUG_PAIRS = (
    "0-16 1-15 2-14 3-13 4-12 5-11 6-10 7-9 17-26 18-25 19-24 20-23 21-22 31-35 32-34 36-45 37-44 38-43 "
    "39-42 40-47 41-46 48-54 49-53 50-52 55-59 56-58 60-64 61-63 65-67"
)


def test_ibug_pairs_are_the_published_ones():
    assert len(IBUG68.names) == len(set(IBUG68.names)) == 68
    expected = list(range(68))
    for pair in IBUG_PAIRS.split():
        one, other = map(int, pair.split("-"))
        expected[one], expected[other] = other, one
    assert infer_flip_pairs(IBUG68.names) == tuple(expected)


def test_coco_pairs_are_neighbors():
    assert infer_flip_pairs(COCO17.names) == (0, *(i + 1 if i % 2 else i - 1 for i in range(1, 17)))


@pytest.mark.parametrize(
    ("names", "mirror"),
    [
        (("bright_spot", "nose"), None),
        (("bright_spot", "cleft_chin", "left_eye", "right_eye"), (0, 1, 3, 2)),
        (("leftEye", "rightEye", "eyeLeft", "eyeRight"), (1, 0, 3, 2)),
        (("LeftEye", "RightEye", "LEFT_EAR", "RIGHT_EAR"), (1, 0, 3, 2)),
        (("lefteye", "righteye", "eyeleft", "eyeright"), (1, 0, 3, 2)),
        (("l_eye", "r_eye", "ear_L", "ear_R"), (1, 0, 3, 2)),
        (("left 1", "right 1", "left-2", "right-2"), (1, 0, 3, 2)),
        (("left_of_right_eye", "right_of_left_eye"), (1, 0)),
    ],
)
def test_pairs_are_inferred_from_whole_words(names, mirror):
    assert infer_flip_pairs(names) == mirror


@pytest.mark.parametrize("name", ["left_eye", "eyeRight", "l_eye", "LEFT_EYE"])
def test_a_side_without_partner_is_rejected(name):
    with pytest.raises(UserError, match=f"'{name}' has no partner"):
        infer_flip_pairs((name, "nose"))


def test_cat_ears_mirror_inside_out():
    """The left ear counts from the inside, so its third point is the partner of the right one's first. Sides are
    the cat's own: its right is on the picture's left."""
    assert CAT9.flip_pairs is not None
    assert flip_permutation(CAT9.names, CAT9.flip_pairs) == (1, 0, 2, 8, 7, 6, 5, 4, 3)
    published = [175, 160, 239, 162, 199, 199, 149, 121, 137, 78, 166, 93, 281, 101, 312, 96, 296, 133]
    xs = dict(zip(CAT9.names, published[::2], strict=True))
    assert xs["right_ear_1"] < xs["right_ear_3"] < xs["left_ear_1"] < xs["left_ear_3"]
    assert xs["right_eye"] < xs["mouth"] < xs["left_eye"]


@pytest.mark.parametrize("name", KEYPOINT_SETS)
def test_skeletons_contain_existing_points(name):
    skeleton = KEYPOINT_SETS[name].skeleton
    assert {i for pair in skeleton for i in pair} <= set(range(len(KEYPOINT_SETS[name].names)))
    assert all(a != b for a, b in skeleton)


@pytest.fixture
def photographs(tmp_path, save, pixels):
    """Four images of 60 x 40, a bright dot where each of two eyes is."""
    for i in range(4):
        array = np.zeros((40, 60, 3), np.uint8)
        array[10 + i, 20] = array[10 + i, 40] = 255
        save(tmp_path / f"{i}.png", array)
    return tmp_path


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
            assert torch.allclose(points.double(), transform_points(marked, matrix), atol=1e-4)
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
    rows = [f"{i}.png,20,10,40,10,{split},{who}" for i, (split, who) in enumerate(
        [("train", "ann"), ("train", "ann"), ("test", "ann"), ("test", "bob")])]  # fmt: skip
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


def coco(folder, **changes) -> CocoKeypoints:
    content = {
        "images": [{"id": i, "file_name": f"{i}.png"} for i in range(4)],
        "categories": [{"id": 1, "keypoints": ["left_eye", "right_eye"], "skeleton": [[1, 2]]}],
        "annotations": [
            {"id": 10 + i, "image_id": i // 2, "category_id": 1, "bbox": [10, 5, 40, 20],
             "keypoints": [20, 10, 2, 40, 10, i % 2]} for i in range(6)
        ],
        **changes,
    }  # fmt: skip
    (folder / "train.json").write_text(json.dumps(content))
    return CocoKeypoints(str(folder), "train.json", None, None, ".", size=[20, 40], crop_margin=0)


def test_coco_files(photographs):
    source = coco(photographs)
    assert source.spec().skeleton == ((0, 1),)
    train = source.load()["train"]
    assert len(train) == 6
    assert train.targets["valid"][:, 1].tolist() == [False, True] * 3
    assert train.groups is not None
    assert len(set(train.groups)) == 3
    assert torch.allclose(train.targets["points"][1], torch.tensor([[10.0, 5.0], [30.0, 5.0]]))


def annotation(**fields):
    return {"annotations": [{"id": 7, "image_id": 0, "category_id": 1, **fields}]}


@pytest.mark.parametrize("name", ["a", "", "\ud800", "\x1b[31m"])
def test_keypoint_names_must_be_printable_and_unique(photographs, name):
    with pytest.raises(UserError, match="names must be printable and unique"):
        coco(photographs, categories=[{"id": 1, "keypoints": ["a", name]}]).spec()


SEEN = {"keypoints": [1, 2, 2, 3, 4, 2]}
COCO_FAULTS = [
    (annotation(image_id=99, **SEEN), "annotation 7: no image has the id 99"),
    (annotation(image_id=[1], **SEEN), "annotation 7: no image has the id [1]"),
    (annotation(image_id=None, **SEEN), "annotation 7: no image has the id None"),
    (annotation(image_id=True, **SEEN), "annotation 7: no image has the id True"),
    (annotation(keypoints=None), "annotation 7: keypoints must be 6"),
    (annotation(keypoints=[1, 2, [2], 3, 4, 2]), "annotation 7: keypoints must be 6"),
    (annotation(**SEEN, bbox=[1, 2, -3, 1]), "annotation 7: bbox must be"),
    (annotation(**SEEN, bbox={"x": 1}), "annotation 7: bbox must be"),
    (annotation(**SEEN, bbox=[1, 2, "3", 1]), "annotation 7: bbox must be"),
    ({"images": [{"id": [0], "file_name": "0.png"}]}, "image 0 of the list: id must be"),
    ({"images": [{"id": 0, "file_name": 5}]}, "image 0 of the list: id must be"),
    (
        {"images": [{"id": 0, "file_name": "0.png"}, {"id": 0, "file_name": "1.png"}]},
        "duplicate id 0",
    ),
    ({"images": [{"id": 0, "file_name": "a\0b"}]}, "no file 'a\\x00b'"),
    ({"images": [{"id": 0, "file_name": "a" * 5000}]}, "no file 'aaa"),
    ({"images": [{"id": 0, "file_name": "\ud800"}]}, "no file '\\ud800'"),
    ({"categories": [{"id": 1, "keypoints": "ab"}]}, "one category with a list of names"),
    ({"categories": [{"id": 1, "keypoints": 7}]}, "one category with a list of names"),
    ({"categories": [{"id": 1, "keypoints": {"a": 1}}]}, "one category with a list of names"),
    ({"categories": [{"id": 1, "keypoints": ["a", ["b"]]}]}, "one category with a list of names"),
    (annotation(keypoints=[1, 2]), "annotation 7: keypoints must be 6"),
    (annotation(keypoints=[1, 2, 2, 3, 4, 5]), "v of 0, 1, 2"),
    ({"images": [{"id": 0, "file_name": "gone.png"}]}, "no file 'gone.png'"),
    ({"categories": []}, "one category with a list of names"),
    ({"images": 3}, "a list of objects 'images'"),
]


@pytest.mark.parametrize(("changes", "part"), COCO_FAULTS)
def test_coco_errors_name_the_annotation(photographs, changes, part):
    with pytest.raises(UserError) as caught:
        coco(photographs, **changes).spec()
    assert part in str(caught.value)
    assert "train.json" in str(caught.value)


@pytest.mark.parametrize("skeleton", [5, "ab", [5], [[1]], [["a", "b"]], [[1.0, 2]], [[0, 9]], [[[1], [2]]], {"a": 1}])
def test_an_invalid_skeleton_is_ignored(photographs, skeleton):
    category = {"id": 1, "keypoints": ["left_eye", "right_eye"], "skeleton": skeleton}
    assert coco(photographs, categories=[category]).spec().skeleton == ()


def test_objects_without_labeled_points_are_not_validated(photographs):
    hidden = {"id": 8, "category_id": 1, "keypoints": [0] * 6}
    rows = [
        {**hidden, "image_id": 0, "bbox": [0, 0, 0, 0]},
        {**hidden, "image_id": 77},
        {**hidden, "bbox": "none"},
    ]
    seen = annotation(**SEEN, bbox=[0, 0, 9, 9])["annotations"]
    train = coco(photographs, annotations=[*rows, *seen]).load()["train"]
    assert train.names == ["train/0.png:7"]


def test_an_empty_box_counts_as_missing(photographs):
    source = coco(photographs, **annotation(**SEEN, bbox=[1, 2, 0, 1]))
    with pytest.raises(UserError, match=r"0\.png: has no box; set data\.crop=none or points"):
        source.load()
    source.crop = "none"
    assert len(source.load()["train"]) == 1


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100000, "\x00"])
def test_files_in_another_format_than_coco_are_rejected(photographs, text):
    source = coco(photographs)
    (photographs / "train.json").write_text(text)
    with pytest.raises(UserError, match=r"train\.json"):
        source.spec()


XML = """<?xml version='1.0'?><dataset><images><image file='0.png'>
<box top='5' left='10' width='40' height='20'><part name='00' x='20' y='10'/>
<part name='01' x='40' y='10'/></box>
<box top='5' left='10' width='40' height='20' ignore='1'><part name='00' x='20' y='10'/></box>
</image>
<image file='1.png'><box top='0' left='0' width='60' height='40'>
<part name='01' x='40' y='11'/></box></image>
</images></dataset>"""


def dlib(folder, text: str) -> DlibXml:
    (folder / "train.xml").write_text(text)
    return DlibXml(str(folder), "train.xml", None, None, size=[20, 40], crop_margin=0)


def test_dlib_files(photographs):
    source = dlib(photographs, XML)
    assert source.spec().keypoints == ("00", "01")
    train = source.load()["train"]
    assert train.targets["valid"].tolist() == [[True, True], [False, True]]
    assert torch.allclose(train.targets["points"][0], torch.tensor([[10.0, 5.0], [30.0, 5.0]]))


@pytest.mark.parametrize(
    ("old", "new", "part"),
    [
        ("x='20'", "x='many'", "image '0.png' box 1: expected numbers"),
        ("top='5'", "", "expected numbers"),
        ("name='01' x='40' y='10'", "name='00' x='40' y='10'", "once for each part"),
        ("file='1.png'", "file='gone.png'", "image 'gone.png': no such file"),
        ("</dataset>", "", "can't be read as XML"),
        ("<dataset>", "<!DOCTYPE d [<!ENTITY a 'aaaa'>]><dataset>", "entity declarations"),
        ("part", "spot", "expected <part"),
        ("file='1.png'", f"file='{'a' * 5000}'", "no such file"),
    ],
)
def test_dlib_errors_name_the_box(photographs, old, new, part):
    with pytest.raises(UserError) as caught:
        dlib(photographs, XML.replace(old, new)).spec()
    assert part in str(caught.value)


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
    with pytest.raises(UserError, match=r"(?s)1.jpg.cat: expected '9'.*lone.jpg.cat: has no image"):
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


def test_each_name_of_the_validation_split_is_accepted(photographs):
    path = write(photographs, "0.png,20,10,40,10,train", "1.png,20,10,40,10,validation", header=f"{HEADER},split")
    splits = KeypointCsv(path, size=[30, 60], crop="none").load()
    assert {split: examples.names for split, examples in splits.items()} == {
        "train": ["0.png"],
        "val": ["1.png"],
    }


JUNK = [None, True, -1, 0.5, 2**70, 1e308, "", "x", "\ud800", "a" * 5000, "..", "\0", [], [[]], {}, {"a": 1}]


def places(node, path=()):
    """Where something stands in nested dictionaries and lists."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [path, *(place for key, value in items for place in places(value, (*path, key)))]


@pytest.mark.parametrize("crop", ["none", "box"])
def test_arbitrary_values_in_a_coco_file_are_read_or_rejected(photographs, crop):
    coco(photographs)
    sound = json.loads((photographs / "train.json").read_text())
    sound = {key: value[:1] for key, value in sound.items()}
    refused = 0
    for where in places(sound)[1:]:
        for junk in JUNK:
            content = copy.deepcopy(sound)
            node = content
            for key in where[:-1]:
                node = node[key]
            node[where[-1]] = junk
            (photographs / "train.json").write_text(json.dumps(content))
            source = CocoKeypoints(str(photographs), "train.json", None, None, ".", size=[20, 40], crop=crop)
            try:
                source.spec()
                source.load()
            except UserError:
                refused += 1
    assert refused > 300
