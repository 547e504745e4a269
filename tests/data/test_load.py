"""Loading: high resolution for random crops keeps the geometry, and fingerprints detect changed data."""

import math
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from cnntrain.augment.geometry import HorizontalFlip, RandomResizedCrop, Rotation
from cnntrain.augment.pipeline import Pipeline
from cnntrain.cli import main
from cnntrain.config.compose import read_settings
from cnntrain.config.schema import DataSettings
from cnntrain.data.decoder import ImageDecoder, apply_affine, resize_geometry
from cnntrain.data.examples import Examples, LazyImages
from cnntrain.data.files import member_path
from cnntrain.data.load import content_hash, load_data, same_examples, use_high_resolution
from cnntrain.data.loader import make_loader
from cnntrain.data.sources.image_folder import ImageFolder
from cnntrain.data.sources.keypoint_csv import KeypointCsv
from cnntrain.data.sources.mask_folder import MaskFolder
from cnntrain.train.setup import build_components
from cnntrain.types import Batch, DataSpec

SIZE = 64


def photograph(path: Path, height: int = 300, width: int = 300, seed: int = 0) -> np.ndarray:
    """Texture at all scales, as photographs have: power falls with the square of the frequency."""
    random = np.random.default_rng(seed)
    fy, fx = np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None]
    amplitude = 1 / np.maximum(np.hypot(fy, fx), 1 / max(height, width))
    noise = np.fft.ifft2(amplitude * np.fft.fft2(random.standard_normal((height, width)))).real
    pixels = np.clip(127 + 50 * noise / noise.std(), 0, 255).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return pixels


def sharpness(images: Tensor) -> float:
    """Share of the power in the upper half of the frequencies along each axis."""
    centered = images.double() - images.double().mean((-2, -1), keepdim=True)
    power = torch.fft.fft2(centered).abs().square()
    high = torch.fft.fftfreq(images.shape[-1]).abs() > 0.25
    return float(power[..., high, :].sum() + power[..., :, high].sum()) / float(power.sum())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for split, count in (("train", 6), ("val", 2)):
        for label in ("a", "b"):
            for number in range(count):
                photograph(tmp_path / split / label / f"{number}.png", 300, 280, seed=number + 10 * (label == "b"))
    return tmp_path


@pytest.mark.parametrize(("area", "share"), [(0.35, 0.5), (0.5, 0.65), (0.7, 0.9), (1.0, 0.75)])
def test_crops_are_as_sharp_as_those_of_torchvision_from_the_original(folder: Path, area: float, share: float) -> None:
    """Bilinear sampling costs most where a crop has just one pixel for each of its own."""
    from torchvision.transforms import v2

    source = ImageFolder(str(folder), size=SIZE, channels=1)
    magnification = Pipeline(source.spec(), {"crop": RandomResizedCrop(scale=[0.35, 1])}).magnification
    assert magnification == pytest.approx(0.35**-0.5)
    pipeline = Pipeline(source.spec(), {"crop": RandomResizedCrop(scale=[area, area], ratio=[1, 1])})
    seen = {}
    for factor in (1.0, magnification):
        data = load_data(source, magnification=factor)
        assert data.train.images.shape[-2:] == (math.ceil(SIZE * factor),) * 2
        assert data.val.images.shape[-2:] == (SIZE, SIZE)
        seen[factor] = pipeline(next(make_loader(data.train, "cpu").batches(torch.arange(12), 12)), 0, 0).images
    torch.manual_seed(0)
    theirs = v2.Compose([v2.CenterCrop(280), v2.RandomResizedCrop(SIZE, (area, area), (1, 1), antialias=True)])
    originals = [torch.from_numpy(np.array(Image.open(folder / name)))[None] for name in data.train.names]
    reference = sharpness(torch.stack([theirs(image) for image in originals]))
    assert sharpness(seen[magnification]) > share * reference
    if area < 1:
        assert sharpness(seen[1.0]) < 0.4 * reference


