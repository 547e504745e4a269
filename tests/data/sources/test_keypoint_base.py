"""Published keypoint sets, and left/right pairs inferred from names."""

import pytest

from cnntrain.data.sources.keypoint_base import CAT9, COCO17, IBUG68, KEYPOINT_SETS
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
