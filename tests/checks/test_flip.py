"""Every single exchange of keypoints is detected and named; correct pairs pass."""

import csv
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cnntrain.checks.flip import diagnose_flip, diagnose_map, diagnose_names, measure_symmetry, side_and_part
from cnntrain.cli import main
from cnntrain.data.sources.keypoint_base import CAT9, COCO17, IBUG68, KeypointSet
from cnntrain.data.sources.toys import ToyFaces
from cnntrain.types import DataSpec, Finding, flip_permutation, infer_flip_pairs

Shapes = tuple[Tensor, Tensor]


def correct_pairs(keypoint_set: KeypointSet) -> tuple[int, ...]:
    declared = infer_flip_pairs(keypoint_set.names)
    if keypoint_set.flip_pairs is not None:
        declared = flip_permutation(keypoint_set.names, keypoint_set.flip_pairs)
    assert declared is not None
    return declared


def spec_of(keypoint_set: KeypointSet, flip_pairs: tuple[int, ...], named: bool = True) -> DataSpec:
    names = keypoint_set.names if named else tuple(f"part_{i}" for i in range(len(keypoint_set.names)))
    return DataSpec(3, 64, 64, keypoints=names, flip_pairs=flip_pairs, skeleton=keypoint_set.skeleton)


def wrong_pairings(right: tuple[int, ...]) -> dict[tuple[int, int], tuple[int, ...]]:
    """Return all maps that differ by one exchange: of the names of two keypoints, or of two entries of the list."""
    found: dict[tuple[int, ...], tuple[int, int]] = {}
    for i in range(len(right)):
        for j in range(i):
            swap = list(range(len(right)))
            swap[i], swap[j] = j, i
            found[tuple(right[swap[k]] for k in range(len(right)))] = (i, j)
            found[tuple(swap[right[swap[k]]] for k in range(len(right)))] = (i, j)
    found.pop(right, None)
    return {(*pair, n): wrong for n, (wrong, pair) in enumerate(found.items())}  # type: ignore[misc]


def verdicts(findings: list[Finding]) -> dict[str, str]:
    return {finding.name: finding.verdict for finding in findings}


# Half of a template with the person's right side on the left: (distance from the axis, y). The nose is on the axis.
PERSON = {
    "nose": (0, 0),
    "eye": (4, -3),
    "ear": (8, -2),
    "shoulder": (18, 20),
    "elbow": (26, 45),
    "wrist": (28, 68),
    "hip": (11, 70),
    "knee": (12, 105),
    "ankle": (13, 140),
}


def people(count: int = 150) -> Shapes:
    """COCO keypoints of people who stand, lean and turn; a fifth of the points is hidden."""
    generator = torch.Generator().manual_seed(0)
    template = []
    for name in COCO17.names:
        x, y = PERSON[name.removeprefix("left_").removeprefix("right_")]
        template.append((x if name.startswith("left_") else -x, y))  # seen from the front
    shape = torch.tensor(template, dtype=torch.float64)
    turn = torch.randn(count, generator=generator) * 0.25
    rotation = torch.stack([turn.cos(), -turn.sin(), turn.sin(), turn.cos()], 1).view(-1, 2, 2).double()
    width = torch.rand(count, 1, 1, generator=generator).double() * 0.8 + 0.2
    points = (shape * torch.cat([width, torch.ones_like(width)], 2)) @ rotation.mT
    points += 2.5 * torch.randn(points.shape, generator=generator)
    return points + 200, torch.rand(count, 17, generator=generator) > 0.2


def cats(count: int = 60) -> Shapes:
    targets = ToyFaces(train_count=count, test_count=1).load()["train"].targets
    return targets["points"], targets["valid"]


def drawn_faces(count: int = 60) -> Shapes:
    """iBUG keypoints of a synthetic face: one y per name; paired keypoints have an x other than 0."""
    generator = torch.Generator().manual_seed(1)
    right = correct_pairs(IBUG68)
    order = torch.arange(68)
    shape = torch.stack([order * 37 % 61 + 4, order * 3], 1).double()  # all different
    for i, partner in enumerate(right):
        shape[i] = torch.stack([shape[i, 0] * (partner != i), shape[i, 1]])
        if partner < i:
            shape[i] = shape[partner] * torch.tensor([-1.0, 1.0])
    return shape + 0.5 * torch.randn(count, 68, 2, generator=generator), torch.ones(count, 68, dtype=torch.bool)


