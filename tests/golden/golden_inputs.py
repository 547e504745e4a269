"""Input files of the golden record: small images, masks, keypoints and networks, written from fixed seeds."""

import csv
import io
import json
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

EXIF_ORIENTATION = 0x0112  # tag number
POINTS = ("left_eye", "right_eye", "nose")
Shape = tuple[int, int]  # (height, width) in pixels


def write_inputs(folder: Path) -> None:
    """Write all input files to `folder`."""
    for name, write in WRITERS.items():
        target = folder / name
        target.mkdir(parents=True)
        write(target)


def textured_image(random: np.random.Generator, label: int, shape: Shape) -> np.ndarray:
    """Return a uint8 image (H, W, 3) whose pattern depends on the label: rows, columns or a checkerboard."""
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    wave = (np.sin(rows / 3), np.sin(columns / 3), np.sin(rows / 3) * np.sin(columns / 3))[label % 3]
    color = random.uniform(60, 190, 3)
    image = color + 50 * wave[:, :, None] + random.normal(0, 20, (*shape, 3))
    return image.clip(0, 255).astype(np.uint8)


def write_class_folders(folder: Path) -> None:
    """Write `SPLIT/CLASS/IMAGE` in several file formats and sizes; one is large, one is rotated by EXIF."""
    random = np.random.default_rng(1)
    formats = ("png", "jpg", "bmp", "webp", "jpg", "gif")
    for split, count in (("train", 12), ("val", 4), ("test", 4)):
        for label, name in enumerate(("bars", "checks", "columns")):
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                shape = (280, 400) if (split, number) == ("train", 1) else (30 + 5 * number, 72 - 3 * number)
                image = Image.fromarray(textured_image(random, label, shape))
                image = image.convert("L") if number == 3 else image
                exif = Image.Exif()
                exif[EXIF_ORIENTATION] = 6 if number == 4 else 1
                image.save(folder / split / name / f"{number:02}.{formats[number % 6]}", exif=exif)


