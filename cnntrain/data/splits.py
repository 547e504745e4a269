"""Split validation examples off the training examples: seeded, stratified by label, without splitting groups."""

from collections.abc import Sequence

import torch
from torch import Tensor

from cnntrain.data.examples import Examples
from cnntrain.errors import UserError
from cnntrain.randomness import hash_seed

Unit = list[int]  # rows of one example or of one group


def split_train_val(
    examples: Examples, val_fraction: float, folds: int | None, fold: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Return the rows of the training and of the validation examples, both int64 and ascending.

    The split is stratified by label; the share of each label is exact to one example if there are no groups. Keypoints
    and masks are not stratified.

    Args:
        val_fraction: share of validation examples, between 0 and 1; ignored if `folds` is given.
        folds, fold: use part `fold` of `folds` equal parts for validation.
        seed: another seed gives another split.
    """
    units = _units(examples)
    strata = _strata(units, examples.targets.get("label"), seed)
    if folds is not None:
        if not 0 <= fold < folds:
            raise UserError(f"data.fold: must be from 0 to {folds - 1} with data.folds={folds}, got {fold}")
        if folds < 2 or len(units) < folds:
            raise UserError(f"data.folds: must be from 2 to {len(units)} (examples, or groups), got {folds}")
        held_out = _make_folds(strata, folds)[fold]
    else:
        if not 0 < val_fraction < 1:
            raise UserError(
                f"data.val_fraction: must be between 0 and 1, got {val_fraction}; validation examples are needed to "
                "select the best checkpoint"
            )
        if len(units) < 2:
            raise UserError(f"data: {len(units)} example(s) or group(s) cannot be split into train and val")
        held_out = _sample(strata, val_fraction, len(examples))
    is_val = torch.zeros(len(examples), dtype=torch.bool)
    is_val[torch.tensor([row for unit in held_out for row in unit], dtype=torch.int64)] = True
    return torch.nonzero(~is_val).flatten(), torch.nonzero(is_val).flatten()


def _units(examples: Examples) -> list[Unit]:
    if examples.groups is None:
        return [[row] for row in range(len(examples))]
    by_group: dict[str, Unit] = {}
    for row, group in enumerate(examples.groups):
        by_group.setdefault(group, []).append(row)
    return list(by_group.values())


def _strata(units: list[Unit], labels: Tensor | None, seed: int) -> list[list[Unit]]:
    """Return shuffled units for each label; the label of a group is its most frequent one."""
    by_label: dict[int, list[Unit]] = {}
    values = labels.tolist() if labels is not None and labels.ndim == 1 else None
    for unit in units:
        if values is None or len(unit) == 1:
            label = values[unit[0]] if values else 0
        else:
            unit_labels = [values[row] for row in unit]
            label = max(sorted(set(unit_labels)), key=unit_labels.count)
        by_label.setdefault(label, []).append(unit)
    generator = torch.Generator().manual_seed(hash_seed(seed, "split"))
    shuffled = []
    for label in sorted(by_label):
        members = by_label[label]
        shuffled.append([members[i] for i in torch.randperm(len(members), generator=generator).tolist()])
    return shuffled


def _sample(strata: list[list[Unit]], fraction: float, count: int) -> list[Unit]:
    """Return the validation units: the share of each stratum, by largest remainder; never a whole stratum."""
    sizes = [sum(map(len, stratum)) for stratum in strata]
    total = min(max(1, round(fraction * count)), count - 1)
    exact = [fraction * size for size in sizes]
    targets = [int(share) for share in exact]
    by_remainder = sorted(range(len(strata)), key=lambda i: targets[i] - exact[i])
    for i in by_remainder[: max(0, total - sum(targets))]:
        targets[i] += 1
    held_out: list[Unit] = []
    for stratum, target in zip(strata, targets, strict=True):
        missing, left = target, len(stratum)
        for unit in stratum:
            if left > 1 and missing > 0 and len(unit) <= 2 * missing:  # brings the sum closer to the target
                held_out.append(unit)
                missing, left = missing - len(unit), left - 1
    if not held_out:  # groups too large, or one example per class: take the smallest unit
        held_out = [min((unit for stratum in strata for unit in stratum), key=len)]
    return held_out


def _make_folds(strata: list[list[Unit]], folds: int) -> list[list[Unit]]:
    """Assign units, largest first, to the fold with the fewest examples of their label, then the fewest in all."""
    parts: list[list[Unit]] = [[] for _ in range(folds)]
    totals = [0] * folds
    for stratum in strata:
        counts = [0] * folds
        for unit in sorted(stratum, key=len, reverse=True):
            chosen = min(range(folds), key=lambda k: (counts[k], totals[k]))
            parts[chosen].append(unit)
            counts[chosen] += len(unit)
            totals[chosen] += len(unit)
    return parts


def limit_rows(count: int, limit: int | None, seed: int, name: str) -> Tensor | None:
    """Return a random sample of `limit` of `count` rows, ascending; None if there are at most `limit` rows."""
    if limit is None or count <= limit:
        return None
    generator = torch.Generator().manual_seed(hash_seed(seed, "limit", name))
    return torch.randperm(count, generator=generator)[:limit].sort().values


def check_groups(splits: dict[str, Sequence[str] | None]) -> None:
    """Reject groups with examples in more than one split, because training data would leak into the evaluation."""
    splits_of: dict[str, set[str]] = {}
    for split, groups in splits.items():
        for group in groups or ():
            splits_of.setdefault(group, set()).add(split)
    leaking = sorted(group for group, where in splits_of.items() if len(where) > 1)
    if leaking:
        shown = ", ".join(f"{group!r} ({' and '.join(sorted(splits_of[group]))})" for group in leaking[:5])
        raise UserError(
            f"data: {len(leaking)} group(s) are in more than one split: {shown}; keep each group in one split"
        )
