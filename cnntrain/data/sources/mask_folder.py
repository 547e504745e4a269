"""Images with one mask of class ids each: your folders, Oxford-IIIT Pet and PASCAL VOC."""

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path

from cnntrain.data.decoder import MaskDecoder, Resize, format_values, make_decoder
from cnntrain.data.examples import Examples, LazyImages, Source
from cnntrain.data.files import (
    BadFile,
    dataset_root,
    download,
    list_files,
    raise_if_bad,
    relative_names,
    require_root,
    require_split_folders,
)
from cnntrain.data.image_reader import UnusableImage, distinct_values, mask_values, open_image, read_size
from cnntrain.data.parallel import try_map
from cnntrain.errors import UserError
from cnntrain.types import DataSpec

log = logging.getLogger("cnntrain")
VOC_CLASSES = tuple(
    "background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person "
    "pottedplant sheep sofa train tvmonitor".split()
)
Pairs = dict[str, list[tuple[str, str]]]  # by split: image files and mask files
LAYOUT = (
    "train/images/NAME.jpg with train/masks/NAME.png, and optionally val/ (or valid/, validation/) and test/ with "
    "the same layout"
)


@dataclass
class MaskSource(Source):
    """Base class of images with masks; subclasses set `folder` and list the files."""

    root: str | None = None
    classes: Sequence[str] | None = None  # names by id
    ignore_index: int = 255  # id that is excluded from the loss and the metrics; also the id of pixels outside a mask
    # Class id (or `ignore_index`) of each value in the mask files; None: the values are the ids. With two classes and
    # masks that contain only 0 and 255, None means {0: 0, 255: 1}.
    ids: Mapping[int, int] | None = None
    _: KW_ONLY
    size: int | list[int] = 128  # target size in pixels, one number for a square or [height, width]
    channels: int = 3
    resize: Resize = "short_side"

    folder: Path = field(init=False)  # names of examples are relative to it
    classes_from_user = True  # a class without pixels is then an error

    def __post_init__(self) -> None:
        if not 0 <= self.ignore_index <= 255:
            raise UserError(f"data.ignore_index: must be from 0 to 255, got {self.ignore_index!r}")
        if not self.classes:
            raise UserError(
                "data.classes: missing; name the classes in the order of their ids in the masks, as "
                "'data.classes=[background,object]'"
            )
        self.class_names = tuple(map(str, self.classes))
        if not 2 <= len(set(self.classes)) == len(self.classes) <= 255:
            raise UserError("data.classes: must be 2 to 255 different names, in the order of the masks' ids")
        self.decoder = make_decoder(self.size, self.channels, self.resize)
        self.id_of = None if self.ids is None else _read_ids(self.ids, len(self.classes), self.ignore_index)

    def spec(self) -> DataSpec:
        d = self.decoder
        return DataSpec(d.channels, d.height, d.width, self.class_names, per_pixel=True, ignore_index=self.ignore_index)

    def pairs(self, bad: list[BadFile]) -> Pairs:
        """Return the files; images without mask and masks without image go to `bad`."""
        raise NotImplementedError

    def load(self) -> dict[str, Examples]:
        bad: list[BadFile] = []
        pairs = self.pairs(bad)
        all_pairs = [pair for split in pairs.values() for pair in split]
        found, unreadable = try_map(_read_values, all_pairs)
        bad += unreadable
        values = {mask: each for (_, mask), each in zip(all_pairs, found, strict=True) if each is not None}
        decoder = self._mask_decoder(list(values.values()))
        without_class = []
        for mask, present in values.items():
            try:
                decoder.check_values(present)
            except UnusableImage as problem:
                without_class.append(BadFile(mask, str(problem)))
        advice = self._advice(frozenset().union(*values.values())) if without_class else ""
        bad += without_class
        raise_if_bad(bad, max(2 * len(all_pairs), len(bad)), self.folder, advice)
        splits = {}
        for split, files in pairs.items():
            if files:
                images = LazyImages([image for image, _ in files], self.decoder)
                masks = LazyImages([mask for _, mask in files], decoder)
                names = relative_names(self.folder, images.paths)
                splits[split] = Examples(images, {}, names, lazy_targets={"mask": masks})
        if "train" not in splits:
            raise UserError(f"data.root: {self.folder} has no images with masks for train")
        in_train = frozenset().union(*(values[mask] for _, mask in pairs["train"]))
        self._check_classes({decoder.ids[value] for value in in_train}, in_train)
        return splits

    def _mask_decoder(self, values: Sequence[frozenset[int]]) -> MaskDecoder:
        """Return the decoder for masks with these values (one set per mask)."""
        ids = self.id_of
        if ids is None:
            ids = {i: i for i in (*range(len(self.class_names)), self.ignore_index)}
            if len(self.class_names) == 2 and self.ignore_index not in (0, 1):
                if frozenset().union(*values) in ({0, 255}, {255}):
                    ids = {0: 0, 255: 1}
                    log.info(
                        "data: the masks contain only 0 and 255, so 255 means class %s, not ignore; set data.ids to "
                        "map values to classes differently",
                        self.class_names[1],
                    )
                elif self.ignore_index == 255:
                    _warn_if_inconsistent(values)
        table = tuple(ids.get(value, -1) for value in range(256))
        d = self.decoder
        return MaskDecoder(d.height, d.width, d.resize, table, self.ignore_index)

    def _check_classes(self, ids: set[int], values: frozenset[int]) -> None:
        """Raise an error for the user's classes without a pixel in the training masks; warn for other classes."""
        absent = [name for i, name in enumerate(self.class_names) if i not in ids and i != self.ignore_index]
        if not absent:
            return
        shown = ", ".join(absent[:8]) + (", ..." if len(absent) > 8 else "")
        if not self.classes_from_user:
            log.warning("data: the training masks have no pixels of %s", shown)
            return
        remedy = "remove classes without pixels from data.classes, and map the mask values to the others with data.ids"
        if self.id_of is None and 255 in values and self.ignore_index == 255:
            remedy += f"; 255 is ignored (data.ignore_index); if it is a class, {self._advice(values)}"
        raise UserError(
            f"data: the training masks have no pixels of {shown}; their values are {format_values(values)}; {remedy}"
        )

    def _advice(self, values: frozenset[int]) -> str:
        """Return a suggestion for `data.ids` with the values found in the masks."""
        present = sorted(value for value in values if 0 <= value <= 255)
        if len(present) > len(self.class_names):
            present = [value for value in present if value != self.ignore_index]
        advice = "map mask values to classes with data.ids"
        if len(present) == len(self.class_names):
            example = ", ".join(f"{value}: {i}" for i, value in enumerate(present))
            return f"{advice}, for example data.ids='{{{example}}}'"
        if len(present) > len(self.class_names):
            found = f"{len(present)} values: {format_values(present)}"
            return f"{advice} (found {found}); save masks losslessly, for example as PNG"
        return advice


