"""Images with a mask of class ids each."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from cnntrain.data.canvas import Resize
from cnntrain.data.decode import BadFile, reading, refuse, upright_size
from cnntrain.data.examples import Examples, LazyImages
from cnntrain.data.image_folder import make_decoder
from cnntrain.data.listing import files_below, seen_from, train_and_other_folders
from cnntrain.data.masks import MaskDecoder
from cnntrain.data.parallel import in_threads
from cnntrain.data.source import Source, given_folder
from cnntrain.errors import UserError
from cnntrain.spec import DataSpec

Pairs = dict[str, list[tuple[str, str]]]  # by split: files of an image and of its mask
LAYOUT = (
    "train/images/NAME.jpg with train/masks/NAME.png, where there are any val/ (or valid/, validation/) and test/ "
    "in the same way"
)


class MaskSource(Source):
    """Images with masks; subclasses say where the files are.

    Args:
        root: the folder; relative names in messages count from it.
        classes: names by id.
        ignore_index: the id that counts neither as right nor as wrong; also what lies outside a mask.
        ids: class id of each value in the mask files, where the two differ.
        size, channels, resize: as for `ImageFolder`.
    """

    def __init__(
        self,
        root: Path,
        classes: Sequence[str] | None,
        ignore_index: int,
        ids: Mapping[int, int] | None,
        size: int | list[int],
        channels: int,
        resize: Resize,
    ) -> None:
        if not 0 <= ignore_index <= 255:
            raise UserError(f"data.ignore_index: must be from 0 to 255, got {ignore_index!r}")
        if not classes or len(classes) < 2 or len(set(classes)) < len(classes) or len(classes) > 255:
            raise UserError("data.classes: must be 2 to 255 different names, in the order of the masks' ids")
        self.root = root
        self.classes = tuple(str(name) for name in classes)
        self.ignore_index = ignore_index
        self.decoder = make_decoder(size, channels, resize)
        meaning = {i: i for i in (*range(len(classes)), ignore_index)} if ids is None else ids
        table = tuple(meaning.get(value, -1) for value in range(256))
        d = self.decoder
        self.mask_decoder = MaskDecoder(d.height, d.width, resize, table, ignore_index)

    def spec(self) -> DataSpec:
        d = self.decoder
        return DataSpec(
            d.channels, d.height, d.width, self.classes, per_pixel=True, ignore_index=self.ignore_index
        )

    def pairs(self, bad: list[BadFile]) -> Pairs:
        """The files; what doesn't pair up goes to `bad`."""
        raise NotImplementedError

    def load(self) -> dict[str, Examples]:
        bad: list[BadFile] = []
        pairs = self.pairs(bad)
        everything = [pair for split in pairs.values() for pair in split]
        bad += [problem for problem in in_threads(self._check, everything) if problem is not None]
        refuse(bad, max(2 * len(everything), len(bad)), self.root)
        splits = {}
        for split, files in pairs.items():
            if files:
                images = LazyImages([image for image, _ in files], self.decoder)
                masks = LazyImages([mask for _, mask in files], self.mask_decoder)
                names = seen_from(self.root, images.paths)
                splits[split] = Examples(images, {}, names, lazy_targets={"mask": masks})
        if "train" not in splits:
            raise UserError(f"data.root: {self.root} has no images with masks for train")
        return splits

    def _check(self, pair: tuple[str, str]) -> BadFile | None:
        """What is wrong with a pair: sizes that differ, or ids that mean nothing, on the whole mask."""
        image_file, mask_file = pair
        try:
            size = upright_size(image_file)
            with reading(mask_file) as mask:
                if mask.size != size:
                    shown = "{} x {}".format(*mask.size), "{} x {}".format(*size)
                    return BadFile(mask_file, f"is {shown[0]} pixels, its image {shown[1]}")
                self.mask_decoder.class_ids(mask)
        except BadFile as problem:
            return problem
        return None


class MaskFolder(MaskSource):
    """`root/train/images/NAME.jpg` with `root/train/masks/NAME.png`, optional `val/` (also called
    `valid/` or `validation/`) and `test/`.

    A mask's values are its class ids, grey or palette; they are read, never converted.

    Args:
        root: the folder that has `train/`.
        classes, ignore_index, size, channels, resize: as for `MaskSource`.
    """

    def __init__(
        self,
        root: str | None,
        classes: Sequence[str] | None,
        ignore_index: int = 255,
        size: int | list[int] = 128,
        channels: int = 3,
        resize: Resize = "short_side",
    ) -> None:
        super().__init__(given_folder(root, LAYOUT), classes, ignore_index, None, size, channels, resize)

    def pairs(self, bad: list[BadFile]) -> Pairs:
        folders = train_and_other_folders(self.root, LAYOUT)
        if not (folders["train"] / "images").is_dir():
            raise UserError(f"data.root: {self.root} has no train/images/; it must have {LAYOUT}")
        return {
            split: pair_by_name(folder / "images", folder / "masks", bad) for split, folder in folders.items()
        }


def pair_by_name(images: Path, masks: Path, bad: list[BadFile]) -> list[tuple[str, str]]:
    """Images and masks that have the same name up to the ending; the others go to `bad`."""
    by_name: list[dict[str, str]] = []
    for folder in (images, masks):
        if not folder.is_dir():
            bad.append(BadFile(folder, "is no folder"))
            return []
        named: dict[str, str] = {}
        for file in files_below(folder, bad):
            name = str(Path(file).relative_to(folder).with_suffix(""))
            if name in named:
                bad.append(BadFile(file, f"has the same name as {Path(named[name]).name}"))
            named[name] = file
        by_name.append(named)
    image_of, mask_of = by_name
    bad += [BadFile(image_of[name], "has no mask") for name in sorted(image_of.keys() - mask_of.keys())]
    bad += [BadFile(mask_of[name], "has no image") for name in sorted(mask_of.keys() - image_of.keys())]
    return [(image_of[name], mask_of[name]) for name in sorted(image_of.keys() & mask_of.keys())]
