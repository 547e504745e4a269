"""A fastai Learner on tensors: pip install fastai

    python benchmarks/peers/fastai_peer.py --root DATA --model fmnist_cnn --precision bf16 --channels-last

fastai supports mixed precision on GPUs only: on a CPU `--precision bf16` is refused.
"""

import sys
import time

from common import BATCH_SIZE, device, fashion_mnist, network, normalized, parse, print_speed
from fastai.vision.all import Callback, CrossEntropyLossFlat, DataLoaders, Learner, accuracy
from torch.utils.data import TensorDataset


class EpochTimer(Callback):
    """Record the seconds of every epoch's training."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def before_train(self) -> None:
        self.started = time.perf_counter()

    def after_train(self) -> None:
        self.seconds.append(time.perf_counter() - self.started)


def main() -> None:
    options = parse(__doc__)
    if options.precision == "bf16" and device().type == "cpu":
        sys.exit("fastai supports mixed precision on GPUs only")
    images, labels = fashion_mnist(options)
    x = normalized(images)
    train, valid = TensorDataset(x, labels), TensorDataset(x[:BATCH_SIZE], labels[:BATCH_SIZE])
    loaders = DataLoaders.from_dsets(train, valid, bs=BATCH_SIZE, num_workers=0, device=device())
    learner = Learner(loaders, network(options.model), loss_func=CrossEntropyLossFlat(), metrics=accuracy)
    if options.channels_last:
        learner = learner.to_channelslast(use_amp=False)
    if options.precision == "bf16":
        learner = learner.to_bf16()
    timer = EpochTimer()
    learner.add_cb(timer)
    learner.fit(options.epochs, 1e-3)
    print_speed(timer.seconds, len(images))


if __name__ == "__main__":
    main()
