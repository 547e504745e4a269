"""Evaluation of a split: every example once, in order, or a part of them spread evenly."""

import torch

from cnntrain import compose
from cnntrain.train.evaluate import evaluate
from cnntrain.train.setup import build_components


def test_every_example_is_evaluated_once_or_a_limited_number_spread_evenly() -> None:
    components = build_components(compose("model=mlp", "data.limit=60", "threads=1", "device=cpu"))
    data = components.load()
    loader, model = components.loader(data.train), components.model.train()
    rows: list[int] = []
    outputs: list[torch.Tensor] = []

    def on_batch(batch, values: torch.Tensor) -> None:
        rows.extend(batch.index.tolist())
        outputs.append(values)

    metrics = evaluate(components, model, loader, 16, on_batch=on_batch).compute()
    assert rows == list(range(len(loader))) and len(torch.cat(outputs)) == len(rows)
    assert model.training and not outputs[0].requires_grad and metrics["loss"] > 0
    rows.clear()
    evaluate(components, model, loader, 16, limit_batches=2, on_batch=on_batch)
    assert len(rows) == 32 and (rows[0], rows[-1]) == (0, len(loader) - 1) and rows == sorted(set(rows))
