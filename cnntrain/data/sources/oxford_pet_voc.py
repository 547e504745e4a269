"""Oxford-IIIT Pet and PASCAL VOC segmentation, downloaded by torchvision."""

from pathlib import Path

from cnntrain.data.files import BadFile, default_root, download
from cnntrain.data.resize import Resize
from cnntrain.data.sources.mask_folder import MaskSource, Pairs
from cnntrain.errors import UserError

VOC_CLASSES = (
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train"),
    "tvmonitor",
)


class OxfordIIITPet(MaskSource):
    """Cats and dogs with segmentation masks (Parkhi et al., 2012): 3,680 images for training, 3,669 for testing.

    The values 1, 2, 3 in the masks are pet, background and unclassified border, which is ignored.

    Args:
        root: folder that contains `oxford-iiit-pet/`; null: `~/.cache/cnntrain`. Downloaded if missing.
        size, channels, resize: as for `ImageFolder`.
    """

    classes_from_user = False

    def __init__(
        self,
        root: str | None = None,
        size: int | list[int] = 128,
        channels: int = 3,
        resize: Resize = "short_side",
    ) -> None:
        folder = Path(root).expanduser() if root else default_root()
        super().__init__(folder, ("background", "pet"), 255, {1: 1, 2: 0, 3: 255}, size, channels, resize)

    def pairs(self, bad: list[BadFile]) -> Pairs:
        base = self.root / "oxford-iiit-pet"
        lists = {"train": base / "annotations/trainval.txt", "test": base / "annotations/test.txt"}
        if not all(file.is_file() for file in lists.values()) or not (base / "images").is_dir():
            download("OxfordIIITPet", self.root, str(base), self.downloads, target_types="segmentation")
        return {
            split: [
                (str(base / "images" / f"{name}.jpg"), str(base / "annotations/trimaps" / f"{name}.png"))
                for name in _names(file)
            ]
            for split, file in lists.items()
        }


class VOCSegmentation(MaskSource):
    """PASCAL VOC 2012: 1,464 images for training and 1,449 for validation, 20 classes and background.

    There is no test split, because the test masks are not public.

    Args:
        root: folder that contains `VOCdevkit/VOC2012/`; null: `~/.cache/cnntrain`. Downloaded if missing.
        size, channels, resize: as for `ImageFolder`.
    """

    classes_from_user = False

    def __init__(
        self,
        root: str | None = None,
        size: int | list[int] = 224,
        channels: int = 3,
        resize: Resize = "letterbox",
    ) -> None:
        folder = Path(root).expanduser() if root else default_root()
        super().__init__(folder, VOC_CLASSES, 255, None, size, channels, resize)

    def pairs(self, bad: list[BadFile]) -> Pairs:
        base = self.root / "VOCdevkit" / "VOC2012"
        lists = {split: base / "ImageSets/Segmentation" / f"{split}.txt" for split in ("train", "val")}
        if not all(file.is_file() for file in lists.values()):
            download("VOCSegmentation", self.root, str(base), self.downloads, year="2012", image_set="train")
        return {
            split: [
                (str(base / "JPEGImages" / f"{name}.jpg"), str(base / "SegmentationClass" / f"{name}.png"))
                for name in _names(file)
            ]
            for split, file in lists.items()
        }


def _names(file: Path) -> list[str]:
    """Return the first word of every line that is not a comment."""
    try:
        lines = file.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"data: {file}: can't be read ({error})") from error
    return [line.split()[0] for line in lines if line.strip() and not line.startswith("#")]
