"""Splits are disjoint, stratified, respect groups, and depend on the seed alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cnntrain.data.examples import Examples
from cnntrain.data.splits import check_groups, limit_rows, split_train_val
from cnntrain.errors import UserError


def examples_of(labels: list[int], groups: list[str] | None = None) -> Examples:
    count = len(labels)
    targets = {"label": torch.tensor(labels)}
    return Examples(torch.zeros(count, 1, 1, 1, dtype=torch.uint8), targets, [f"{i}" for i in range(count)], groups)


labels = st.lists(st.integers(0, 4), min_size=2, max_size=120)
grouped = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9)), min_size=2, max_size=80).filter(
    lambda pairs: len({group for _, group in pairs}) >= 3
)


@settings(max_examples=80, deadline=None)
@given(labels, st.floats(0.05, 0.9), st.integers(0, 5))
def test_train_and_val_partition_the_examples_with_stratified_counts(labels, fraction, seed):
    examples = examples_of(labels)
    train, val = split_train_val(examples, fraction, None, 0, seed)
    assert sorted([*train.tolist(), *val.tolist()]) == list(range(len(labels)))
    assert len(train) > 0
    assert len(val) > 0
    for label in set(labels):
        size = labels.count(label)
        held_out = sum(labels[i] == label for i in val.tolist())
        assert abs(held_out - fraction * size) <= 1
        if len(set(labels)) < len(labels):
            assert held_out < size or size == 1


@settings(max_examples=80, deadline=None)
@given(labels.filter(lambda v: len(v) >= 5), st.integers(2, 5), st.integers(0, 5))
def test_folds_cover_every_example_once_and_differ_by_one(labels, folds, seed):
    examples = examples_of(labels)
    parts = [split_train_val(examples, 0.1, folds, fold, seed)[1].tolist() for fold in range(folds)]
    assert sorted(row for part in parts for row in part) == list(range(len(labels)))
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1
    for label in set(labels):
        counts = [sum(labels[i] == label for i in part) for part in parts]
        assert max(counts) - min(counts) <= 1


@settings(max_examples=80, deadline=None)
@given(grouped, st.sampled_from([None, 3]), st.floats(0.1, 0.6))
def test_groups_are_not_split(pairs, folds, fraction):
    groups = [f"patient {group}" for _, group in pairs]
    train, val = split_train_val(examples_of([label for label, _ in pairs], groups), fraction, folds, 1, 0)
    assert sorted([*train.tolist(), *val.tolist()]) == list(range(len(pairs)))
    assert not {groups[i] for i in train.tolist()} & {groups[i] for i in val.tolist()}
    assert len(val) > 0


def test_groups_of_equal_size_reach_the_fraction():
    groups = [f"g{i // 5}" for i in range(200)]
    _, val = split_train_val(examples_of([i // 5 % 2 for i in range(200)], groups), 0.2, None, 0, 0)
    assert len(val) == 40


def test_the_split_depends_on_the_seed_alone():
    examples = examples_of([i % 10 for i in range(500)])
    first, again, other = (split_train_val(examples, 0.1, None, 0, seed)[1] for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_global_generator_is_not_used():
    before = torch.random.get_rng_state()
    split_train_val(examples_of([0, 1] * 20), 0.1, None, 0, 0)
    limit_rows(100, 10, 0, "train")
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize(
    ("fraction", "folds", "fold", "key"),
    [
        (0.0, None, 0, "data.val_fraction"),
        (1.0, None, 0, "data.val_fraction"),
        (0.1, 5, 5, "data.fold"),
        (0.1, 50, 0, "data.folds"),
        (0.1, 1, 0, "data.folds"),
    ],
)
def test_values_out_of_range_are_rejected(fraction, folds, fold, key):
    with pytest.raises(UserError, match=rf"^{key}: "):
        split_train_val(examples_of([0, 1] * 10), fraction, folds, fold, 0)


def test_a_single_group_cannot_be_split():
    with pytest.raises(UserError, match="cannot be split"):
        split_train_val(examples_of([0, 1], ["a", "a"]), 0.5, None, 0, 0)


def test_a_group_in_two_splits_is_rejected():
    with pytest.raises(UserError, match="'bob' \\(test and train\\)"):
        check_groups({"train": ["ann", "bob"], "val": None, "test": ["bob"]})


def test_limit_samples_distinct_rows():
    rows = limit_rows(1000, 30, 0, "train")
    assert rows is not None
    assert len(rows.unique()) == 30
    assert limit_rows(30, 30, 0, "train") is None
