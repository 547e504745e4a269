"""Keypoints in COCO's format: errors name the annotation."""

import copy
import json

import pytest
import torch

from cnntrain.data.sources.coco_keypoints import CocoKeypoints
from cnntrain.errors import UserError

SEEN = {"keypoints": [1, 2, 2, 3, 4, 2]}


def coco(folder, **changes) -> CocoKeypoints:
    boxed = {"category_id": 1, "bbox": [10, 5, 40, 20]}
    content = {
        "images": [{"id": i, "file_name": f"{i}.png"} for i in range(4)],
        "categories": [{"id": 1, "keypoints": ["left_eye", "right_eye"], "skeleton": [[1, 2]]}],
        "annotations": [
            {"id": 10 + i, "image_id": i // 2, **boxed, "keypoints": [20, 10, 2, 40, 10, i % 2]} for i in range(6)
        ],
        **changes,
    }
    (folder / "train.json").write_text(json.dumps(content))
    return CocoKeypoints(str(folder), "train.json", None, None, ".", size=[20, 40], crop_margin=0)


def annotation(**fields):
    return {"annotations": [{"id": 7, "image_id": 0, "category_id": 1, **fields}]}


def test_coco_files(photographs):
    source = coco(photographs)
    assert source.spec().skeleton == ((0, 1),)
    train = source.load()["train"]
    assert len(train) == 6
    assert train.targets["valid"][:, 1].tolist() == [False, True] * 3
    assert train.groups is not None
    assert len(set(train.groups)) == 3
    assert torch.allclose(train.targets["points"][1], torch.tensor([[10.0, 5.0], [30.0, 5.0]]))


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


@pytest.mark.parametrize("name", ["a", "", "\ud800", "\x1b[31m"])
def test_keypoint_names_must_be_printable_and_unique(photographs, name):
    with pytest.raises(UserError, match="names must be printable and unique"):
        coco(photographs, categories=[{"id": 1, "keypoints": ["a", name]}]).spec()


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
