"""Names of the points in published annotation schemes, and their partners under a mirror."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

from cnntrain.errors import UserError, suggest


@dataclass(frozen=True)
class Scheme:
    """K named points in the order of their files.

    Attributes:
        lines: names to join in drawings.
        flip_pairs: partners by name; None: they follow from left and right in the names.
    """

    names: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...] = ()
    flip_pairs: Mapping[str, str] | None = None

    @property
    def skeleton(self) -> tuple[tuple[int, int], ...]:
        """Pairs of point indices."""
        place = {name: i for i, name in enumerate(self.names)}
        return tuple((place[a], place[b]) for line in self.lines for a, b in pairwise(line))


def _numbered(name: str, *numbers: int) -> tuple[str, ...]:
    return tuple(f"{name}_{number}" for number in numbers)


# "right" is the person's own right, on the picture's left. Numbers run alike on both sides, from the outside
# inwards, so that partners differ only in the side's name (Sagonas et al., 300 Faces in-the-Wild, 2013).
_IBUG_JAW = (
    *_numbered("right_jaw", 1, 2, 3, 4, 5, 6, 7, 8),
    "chin",
    *_numbered("left_jaw", 8, 7, 6, 5, 4, 3, 2, 1),
)
_IBUG_RIGHT_BROW = _numbered("right_brow", 1, 2, 3, 4, 5)
_IBUG_LEFT_BROW = _numbered("left_brow", 5, 4, 3, 2, 1)
_IBUG_BRIDGE = _numbered("nose_bridge", 1, 2, 3, 4)
_IBUG_NOSTRILS = (*_numbered("right_nostril", 1, 2), "nose_base", *_numbered("left_nostril", 2, 1))
_IBUG_RIGHT_EYE = _numbered("right_eye", 1, 2, 3, 4, 5, 6)
_IBUG_LEFT_EYE = _numbered("left_eye", 4, 3, 2, 1, 6, 5)
_IBUG_MOUTH = (
    *(*_numbered("right_mouth", 1, 2, 3), "mouth_top", *_numbered("left_mouth", 3, 2, 1)),
    *(*_numbered("left_mouth", 5, 4), "mouth_bottom", *_numbered("right_mouth", 4, 5)),
)
_IBUG_LIPS = (
    *(*_numbered("right_lip", 1, 2), "lip_top", *_numbered("left_lip", 2, 1)),
    *("left_lip_3", "lip_bottom", "right_lip_3"),
)
IBUG68 = Scheme(
    (*_IBUG_JAW, *_IBUG_RIGHT_BROW, *_IBUG_LEFT_BROW, *_IBUG_BRIDGE, *_IBUG_NOSTRILS, *_IBUG_RIGHT_EYE,
     *_IBUG_LEFT_EYE, *_IBUG_MOUTH, *_IBUG_LIPS),
    (_IBUG_JAW, _IBUG_RIGHT_BROW, _IBUG_LEFT_BROW, _IBUG_BRIDGE, _IBUG_NOSTRILS,
     *((*ring, ring[0]) for ring in (_IBUG_RIGHT_EYE, _IBUG_LEFT_EYE, _IBUG_MOUTH, _IBUG_LIPS))),
)  # fmt: skip

# Lin et al., Microsoft COCO, 2014: the order of person_keypoints_*.json.
COCO17 = Scheme(
    ("nose", "left_eye", "right_eye", "left_ear", "right_ear", "left_shoulder", "right_shoulder",
     "left_elbow", "right_elbow", "left_wrist", "right_wrist", "left_hip", "right_hip", "left_knee",
     "right_knee", "left_ankle", "right_ankle"),
    (("left_ear", "left_eye", "nose", "right_eye", "right_ear"),
     ("left_wrist", "left_elbow", "left_shoulder", "right_shoulder", "right_elbow", "right_wrist"),
     ("left_shoulder", "left_hip", "right_hip", "right_shoulder"),
     ("left_hip", "left_knee", "left_ankle"), ("right_hip", "right_knee", "right_ankle")),
)  # fmt: skip

# Zhang, Sun, Tang, Cat Head Detection, ECCV 2008. "right" is the cat's own right, on the left of the picture, as in the
# other schemes. The files list the eye and the ear on the left of the picture first; the data set's description calls
# these left (in 00000001_000.jpg the first eye is at x = 175, the second at 239). The points of both ears run from left
# to right in the picture: root, tip, root. So the right ear's outer root, 1, is the partner of the left ear's, 3.
CAT9 = Scheme(
    ("right_eye", "left_eye", "mouth", *_numbered("right_ear", 1, 2, 3), *_numbered("left_ear", 1, 2, 3)),
    (
        ("right_eye", "mouth", "left_eye", "right_eye"),
        _numbered("right_ear", 1, 2, 3),
        _numbered("left_ear", 1, 2, 3),
    ),
    {
        "right_eye": "left_eye",
        "right_ear_1": "left_ear_3",
        "right_ear_2": "left_ear_2",
        "right_ear_3": "left_ear_1",
    },
)

SCHEMES = {"ibug68": IBUG68, "coco17": COCO17, "cat9": CAT9}


def find_scheme(name: str) -> Scheme:
    """The scheme that `data.keypoint_set` names.

    Raises:
        UserError: there is none of that name.
    """
    if name not in SCHEMES:
        raise UserError(
            f"data.keypoint_set: {name!r} is not one of {', '.join(SCHEMES)}{suggest(name, list(SCHEMES))}"
        )
    return SCHEMES[name]