def write_table(folder: Path) -> None:
    """Write 16-bit gray images and `table.csv` with path, label, split and group."""
    random = np.random.default_rng(2)
    with (folder / "table.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("path", "label", "split", "group"))
        for number in range(48):
            label = number % 3
            gray = textured_image(random, label, (24, 28))[:, :, 0].astype(np.uint16) * 16  # 12 bits
            Image.fromarray(gray).save(folder / f"{number:02}.png")
            split = "test" if number % 6 == 5 else "train"
            writer.writerow((f"{number:02}.png", f"kind{label}", split, f"{split}{number // 4}"))


def write_shards(folder: Path) -> None:
    """Write tar shards with KEY.png and KEY.cls."""
    random = np.random.default_rng(3)
    for shard, count in (("train-000", 18), ("train-001", 12), ("val-000", 6), ("test-000", 6)):
        with tarfile.open(folder / f"{shard}.tar", "w") as archive:
            for number in range(count):
                buffer = io.BytesIO()
                Image.fromarray(textured_image(random, number, (28, 28))).save(buffer, "png")
                for name, content in ((f"{number:03}.png", buffer.getvalue()), (f"{number:03}.cls", None)):
                    data = content if content is not None else str(number % 3).encode()
                    entry = tarfile.TarInfo(f"{shard}-{name}")
                    entry.size = len(data)
                    archive.addfile(entry, io.BytesIO(data))


def write_idx(folder: Path) -> None:
    """Write four IDX files of the format of MNIST, with 28x28 images of ten classes."""
    random = np.random.default_rng(4)
    patterns = random.integers(0, 180, (10, 28, 28))
    for split, count in (("train", 120), ("t10k", 40)):
        labels = (np.arange(count) % 10).astype(np.uint8)
        images = (patterns[labels] + random.integers(0, 70, (count, 28, 28))).astype(np.uint8)
        (folder / f"{split}-images-idx3-ubyte").write_bytes(
            struct.pack(">BBBBIII", 0, 0, 8, 3, *images.shape) + images.tobytes()
        )
        (folder / f"{split}-labels-idx1-ubyte").write_bytes(struct.pack(">BBBBI", 0, 0, 8, 1, count) + labels.tobytes())


def write_masks(folder: Path) -> None:
    """Write `SPLIT/images/NAME.jpg` and `SPLIT/masks/NAME.png` with the ids 0, 1, 2 and 255 (unlabeled)."""
    random = np.random.default_rng(5)
    for split, count in (("train", 20), ("val", 6), ("test", 6)):
        for kind in ("images", "masks"):
            (folder / split / kind).mkdir(parents=True)
        for number in range(count):
            shape = (40 + number % 5, 52 - number % 3)
            image = textured_image(random, 0, shape)
            mask = np.zeros(shape, np.uint8)
            for label in (1, 2):
                top, left = random.integers(0, 18, 2)
                area = slice(top, top + random.integers(10, 22)), slice(left, left + random.integers(10, 30))
                image[area] = textured_image(random, label, shape)[area] // (label + 1)
                mask[area] = label
            mask[:2] = 255
            Image.fromarray(image).save(folder / split / "images" / f"{number}.jpg", quality=92)
            Image.fromarray(mask).save(folder / split / "masks" / f"{number}.png")


def face(random: np.random.Generator, shape: Shape = (60, 72)) -> tuple[Image.Image, np.ndarray]:
    """Return an image of an ellipse with three marks, and their coordinates (3, 2) as x and y in pixels."""
    image = Image.fromarray(textured_image(random, 0, shape))
    center = np.array([shape[1] / 2, shape[0] / 2]) + random.uniform(-6, 6, 2)
    size = random.uniform(12, 20)
    offsets = np.array([[0.5, -0.4], [-0.5, -0.4], [0.0, 0.3]])
    points = center + size * (offsets + random.normal(0, 0.05, offsets.shape))
    draw = ImageDraw.Draw(image)
    draw.ellipse([*(center - size).tolist(), *(center + size).tolist()], fill=(220, 190, 160))
    for (x, y), color in zip(points.tolist(), ("navy", "darkgreen", "maroon"), strict=True):
        draw.ellipse([x - 2, y - 2, x + 2, y + 2], fill=color)
    return image, points


def write_faces(folder: Path) -> None:
    """Write the same faces with annotations as a CSV table with boxes, as COCO JSON, and as dlib XML."""
    random = np.random.default_rng(6)
    table, annotations, xml = [], [], {"train": "", "test": ""}
    for number in range(36):
        image, points = face(random)
        name = f"{number:02}.png"
        image.save(folder / name)
        split = "test" if number % 6 == 5 else "train"
        left, top = points.min(0) - 8
        right, bottom = points.max(0) + 8
        texts = [f"{value:.2f}" for value in points.flatten()]
        if number % 9 == 4:
            texts[4:] = ["", ""]  # the nose is not labeled
        box = [f"{value:.1f}" for value in (left, top, right, bottom)]
        table.append((name, *texts, *box, split, f"{split}{number // 3}"))
        keypoints = [value for x, y in points.round(2).tolist() for value in (x, y, 2)]
        annotations.append(
            {
                "id": 100 + number,
                "image_id": number,
                "category_id": 1,
                "keypoints": keypoints,
                "bbox": [left, top, right - left, bottom - top],
            }
        )
        parts = "".join(f"<part name='{i}' x='{x:.0f}' y='{y:.0f}'/>" for i, (x, y) in enumerate(points))
        size = f"width='{right - left:.0f}' height='{bottom - top:.0f}'"
        xml[split] += f"<image file='{name}'><box top='{top:.0f}' left='{left:.0f}' {size}>{parts}</box></image>"
    columns = [f"{name}_{axis}" for name in POINTS for axis in "xy"]
    sides = [f"box_{side}" for side in ("left", "top", "right", "bottom")]
    with (folder / "points.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("image_name", *columns, *sides, "split", "group"), *table])
    with (folder / "boxes.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("image_name", *sides), *([row[0], *row[7:11]] for row in table[:4])])
    images = [{"id": number, "file_name": f"{number:02}.png"} for number in range(36)]
    category = {"id": 1, "keypoints": list(POINTS), "skeleton": [[1, 2], [2, 3]]}
    for split, rows in (("train", annotations[:24]), ("val", annotations[24:])):
        content = {"images": images, "annotations": rows, "categories": [category]}
        (folder / f"{split}.json").write_text(json.dumps(content))
    for split, text in xml.items():
        text = f"<?xml version='1.0'?><dataset><images>{text}</images></dataset>"
        (folder / f"{split}.xml").write_text(text)


def write_cats(folder: Path) -> None:
    """Write images with a `.cat` file of nine points each."""
    random = np.random.default_rng(7)
    offsets = np.array(
        [
            [-0.4, -0.2],
            [0.4, -0.2],
            [0, 0.4],
            [-0.8, -0.5],
            [-0.7, -1],
            [-0.3, -0.7],
            [0.3, -0.7],
            [0.7, -1],
            [0.8, -0.5],
        ]
    )
    for number in range(20):
        image, points = face(random)
        coordinates = (points.mean(0) + 20 * offsets + random.normal(0, 1, offsets.shape)).round().astype(int)
        image.save(folder / f"{number:02}.jpg", quality=92)
        words = " ".join(map(str, coordinates.flatten().tolist()))
        (folder / f"{number:02}.jpg.cat").write_text(f"9 {words}")


def write_photographs(folder: Path) -> None:
    """Write images of several sizes and modes for `predict`."""
    random = np.random.default_rng(8)
    for number, mode in enumerate(("RGB", "L", "RGBA", "P", "RGB")):
        image = Image.fromarray(textured_image(random, number, (24 + 9 * number, 50 - 4 * number)))
        image.convert(mode).save(folder / f"{number}.png")


COUNTDOWN = "stop_after"  # file with the number of training steps until the network `stopping` sends a signal
STOPPING_NETWORK = f'''"""A network that sends SIGTERM to its process in the middle of training."""

import signal
from pathlib import Path

import torch
from torch import nn

COUNTDOWN = Path("{COUNTDOWN}")


class Stopping(nn.Module):
    def __init__(self, in_channels, num_outputs, width):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(in_channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.Dropout(0.1),
            nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, num_outputs),
        )

    def forward(self, images):
        if self.training and torch.is_grad_enabled() and images.device.type == "cpu" and COUNTDOWN.exists():
            left = int(COUNTDOWN.read_text()) - 1
            COUNTDOWN.write_text(str(left))
            if left == 0:
                COUNTDOWN.unlink()
                signal.raise_signal(signal.SIGTERM)
        return self.layers(images)
'''


def write_networks(folder: Path) -> None:
    """Write a folder for --config-dir: a network in Python, one as a list of layers, and an experiment."""
    (folder / "model").mkdir()
    (folder / "experiment").mkdir()
    (folder / "golden_networks.py").write_text(STOPPING_NETWORK)
    (folder / "model" / "stopping.yaml").write_text("_target_: golden_networks.Stopping\nwidth: 8\n")
    (folder / "model" / "layers.yaml").write_text(
        "_target_: cnntrain.models.sequential.parser.Sequential\nlayers:\n"
        "  - conv: {out: 8, kernel: 3, padding: same, bias: false}\n  - batch_norm\n  - relu\n"
        "  - max_pool: 2\n"
        "  - residual: {layers: [{conv: {out: 8, kernel: 3, padding: same}}, relu]}\n"
        "  - depthwise_separable: {out: 16}\n  - dropout: 0.1\n  - global_avg_pool\n  - output\n"
    )
    (folder / "experiment" / "expects_too_much.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /model: mlp\n  - override /data: digits\n"
        "epochs: 1\ndata: {limit: 200}\nprecision: fp32\n"
        "expect: {parameters: 9610, test/top1: '>=0.999'}\n"
    )


WRITERS: dict[str, Callable[[Path], None]] = {
    "classes": write_class_folders,
    "table": write_table,
    "shards": write_shards,
    "idx": write_idx,
    "masks": write_masks,
    "faces": write_faces,
    "cats": write_cats,
    "photographs": write_photographs,
    "networks": write_networks,
}