def _read_values(pair: tuple[str, str]) -> frozenset[int]:
    """Return the values of a mask; raise BadFile if its size is not that of the image, or it has colors."""
    image_file, mask_file = pair
    size = read_size(image_file)
    with open_image(mask_file) as mask:
        if mask.size != size:
            shown = "{} x {}".format(*mask.size), "{} x {}".format(*size)
            raise BadFile(mask_file, f"is {shown[0]} pixels, but its image is {shown[1]}")
        return distinct_values(mask_values(mask))


def _warn_if_inconsistent(values: Sequence[frozenset[int]]) -> None:
    """Warn if some binary masks use 1 and others use 255, but none uses both: probably the same class."""
    with_1 = sum(1 in mask and 255 not in mask for mask in values)
    with_255 = sum(255 in mask and 1 not in mask for mask in values)
    if with_1 and with_255 and not any({1, 255} <= mask for mask in values):
        log.warning(
            "data: %d masks have the value 1 and %d others 255, which is ignored; if both mean the same class, set "
            "data.ids='{0: 0, 1: 1, 255: 1}'",
            *(with_1, with_255),
        )


def _read_ids(ids: Mapping[int, int], classes: int, ignore_index: int) -> dict[int, int]:
    """Return `data.ids` with integer keys; `ignore_index` maps to itself unless given."""
    id_of = {ignore_index: ignore_index}
    allowed = {*range(classes), ignore_index}
    pairs: Iterable[tuple[object, object]] = ids.items() if isinstance(ids, Mapping) else [(ids, None)]
    for value, class_id in pairs:
        number = int(value) if isinstance(value, str) and re.fullmatch("[0-9]{1,3}", value) else value
        if type(number) is int and number in range(256) and type(class_id) is int and class_id in allowed:
            id_of[number] = class_id
        else:
            got = f"{value!r}: {class_id!r}" if isinstance(ids, Mapping) else repr(ids)
            raise UserError(
                f"data.ids: must map each value (0 to 255) of the mask files to a class id (0 to {classes - 1}, or "
                f"{ignore_index}: ignored), for example data.ids='{{0: 0, 255: 1}}'; got {got}"
            )
    return id_of


@dataclass
class MaskFolder(MaskSource):
    """Images `root/train/images/NAME.jpg` with masks `root/train/masks/NAME.png`.

    `val/` (or `valid/`, `validation/`) and `test/` are optional. Gray values or palette indices of the masks are read
    without conversion; `ids` maps them to classes.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self.folder = require_root(self.root, LAYOUT)

    def pairs(self, bad: list[BadFile]) -> Pairs:
        folders = require_split_folders(self.folder, LAYOUT)
        if not (folders["train"] / "images").is_dir():
            raise UserError(f"data.root: {self.folder} has no train/images/; it must have {LAYOUT}")
        return {split: pair_by_name(folder / "images", folder / "masks", bad) for split, folder in folders.items()}


def pair_by_name(images: Path, masks: Path, bad: list[BadFile]) -> list[tuple[str, str]]:
    """Return images and masks with the same name except for the extension; others go to `bad`."""
    by_name: list[dict[str, str]] = []
    for folder in (images, masks):
        if not folder.is_dir():
            bad.append(BadFile(folder, "is not a folder"))
            return []
        named: dict[str, str] = {}
        for file in list_files(folder, bad):
            name = str(Path(file).relative_to(folder).with_suffix(""))
            if name in named:
                bad.append(BadFile(file, f"has the same name as {Path(named[name]).name}"))
            named[name] = file
        by_name.append(named)
    image_of, mask_of = by_name
    bad += [BadFile(image_of[name], "has no mask") for name in sorted(image_of.keys() - mask_of.keys())]
    bad += [BadFile(mask_of[name], "has no image") for name in sorted(mask_of.keys() - image_of.keys())]
    return [(image_of[name], mask_of[name]) for name in sorted(image_of.keys() & mask_of.keys())]


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
        self.folder = dataset_root(self.root)

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
        self.folder = dataset_root(self.root)

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
        raise UserError(f"data: {file}: cannot be read ({error})") from error
    names = [line.split()[0] for line in lines if line.strip() and not line.startswith("#")]
    return [(str(images / f"{name}.jpg"), str(masks / f"{name}.png")) for name in names]