def test_the_resolution_is_limited_by_the_files(tmp_path: Path) -> None:
    paths = [str(tmp_path / f"{number}.png") for number in range(4)]
    for path in paths:
        photograph(Path(path), 70, 70)
    examples = Examples(LazyImages(paths, ImageDecoder(SIZE, SIZE, 1)), {}, paths)
    assert use_high_resolution(examples, 3.0).images.shape[-2:] == (70, 70)
    same = Examples(LazyImages(paths, ImageDecoder(70, 70, 1)), {}, paths)
    assert use_high_resolution(same, 3.0) is same
    held = Examples(torch.zeros(4, 1, 8, 8, dtype=torch.uint8), {}, paths)
    assert use_high_resolution(held, 3.0) is held


@pytest.mark.parametrize(
    ("sizes", "resize", "magnification", "expected"),
    [
        ([(70, 70)] * 9 + [(400, 400)], "letterbox", 3.0, (70, 70)),  # a large one does not decide for all
        ([(70, 70)] * 8 + [(400, 400)] * 2, "letterbox", 3.0, (150, 150)),
        ([(100, 75)] * 4, "stretch", 3.0, (100, 100)),  # (height, width): as fine as the finer side
        ([(75, 100)] * 4, "stretch", 3.0, (100, 100)),
        ([(400, 400)] * 4, "letterbox", 1.1, (55, 55)),  # 1.1 * 50 is a little more than 55
        ([(51, 51)] * 4, "letterbox", 3.0, (51, 51)),
        ([(400, 400)] * 4, "letterbox", 1.01, (50, 50)),  # not worth it
    ],
)
def test_the_resolution_for_a_magnification(tmp_path: Path, sizes, resize, magnification, expected) -> None:
    paths = [str(tmp_path / f"{number}.png") for number in range(len(sizes))]
    for path, (height, width) in zip(paths, sizes, strict=True):
        Image.new("L", (width, height)).save(path)
    examples = Examples(LazyImages(paths, ImageDecoder(50, 50, 1, resize)), {}, paths)
    assert use_high_resolution(examples, magnification).images.shape[-2:] == expected


def spots(path: Path, points: np.ndarray, height: int, width: int) -> None:
    ys, xs = np.mgrid[:height, :width]
    pixels = sum(255 * np.exp(-((xs - x) ** 2 + (ys - y) ** 2) / 40) for x, y in points)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(path)


@pytest.mark.parametrize("crop", ["none", "points"])
def test_points_are_transformed_to_the_high_resolution(tmp_path: Path, crop: str) -> None:
    lines, source_points = ["image_name,left_eye_x,left_eye_y,right_eye_x,right_eye_y"], []
    for number in range(4):
        points = np.array([[60 + 3 * number, 80], [150, 110 + 5 * number]], float)
        spots(tmp_path / f"{number}.png", points, 200, 240 + number)
        source_points.append(points)
        lines.append(",".join([f"{number}.png", *map(str, points.ravel())]))
    (tmp_path / "points.csv").write_text("\n".join(lines))
    source = KeypointCsv(root=str(tmp_path), size=[48, 60], channels=1, crop=crop, crop_margin=1.0)
    high = load_data(source, magnification=2.0)
    assert high.train.images.shape[-2:] == (96, 120) and high.val.images.shape[-2:] == (48, 60)
    rows = [int(name.split(".")[0]) for name in high.train.names]
    truth = torch.from_numpy(np.stack([source_points[row] for row in rows]))
    assert isinstance(high.train.source_to_image, Tensor)
    torch.testing.assert_close(
        apply_affine(truth, high.train.source_to_image),
        high.train.targets["points"].double(),
        atol=1e-3,
        rtol=0,
    )
    flip_and_crop = {"flip": HorizontalFlip(probability=1.0), "crop": RandomResizedCrop(), "turn": Rotation()}
    pipeline = Pipeline(source.spec(), flip_and_crop)
    batches = []
    for data in (high, load_data(source)):
        batches.append(next(make_loader(data.train, "cpu").batches(torch.arange(3), 3)))
    for fine, coarse in (
        (f(batches[0]), f(batches[1])) for f in (pipeline.eval_transform, lambda b: pipeline(b, 0, 0))
    ):
        assert fine.images.shape == coarse.images.shape
        torch.testing.assert_close(fine.targets["points"], coarse.targets["points"], atol=0.5, rtol=0)
        assert torch.equal(fine.targets["valid"], coarse.targets["valid"])
        assert fine.source_to_image is not None
        expected = apply_affine(truth, fine.source_to_image)
        expected = (
            expected if float(fine.source_to_image[0, 0, 0]) > 0 else expected.flip(1)
        )  # mirrored: names change sides
        seen = fine.targets["valid"]
        torch.testing.assert_close(fine.targets["points"][seen].double(), expected[seen], atol=1e-2, rtol=0)
        assert float((fine.images - coarse.images).abs().mean()) < 0.02


