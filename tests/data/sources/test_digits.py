"""scikit-learn's digits."""

import numpy as np
import torch

from cnntrain.data.sources.digits import Digits


def test_digits_equal_those_of_scikit_learn():
    from sklearn.datasets import load_digits

    splits = Digits().load()
    train, test = splits["train"], splits["test"]
    assert (len(train), len(test)) == (1438, 359)
    reference = load_digits()
    rows = [int(name.removeprefix("digits/")) for name in train.names + test.names]
    assert sorted(rows) == list(range(1797))
    images = torch.cat([train.images, test.images])[:, 0]
    assert np.array_equal(images.numpy(), (reference.images[rows] * 15).astype(np.uint8))
    assert torch.cat([train.targets["label"], test.targets["label"]]).tolist() == reference.target[rows].tolist()
    assert not Digits().spec().hflip_ok
    counts = torch.bincount(test.targets["label"])
    assert int(counts.max() - counts.min()) <= 2


def test_digits_import_neither_scikit_learn_nor_torchvision():
    import subprocess
    import sys

    code = (
        "import sys; from cnntrain.data.sources.digits import Digits; from cnntrain.data.load import load_data;"
        "import cnntrain.data.loader; load_data(Digits());"
        "print([m for m in ('sklearn', 'torchvision', 'PIL', 'scipy', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
