"""Where decoded images are kept."""

import torch

from cnntrain.data.examples import Examples
from cnntrain.data.loader import CachedLoader


def test_masks_are_kept_in_the_same_memory_as_images() -> None:
    images, mask = torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.zeros(4, 8, 8, dtype=torch.uint8)
    examples = Examples(images, {"mask": mask, "label": torch.arange(4)}, list("abcd"))
    assert examples.decoded_bytes() == images.numel() + mask.numel()
    on_host = CachedLoader(examples, torch.device("meta"), on_device=False)
    assert on_host.targets["mask"].device.type == "cpu" and on_host.targets["label"].device.type == "meta"
    on_gpu = CachedLoader(examples, torch.device("meta"), on_device=True)
    assert on_gpu.targets["mask"].device.type == "meta"
    for loader in (on_host, on_gpu):
        batch = next(loader.batches(torch.arange(4), 2))
        assert {each.device.type for each in (batch.images, *batch.targets.values())} == {"meta"}
        assert batch.targets["mask"].shape == (2, 8, 8)