def test_points_that_are_not_valid_stay_at_zero(tmp_path: Path) -> None:
    path = str(tmp_path / "a.png")
    Image.new("L", (90, 60)).save(path)
    lazy = LazyImages([path], ImageDecoder(30, 30, 1, "letterbox"))
    source_to_image = resize_geometry(90, 60, (30, 30), "letterbox", None).matrix()[None]
    points = torch.tensor([[[7.0, 11.0], [0.0, 0.0]]])
    valid = torch.tensor([[True, False]])
    high = use_high_resolution(
        Examples(lazy, {"points": points, "valid": valid}, [path], source_to_image=source_to_image), 2.0
    )
    assert high.images.shape[-2:] == (60, 60)
    torch.testing.assert_close(high.targets["points"], torch.tensor([[[14.5, 22.5], [0.0, 0.0]]]))


def test_masks_are_decoded_at_the_high_resolution(tmp_path: Path) -> None:
    for number in range(4):
        photograph(tmp_path / "train/images" / f"{number}.png", 120, 160, number)
        mask = np.zeros((120, 160), np.uint8)
        mask[30 + 5 * number :, 60:] = 1
        (tmp_path / "train/masks").mkdir(parents=True, exist_ok=True)
        Image.fromarray(mask).save(tmp_path / "train/masks" / f"{number}.png")
    source = MaskFolder(str(tmp_path), ["no", "yes"], size=32, channels=1)
    pipeline = Pipeline(source.spec(), {"crop": RandomResizedCrop(scale=[0.25, 1])})
    for cache in ("auto", "none"):
        high, plain = (load_data(source, DataSettings(val_fraction=0.25, cache=cache), m) for m in (2.0, 1.0))
        fine, coarse = (next(make_loader(d.train, "cpu").batches(torch.arange(3), 3)) for d in (high, plain))
        assert fine.targets["mask"].shape == (3, 64, 64)
        for f in (pipeline.eval_transform, lambda b: pipeline(b, 0, 0)):
            one, other = f(fine).targets["mask"], f(coarse).targets["mask"]
            assert one.shape == other.shape == (3, 32, 32)
            assert float((one == other).float().mean()) > 0.96


def test_the_field_of_view_does_not_depend_on_the_resolution() -> None:
    """A smooth picture, at both resolutions: the same crop of each is equal."""
    spec = DataSpec(1, 40, 30, mean=(0.0,), std=(1.0,))

    def drawn(scale: int) -> Tensor:
        y, x = (torch.arange(scale * side, dtype=torch.float64) + 0.5 for side in spec.image_size)
        waves = 127 + 60 * torch.sin(y / scale / 7)[:, None] + 60 * torch.cos(x / scale / 5)[None]
        return waves.round().to(torch.uint8)[None, None].repeat(8, 1, 1, 1)

    pipeline = Pipeline(spec, {"crop": RandomResizedCrop(), "turn": Rotation()}, border="edge")
    rows = torch.arange(8)
    coarse, fine = (pipeline(Batch(drawn(scale), {}, rows, rows), 3, 1) for scale in (1, 3))
    assert float((coarse.images - fine.images).abs().max()) < 0.06
    plain = pipeline.eval_transform(Batch(drawn(3), {}, rows, rows))
    assert float((plain.images - pipeline.eval_transform(Batch(drawn(1), {}, rows, rows)).images).abs().max()) < 0.06


def test_training_with_crops_decodes_at_high_resolution_and_evaluation_does_not(folder: Path) -> None:
    data = [
        "data=image_folder",
        f"data.root={folder}",
        f"data.size={SIZE}",
        "model=mlp",
        "threads=1",
        "device=cpu",
    ]
    shapes = {}
    for augment in ("flip_crop", "random_resized_crop", "[random_resized_crop,torchvision]"):
        assembly = build_components(read_settings([*data, f"augment={augment}"]))
        shapes[augment] = [assembly.load(augmented).train.images.shape[-1] for augmented in (True, False)]
    assert shapes == {
        "flip_crop": [64, 64],
        "random_resized_crop": [109, 64],
        "[random_resized_crop,torchvision]": [64, 64],
    }