def real_faces(folder: Path) -> Shapes:
    with (folder / "faces" / "face_landmarks.csv").open() as file:
        rows = [[float(cell) for cell in row[1:]] for row in list(csv.reader(file))[1:]]
    points = torch.tensor(rows, dtype=torch.float64).view(-1, 68, 2)
    return points, torch.ones(points.shape[:2], dtype=torch.bool)


@pytest.fixture(params=["people", "cats", "drawn faces", "real faces"])
def case(request: pytest.FixtureRequest) -> tuple[KeypointSet, Shapes]:
    if request.param == "real faces":
        return IBUG68, real_faces(request.getfixturevalue("shared_data"))
    made = {"people": (COCO17, people), "cats": (CAT9, cats), "drawn faces": (IBUG68, drawn_faces)}
    keypoint_set, make = made[request.param]
    return keypoint_set, make()


def test_correct_pairs_pass(case: tuple[KeypointSet, Shapes]) -> None:
    keypoint_set, shapes = case
    findings, symmetry = diagnose_flip(*shapes, spec_of(keypoint_set, correct_pairs(keypoint_set)))
    assert set(verdicts(findings).values()) == {"PASS"}, findings
    assert symmetry is not None and symmetry.swapped < symmetry.unswapped / 2


@pytest.mark.parametrize("most", [40, pytest.param(10**6, marks=pytest.mark.long)])
def test_every_exchange_is_detected_from_the_shapes_alone(case: tuple[KeypointSet, Shapes], most: int) -> None:
    """Names contain no side and the permutation is its own inverse, so only the geometry shows the error."""
    keypoint_set, shapes = case
    right = correct_pairs(keypoint_set)
    # The distance is a sum over the points, so one table contains the change by every exchange.
    symmetry = measure_symmetry(*shapes, right)
    certain = symmetry.change >= 2 * symmetry.error
    upper = torch.ones_like(certain).triu(1).bool()
    assert certain[upper].all(), "some exchange is not visible in the data"
    pairings = wrong_pairings(right)
    involutions = [wrong for wrong in pairings.values() if all(wrong[wrong[k]] == k for k in range(len(right)))]
    assert len(involutions) > len(right)
    step = max(1, len(involutions) // most)
    for wrong in involutions[::step]:
        findings, _ = diagnose_flip(*shapes, spec_of(keypoint_set, wrong, named=False))
        pairs = next(finding for finding in findings if finding.name == "mirror pairs")
        changed = {f"part_{k}" for k in range(len(right)) if wrong[k] != right[k]}
        assert pairs.verdict == "FAIL", (wrong, pairs)
        assert changed & set(pairs.evidence.replace(",", " ").split()), (changed, pairs.evidence)


def test_every_exchange_increases_the_distance(case: tuple[KeypointSet, Shapes]) -> None:
    """The mean shape's distances increase; a map that is not its own inverse also has a failing finding."""
    keypoint_set, shapes = case
    right = correct_pairs(keypoint_set)
    symmetry = measure_symmetry(*shapes, right)
    cost = torch.cdist(
        symmetry.shape, symmetry.shape * torch.tensor([-1.0, 1.0])
    ).square()  # (K, K): keypoint, mirrored keypoint
    rows = torch.arange(len(right))
    best = cost[rows, torch.tensor(right)].sum()
    for wrong in wrong_pairings(right).values():
        assert cost[rows, torch.tensor(wrong)].sum() > best
        is_own_inverse = all(wrong[wrong[k]] == k for k in range(len(right)))
        assert diagnose_map(keypoint_set.names, wrong).verdict == ("PASS" if is_own_inverse else "FAIL")


def test_identity_and_shifted_lists_fail(case: tuple[KeypointSet, Shapes]) -> None:
    keypoint_set, shapes = case
    right = correct_pairs(keypoint_set)
    identity = verdicts(diagnose_flip(*shapes, spec_of(keypoint_set, tuple(range(len(right)))))[0])
    assert identity == {
        "mirror map": "PASS",
        "mirror names": "FAIL",
        "mirror shape": "WARN",
        "mirror pairs": "FAIL",
    }
    shifted = (*right[1:], right[0])
    assert diagnose_map(keypoint_set.names, shifted).verdict == "FAIL"
    assert verdicts(diagnose_flip(*shapes, spec_of(keypoint_set, shifted, named=False))[0])["mirror pairs"] == "FAIL"


def test_invalid_lists_name_the_keypoint() -> None:
    names = ("left_eye", "right_eye", "nose")
    assert diagnose_map(names, (1, 0)).verdict == "FAIL"
    assert "right_eye" in diagnose_map(names, (1, 7, 2)).evidence
    one_way = diagnose_map(names, (1, 2, 0))
    assert one_way.verdict == "FAIL" and all(name in one_way.evidence for name in names)
    assert (
        diagnose_flip(torch.zeros(3, 3, 2), torch.ones(3, 3), DataSpec(1, 9, 9, keypoints=names))[0][0].verdict
        == "FAIL"
    )


def test_names() -> None:
    assert side_and_part("left_ear_1") == side_and_part("leftEar3") == ("left", "ear")
    assert side_and_part("ear_r") == side_and_part("r_ear") == ("r", "ear")
    assert side_and_part("LEFT_EYE") == ("left", "eye") and side_and_part("lefteye") == ("left", "eye")
    assert side_and_part("nose") == (None, "nose")
    names = ("left_eye", "right_eye", "left_ear", "right_ear", "nose")
    assert diagnose_names(names, (1, 0, 3, 2, 4)).verdict == "PASS"
    crossed = diagnose_names(names, (3, 2, 1, 0, 4))
    assert crossed.verdict == "FAIL" and all(name in crossed.evidence for name in names[:4])
    unpaired = diagnose_names(names, (0, 1, 3, 2, 4))
    assert unpaired.verdict == "FAIL" and "left_eye" in unpaired.evidence and "ear" not in unpaired.evidence
    assert diagnose_names(("a", "b"), (1, 0)).verdict == "SKIP"


def test_coinciding_keypoints_are_a_warning() -> None:
    """Closed lips: the data do not show which keypoint is the partner."""
    shape = torch.tensor([[-10.0, 0], [10, 0], [-5, 20], [5, 20], [-5, 20], [5, 20]])
    noise = torch.randn(40, 6, 2, generator=torch.Generator().manual_seed(2))
    names = ("left_eye", "right_eye", "left_lip_1", "right_lip_1", "left_lip_2", "right_lip_2")
    spec = DataSpec(1, 9, 9, keypoints=names, flip_pairs=(1, 0, 3, 2, 5, 4))
    findings, _ = diagnose_flip(shape + noise, torch.ones(40, 6, dtype=torch.bool), spec)
    pairs = findings[-1]
    assert pairs.verdict == "WARN" and "left_lip_1 and left_lip_2" in pairs.evidence and "eye" not in pairs.evidence


def test_command_reports_pairs() -> None:
    data = ["data=toy_faces", "data.train_count=60", "data.test_count=1"]
    assert main(["check", "flip", *data, "run_dir=out"]) == 0
    report = json.loads(Path("out/check.json").read_text())
    assert report["verdict"] == "PASS" and report["examples"] == 60 and ["right_eye", "left_eye"] in report["pairs"]
    assert Path("out/figures/flip.png").stat().st_size > 5000


def test_command_names_wrong_pairs(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (64, 64)).save("cat.png")
    points, _ = cats(30)
    header = ",".join(f"{name}_{axis}" for name in CAT9.names for axis in "xy")
    lines = [f"cat{i}.png," + ",".join(f"{v:.2f}" for v in p.flatten().tolist()) for i, p in enumerate(points)]
    for i in range(len(lines)):
        Path(f"cat{i}.png").symlink_to("cat.png")
    Path("cats.csv").write_text("\n".join([f"image_name,{header}", *lines]))
    pairs = "{left_eye:right_eye,left_ear_1:right_ear_1,left_ear_2:right_ear_2,left_ear_3:right_ear_3}"
    assert (
        main(
            [
                "check",
                "flip",
                "data=keypoint_csv",
                "data.file=cats.csv",
                f"data.flip_pairs={pairs}",
                "run_dir=o",
            ]
        )
        == 1
    )
    output = capsys.readouterr().out
    assert all(word in output for word in ("right_ear_1", "left_ear_1", "FAIL"))
    assert json.loads(Path("o/check.json").read_text())["verdict"] == "FAIL"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["check", "flyp"], "did you mean 'flip'"),
        (["check", "flip", "data=digits"], "no keypoints"),
    ],
)
def test_refusals(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
