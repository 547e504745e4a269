"""Oxford-IIIT Pet and PASCAL VOC segmentation, downloaded by torchvision."""

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path

from cnntrain.data.decoder import Resize
from cnntrain.data.files import BadFile, download, root_or_default
from cnntrain.data.sources.mask_folder import MaskSource, Pairs
from cnntrain.errors import UserError

VOC_CLASSES = tuple(
    "background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person "
    "pottedplant sheep sofa train tvmonitor".split()
)


@dataclass
class OxfordIIITPet(MaskSource):
    """Cats and dogs with segmentation masks (Parkhi et al., 2012): 3,680 images for training, 3,669 for testing.

    The values 1, 2, 3 in the masks are pet, background and unclassified border, which is ignored.
    `root` contains `oxford-iiit-pet/`; None: `~/.cache/cnntrain`. Downloaded if missing.
    """

    classes_from_user = False
    classes: Sequence[str] | None = field(default=("background", "pet"), init=False)
    ignore_index: int = field(default=255, init=False)
    ids: Mapping[int, int] | None = field(default_factory=lambda: {1: 1, 2: 0, 3: 255}, init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.folder = root_or_default(self.root)

    def pairs(self, bad: list[BadFile]) -> Pairs:
        base = self.folder / "oxford-iiit-pet"
        lists = {"train": base / "annotations/trainval.txt", "test": base / "annotations/test.txt"}
        if not all(file.is_file() for file in lists.values()) or not (base / "images").is_dir():
            download("OxfordIIITPet", self.folder, str(base), self.downloads, target_types="segmentation")
        return {split: _listed(file, base / "images", base / "annotations/trimaps") for split, file in lists.items()}


@dataclass
class VOCSegmentation(MaskSource):
    """PASCAL VOC 2012: 1,464 images for training and 1,449 for validation, 20 classes and background.

    There is no test split, because the test masks are not public. `root` contains `VOCdevkit/VOC2012/`; None:
    `~/.cache/cnntrain`. Downloaded if missing.
    """

    classes_from_user = False
    classes: Sequence[str] | None = field(default=VOC_CLASSES, init=False)
    ignore_index: int = field(default=255, init=False)
    ids: Mapping[int, int] | None = field(default=None, init=False)
    _: KW_ONLY
    size: int | list[int] = 224
    resize: Resize = "letterbox"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.folder = root_or_default(self.root)

    def pairs(self, bad: list[BadFile]) -> Pairs:
        base = self.folder / "VOCdevkit" / "VOC2012"
        lists = {split: base / "ImageSets/Segmentation" / f"{split}.txt" for split in ("train", "val")}
        if not all(file.is_file() for file in lists.values()):
            download("VOCSegmentation", self.folder, str(base), self.downloads, year="2012", image_set="train")
        return {split: _listed(file, base / "JPEGImages", base / "SegmentationClass") for split, file in lists.items()}


def _listed(file: Path, images: Path, masks: Path) -> list[tuple[str, str]]:
    """Return image and mask for the first word of every line that is not a comment."""
    try:
        lines = file.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"data: {file}: can't be read ({error})") from error
    names = [line.split()[0] for line in lines if line.strip() and not line.startswith("#")]
    return [(str(images / f"{name}.jpg"), str(masks / f"{name}.png")) for name in names]