def files(folder: Path, count: int = 5) -> Examples:
    folder.mkdir(exist_ok=True)
    paths = [str(folder / f"{number}.bmp") for number in range(count)]
    for number, path in enumerate(paths):
        if not Path(path).exists():
            Image.new("RGB", (9, 9), (number, 10, 10)).save(path)
    return Examples(LazyImages(paths, ImageDecoder(8, 8, 3)), {}, paths)


def test_the_hash_of_files_depends_on_bytes_and_sizes_only(tmp_path: Path) -> None:
    first = content_hash(files(tmp_path / "a"))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    os.utime(tmp_path / "b" / "1.bmp", (1, 1))
    assert content_hash(files(tmp_path / "b")) == first
    Image.new("RGB", (9, 9), (1, 10, 11)).save(tmp_path / "b" / "1.bmp")
    assert content_hash(files(tmp_path / "b")) != first


def test_the_hash_of_many_files_depends_on_every_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cnntrain.data.load.HASHED_FILES", 2)
    first = content_hash(files(tmp_path))
    Image.new("RGB", (9, 8), (2, 10, 10)).save(tmp_path / "2.bmp")  # not in the sample
    assert content_hash(files(tmp_path)) != first


def test_the_hash_of_archive_members_depends_on_their_bytes(tmp_path: Path) -> None:
    shard = tmp_path / "a.tar"
    paths = [member_path(shard, f"{place}.bmp", place, 10) for place in (100, 200)]
    found = []
    for changed in (None, 0, 99, 110, 210, 100, 109, 200, 209):
        content = bytearray(300)
        if changed is not None:
            content[changed] = 1
        shard.write_bytes(content)
        found.append(content_hash(Examples(LazyImages(paths, ImageDecoder(8, 8, 3)), {}, ["0", "1"])))
    assert found[1:5] == found[:1] * 4  # outside of both
    assert len({found[0], *found[5:]}) == 5


def test_the_hash_depends_on_masks() -> None:
    images, mask = torch.zeros(3, 1, 8, 8, dtype=torch.uint8), torch.zeros(3, 8, 8, dtype=torch.uint8)
    names = ["0", "1", "2"]
    changed = mask.clone()
    changed[1, :4] = 2
    of = [content_hash(Examples(images, {"mask": each}, names)) for each in (mask, mask.clone(), changed)]
    assert of[0] == of[1] != of[2]


@pytest.mark.parametrize("change", ["mirrored", "inverted", "another one"])
def test_the_hash_of_pixels_in_memory(change: str) -> None:
    images = torch.arange(3 * 64).reshape(3, 1, 8, 8).to(torch.uint8)
    other = {"mirrored": images.flip(-1), "inverted": 255 - images, "another one": images[[0, 0, 2]]}[change]
    first = content_hash(Examples(images, {}, ["0", "1", "2"]))
    assert first == content_hash(Examples(images.clone(), {}, ["a", "b", "c"]))
    assert first != content_hash(Examples(other, {}, ["0", "1", "2"]))


def test_fingerprints_of_the_same_examples_differ_only_in_the_hash_of_the_images() -> None:
    assert same_examples("9-ab-cd", "9-ab-ce") and not same_examples("9-aa-cd", "9-ab-cd")


def test_resume_with_changed_pixels_is_rejected(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for label in ("a", "b"):
        (tmp_path / "data/train" / label).mkdir(parents=True)
        for number in range(6):
            pixels = random.integers(0, 255, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data/train" / label / f"{number}.bmp")
    words = (
        "data=image_folder data.size=8 model=mlp threads=1 device=cpu model.values.width=4 augment=none "
        "log.figures=false log.tensorboard=false batch_size=4".split()
    )
    arguments = [*words, f"data.root={tmp_path / 'data'}", f"run_dir={tmp_path / 'run'}"]
    assert main([*arguments, "epochs=1"]) == 0
    arguments.append("resume=auto")
    changed = tmp_path / "data/train/a/3.bmp"
    before = changed.read_bytes()
    Image.new("RGB", (8, 8), (7, 7, 7)).save(changed)
    assert main([*arguments, "epochs=3"]) == 2
    changed.write_bytes(before)
    assert main([*arguments, "epochs=3"]) == 0
