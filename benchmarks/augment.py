"""Time the augmentation of a batch by cnntrain, by torchvision v2 image by image, and by kornia if it is installed.

    python benchmarks/augment.py                  # one CPU core
    python benchmarks/augment.py --device cuda    # also the share of a resnet18 training step

Prints milliseconds per batch (the minimum of many runs), also as multiples of cnntrain's. All start from the same
uint8 batch and return normalized float32 images. kornia is not a dependency: `pip install kornia` to compare.
"""

import time
from collections.abc import Callable

import torch
from common import parser_of
from torch import Tensor
from torchvision.transforms import v2

from cnntrain.augment.base import Augmentation
from cnntrain.augment.color import ColorJitter
from cnntrain.augment.geometry import Crop, HorizontalFlip, Rotation, Zoom
from cnntrain.augment.pipeline import Pipeline
from cnntrain.types import Batch, DataSpec

MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)
JITTER = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1}


def min_ms(run: Callable[[], object], device: torch.device, duration_s: float = 1.5) -> float:
    """Return the milliseconds of the fastest run within `duration_s` (at least five runs), after two to warm up."""

    def run_ms() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return 1000 * (time.perf_counter() - start)

    for _ in range(2):
        run_ms()
    times: list[float] = []
    started = time.perf_counter()
    while len(times) < 5 or time.perf_counter() - started < duration_s:
        times.append(run_ms())
    return min(times)


def cnntrain_run(images: Tensor, augmentations: dict[str, Augmentation]) -> Callable[[], Tensor]:
    """Return a function that augments and normalizes a batch with cnntrain."""
    count, channels, height, width = images.shape
    pipeline = Pipeline(DataSpec(channels, height, width, mean=MEAN, std=STD), augmentations)
    position = torch.arange(count)
    batch = Batch(images, {"label": position.to(images.device)}, position, position)
    return lambda: pipeline(batch, 0, 0).images


def small_images(device: torch.device) -> dict[str, Callable[[], object]]:
    """Crop with padding, flip and color jitter of 128 images 3x32x32."""
    images = torch.randint(0, 256, (128, 3, 32, 32), dtype=torch.uint8, device=device)
    runs: dict[str, Callable[[], object]] = {
        "cnntrain": cnntrain_run(
            images, {"crop": Crop(padding=4), "flip": HorizontalFlip(), "jitter": ColorJitter(**JITTER)}
        )
    }
    transform = v2.Compose(
        [
            v2.RandomCrop(32, padding=4),
            v2.RandomHorizontalFlip(),
            v2.ColorJitter(**JITTER),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )
    runs["torchvision v2, per image"] = lambda: torch.stack([transform(image) for image in images])
    kornia = import_kornia()
    if kornia:
        augment = kornia.AugmentationSequential(
            kornia.RandomCrop((32, 32), padding=4),
            kornia.RandomHorizontalFlip(),
            kornia.ColorJitter(**JITTER),
            kornia.Normalize(torch.tensor(MEAN), torch.tensor(STD)),
        )
        runs["kornia"] = lambda: augment(images.float() / 255)
        augment_without_hue = kornia.AugmentationSequential(
            kornia.RandomCrop((32, 32), padding=4),
            kornia.RandomHorizontalFlip(),
            kornia.ColorJitter(**{**JITTER, "hue": 0.0}),
            kornia.Normalize(torch.tensor(MEAN), torch.tensor(STD)),
        )
        runs["kornia, without its hue"] = lambda: augment_without_hue(images.float() / 255)
    return runs


def large_images(device: torch.device) -> dict[str, Callable[[], object]]:
    """Rotation, zoom, crop and flip of 16 images 3x224x224: one resample against a chain."""
    images = torch.randint(0, 256, (16, 3, 224, 224), dtype=torch.uint8, device=device)
    runs: dict[str, Callable[[], object]] = {
        "cnntrain": cnntrain_run(
            images,
            {
                "rotation": Rotation(degrees=15),
                "zoom": Zoom(factor=(0.8, 1.25)),
                "crop": Crop(padding=16),
                "flip": HorizontalFlip(),
            },
        )
    }
    transform = v2.Compose(
        [
            v2.RandomAffine(15, scale=(0.8, 1.25), interpolation=v2.InterpolationMode.BILINEAR),
            v2.RandomCrop(224, padding=16),
            v2.RandomHorizontalFlip(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )
    runs["torchvision v2, per image"] = lambda: torch.stack([transform(image) for image in images])
    kornia = import_kornia()
    if kornia:
        augment = kornia.AugmentationSequential(
            kornia.RandomAffine(15.0, scale=(0.8, 1.25), p=1.0),
            kornia.RandomCrop((224, 224), padding=16),
            kornia.RandomHorizontalFlip(),
            kornia.Normalize(torch.tensor(MEAN), torch.tensor(STD)),
        )
        runs["kornia"] = lambda: augment(images.float() / 255)
    return runs


def import_kornia():
    """Return kornia.augmentation, or None if it is not installed."""
    try:
        import kornia.augmentation
    except ImportError:
        return None
    return kornia.augmentation


def print_share_of_step(device: torch.device) -> None:
    """Compare the augmentation of 256 images 3x224x224 with one bfloat16 training step of torchvision's resnet18."""
    from torchvision.models import resnet18

    model = resnet18().to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    images = torch.randint(0, 256, (256, 3, 224, 224), dtype=torch.uint8, device=device)
    labels = torch.arange(256, device=device)
    cases: dict[str, dict[str, Augmentation]] = {
        "crop, flip, jitter": {"crop": Crop(), "flip": HorizontalFlip(), "jitter": ColorJitter(**JITTER)},
        "rotation, zoom, flip, jitter": {
            "rotation": Rotation(),
            "zoom": Zoom(),
            "flip": HorizontalFlip(),
            "jitter": ColorJitter(**JITTER),
        },
    }
    normalized = cnntrain_run(images, {})().to(memory_format=torch.channels_last)

    def step() -> None:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss = torch.nn.functional.cross_entropy(model(normalized), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step_ms = min_ms(step, device)
    print(f"\nresnet18 step, 256 images 3x224x224: {step_ms:.2f} ms")
    for name, augmentations in cases.items():
        augment_ms = min_ms(cnntrain_run(images, augmentations), device)
        print(f"  {name:<32}{augment_ms:>9.2f} ms {100 * augment_ms / step_ms:>7.1f} % of the step")


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    for runs in (small_images, large_images):
        print(f"\n{runs.__doc__}")
        times = {name: min_ms(run, device) for name, run in runs(device).items()}
        for name, value in times.items():
            print(f"  {name:<32}{value:>9.2f} ms {value / times['cnntrain']:>7.1f} x")
    if import_kornia() is None:
        print("\n(kornia is not installed)")
    if device.type == "cuda":
        print_share_of_step(device)


if __name__ == "__main__":
    main()
