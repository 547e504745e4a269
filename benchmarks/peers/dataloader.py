"""A plain loop over a DataLoader in the style of the PyTorch tutorials; needs no additional packages.

python benchmarks/peers/dataloader.py --root DATA --model fmnist_cnn --precision bf16 --channels-last
"""

import time

import torch
from common import BATCH_SIZE, device, fashion_mnist, network, normalized, parse, print_speed
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def main() -> None:
    options = parse(__doc__)
    images, labels = fashion_mnist(options)
    loader = DataLoader(TensorDataset(normalized(images), labels), batch_size=BATCH_SIZE, shuffle=True)
    model = network(options.model).to(device(), memory_format=options.memory_format)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loss_function = nn.CrossEntropyLoss()
    seconds = []
    for _ in range(options.epochs):
        started = time.perf_counter()
        model.train()
        loss_sum, correct = 0.0, 0
        for x, y in loader:
            x, y = x.to(device(), memory_format=options.memory_format), y.to(device())
            optimizer.zero_grad()
            with torch.autocast(device().type, torch.bfloat16, enabled=options.precision == "bf16"):
                outputs = model(x)
                loss = loss_function(outputs, y)
            loss.backward()
            optimizer.step()
            loss_sum += loss.item() * len(y)
            correct += (outputs.argmax(1) == y).sum().item()
        seconds.append(time.perf_counter() - started)
    print_speed(seconds, len(images))


if __name__ == "__main__":
    main()
