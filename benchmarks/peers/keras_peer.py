"""Keras on its torch backend, `compile` and `fit`: pip install keras

    python benchmarks/peers/keras_peer.py --root DATA --model fmnist_cnn --precision bf16

Keras stores images as (N, H, W, C) by default, which torch sees as channels_last without a copy, so --channels-last
has no effect.
"""

import os
import time

os.environ["KERAS_BACKEND"] = "torch"

import keras
from common import BATCH_SIZE, DENSE_DROPOUT, DROPOUT, fashion_mnist, normalized, parse, print_speed
from keras import layers


def network(name: str) -> keras.Model:
    """Build the layers of `common.network`."""

    def block(out: int) -> list[layers.Layer]:
        return [
            layers.Conv2D(out, 3, padding="same", activation="relu"),
            layers.BatchNormalization(),
            layers.Conv2D(out, 3, padding="same", activation="relu"),
            layers.BatchNormalization(),
            layers.MaxPooling2D(),
            layers.Dropout(DROPOUT),
        ]

    lenet5 = [
        layers.Conv2D(20, 5, padding="same", activation="relu"),
        layers.MaxPooling2D(),
        layers.Conv2D(50, 5, padding="same", activation="relu"),
        layers.MaxPooling2D(),
        layers.Flatten(),
        layers.Dense(500, activation="relu"),
    ]
    fmnist_cnn = [
        *block(32),
        *block(64),
        layers.Flatten(),
        layers.Dense(512, activation="relu"),
        layers.BatchNormalization(),
        layers.Dropout(DENSE_DROPOUT),
    ]
    body = lenet5 if name == "lenet5" else fmnist_cnn
    return keras.Sequential([keras.Input((28, 28, 1)), *body, layers.Dense(10, dtype="float32")])


class EpochTimer(keras.callbacks.Callback):
    """Record the seconds of every epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: list[float] = []

    def on_epoch_begin(self, epoch: int, logs: object = None) -> None:
        self.started = time.perf_counter()

    def on_epoch_end(self, epoch: int, logs: object = None) -> None:
        self.seconds.append(time.perf_counter() - self.started)


def main() -> None:
    options = parse(__doc__)
    if options.precision == "bf16":
        keras.mixed_precision.set_global_policy("mixed_bfloat16")
    images, labels = fashion_mnist(options)
    x, y = normalized(images).permute(0, 2, 3, 1).numpy(), labels.numpy()
    model = network(options.model)
    model.compile(
        optimizer=keras.optimizers.AdamW(1e-3),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    timer = EpochTimer()
    model.fit(x, y, batch_size=BATCH_SIZE, epochs=options.epochs, callbacks=[timer], verbose=2)
    print_speed(timer.seconds, len(images))


if __name__ == "__main__":
    main()
