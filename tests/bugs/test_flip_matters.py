"""What flips with and without relabeled keypoints do to the error."""

from pathlib import Path

import pytest

from cnntrain import compose, train

PLANTED = Path(__file__).parent / "planted"
RECIPE = ("data.train_count=200", "epochs=40", "batch_size=32", "threads=1", "log.figures=false")


def nme(tmp_path: Path, name: str, *overrides: str) -> float:
    """Return the error on the 400 test cats, relative to the size of the face."""
    settings = compose(*RECIPE, f"run_dir={tmp_path / name}", *overrides, config_dir=PLANTED)
    return train(settings)["test"]["test/nme"]


@pytest.mark.long
def test_flips_help_only_with_relabeling(tmp_path: Path) -> None:
    """The README's figures come from the same runs with 60 epochs and three seeds."""
    relabeled = nme(tmp_path, "relabeled", "data=toy_faces", "augment=flip")
    none = nme(tmp_path, "none", "data=toy_faces", "augment=none")
    unrelabeled = nme(tmp_path, "unrelabeled", "data=unrelabeled_toy_faces", "augment=flip")
    assert relabeled < none - 0.01
    assert unrelabeled > none + 0.06
