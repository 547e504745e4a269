"""Holding validation data out of the training data: seeded, stratified by label, groups whole."""

from collections.abc import Sequence

import torch
from torch import Tensor

from cnntrain.data.examples import Examples
from cnntrain.errors import UserError
from cnntrain.randomness import hash_seed

Unit = list[int]  # rows that stay together


def split_train_val(
    examples: Examples, val_fraction: float, folds: int | None, fold: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Rows of the training and of the validation examples, both int64 and ascending.

    Each label's share of the validation rows is exact to one example where groups leave it free. Examples
    without a single label each (points, masks) are drawn without regard to them.

    Args:
        val_fraction: share held out, between 0 and 1; not used with `folds`.
        folds, fold: hold out part `fold` of `folds`, which together cover every example once.
        seed: another seed draws another split.

    Raises:
        UserError: a value out of range, or too few examples (or groups) to split.
    """
    units = _units(examples)
    strata = _strata(units, examples.targets.get("label"), seed)
    if folds is not None:
        if not 0 <= fold < folds:
            raise UserError(f"data.fold: must be from 0 to {folds - 1} with data.folds={folds}, got {fold}")
        if folds < 2 or len(units) < folds:
            raise UserError(f"data.folds: must be from 2 to {len(units)} (examples, or groups), got {folds}")
        held_out = _deal(strata, folds)[fold]
    else:
        if not 0 < val_fraction < 1:
            raise UserError(
                f"data.val_fraction: must be between 0 and 1, got {val_fraction}: the best checkpoint is "
                "chosen on examples held out of train"
            )
        if len(units) < 2:
            raise UserError(f"data: {len(units)} example(s) or group(s) can't be split into train and val")
        held_out = _draw(strata, val_fraction, len(examples))
    is_val = torch.zeros(len(examples), dtype=torch.bool)
    is_val[torch.tensor([row for unit in held_out for row in unit], dtype=torch.int64)] = True
    return torch.nonzero(~is_val).flatten(), torch.nonzero(is_val).flatten()


def _units(examples: Examples) -> list[Unit]:
    if examples.groups is None:
        return [[row] for row in range(len(examples))]
    together: dict[str, Unit] = {}
    for row, group in enumerate(examples.groups):
        together.setdefault(group, []).append(row)
    return list(together.values())


def _strata(units: list[Unit], labels: Tensor | None, seed: int) -> list[list[Unit]]:
    """Units by label (a group's most frequent one), shuffled within."""
    by_label: dict[int, list[Unit]] = {}
    values = labels.tolist() if labels is not None and labels.ndim == 1 else None
    for unit in units:
        if values is None or len(unit) == 1:
            most = values[unit[0]] if values else 0
        else:
            of_unit = [values[row] for row in unit]
            most = max(sorted(set(of_unit)), key=of_unit.count)
        by_label.setdefault(most, []).append(unit)
    generator = torch.Generator().manual_seed(hash_seed(seed, "split"))
    shuffled = []
    for label in sorted(by_label):
        members = by_label[label]
        shuffled.append([members[i] for i in torch.randperm(len(members), generator=generator).tolist()])
    return shuffled


def _draw(strata: list[list[Unit]], fraction: float, count: int) -> list[Unit]:
    """Units for validation: each stratum's share, rounded so that the sum is right; never all of one."""
    sizes = [sum(map(len, stratum)) for stratum in strata]
    wanted = min(max(1, round(fraction * count)), count - 1)
    exact = [fraction * size for size in sizes]
    targets = [int(share) for share in exact]
    by_remainder = sorted(range(len(strata)), key=lambda i: targets[i] - exact[i])
    for i in by_remainder[: max(0, wanted - sum(targets))]:
        targets[i] += 1
    held_out: list[Unit] = []
    for stratum, target in zip(strata, targets, strict=True):
        missing, left = target, len(stratum)
        for unit in stratum:
            if left > 1 and missing > 0 and len(unit) <= 2 * missing:  # takes us nearer to the target
                held_out.append(unit)
                missing, left = missing - len(unit), left - 1
    if not held_out:  # groups too large for their share, or one example a class: take the smallest there is
        held_out = [min((unit for stratum in strata for unit in stratum), key=len)]
    return held_out


def _deal(strata: list[list[Unit]], folds: int) -> list[list[Unit]]:
    """Units dealt into folds, largest first, each to the fold with least of its label, then least in all."""
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
    """At most `limit` of `count` rows, drawn at random, ascending; None when all may stay."""
    if limit is None or count <= limit:
        return None
    generator = torch.Generator().manual_seed(hash_seed(seed, "limit", name))
    return torch.randperm(count, generator=generator)[:limit].sort().values


def check_groups_apart(splits: dict[str, Sequence[str] | None]) -> None:
    """Refuse a group that has examples in more than one split: what was learned would be tested.

    Raises:
        UserError: names the groups.
    """
    seen: dict[str, set[str]] = {}
    for split, groups in splits.items():
        for group in groups or ():
            seen.setdefault(group, set()).add(split)
    torn = sorted(group for group, where in seen.items() if len(where) > 1)
    if torn:
        shown = ", ".join(f"{group!r} ({' and '.join(sorted(seen[group]))})" for group in torn[:5])
        raise UserError(
            f"data: {len(torn)} group(s) lie in more than one split: {shown}; a group must stay whole"
        )
