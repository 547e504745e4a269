"""Lightning with the defaults of its Trainer (logger, checkpoint, progress bar): pip install lightning

python benchmarks/peers/lightning_peer.py --root DATA --model fmnist_cnn --precision bf16 --channels-last
"""

import tempfile
import time
import warnings

import lightning
import torch
from common import BATCH_SIZE, Options, fashion_mnist, network, normalized, parse, print_speed
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset


class Classifier(lightning.LightningModule):
    def __init__(self, options: Options) -> None:
        super().__init__()
        self.model = network(options.model).to(memory_format=options.memory_format)
        self.memory_format = options.memory_format

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        x, y = batch
        outputs = self.model(x.contiguous(memory_format=self.memory_format))
        loss = cross_entropy(outputs, y)
        self.log("train_loss", loss, prog_bar=True)
        self.log("train_accuracy", (outputs.argmax(1) == y).float().mean(), on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class EpochTimer(lightning.Callback):
    """Record the seconds of every epoch."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_epoch_start(self, *_: object) -> None:
        self.started = time.perf_counter()

    def on_train_epoch_end(self, *_: object) -> None:
        self.seconds.append(time.perf_counter() - self.started)


def main() -> None:
    options = parse(__doc__)
    warnings.filterwarnings("ignore")
    images, labels = fashion_mnist(options)
    loader = DataLoader(TensorDataset(normalized(images), labels), batch_size=BATCH_SIZE, shuffle=True)
    timer = EpochTimer()
    precision = "bf16-mixed" if options.precision == "bf16" else "32-true"
    with tempfile.TemporaryDirectory() as folder:
        trainer = lightning.Trainer(
            max_epochs=options.epochs, precision=precision, callbacks=[timer], default_root_dir=folder
        )
        trainer.fit(Classifier(options), loader)
    print_speed(timer.seconds, len(images))


if __name__ == "__main__":
    main()
