"""Arbitrary overrides are accepted, or refused with a documented exit code."""

import os
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cnntrain.cli import main
from cnntrain.config.compose import compose
from cnntrain.train.resume import flatten_settings

pytestmark = pytest.mark.long
# `FUZZ_EXAMPLES=20000 python -m pytest -m long tests/fuzz` takes an hour.
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "500"))
FUZZ = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)
BASE = (
    "model=mlp",
    "epochs=1",
    "data.limit=20",
    "threads=1",
    "log.figures=false",
    "log.tensorboard=false",
    "run_dir=r",
    "device=cpu",
    "batch_size=8",
)
KEYS = sorted(k for k in flatten_settings(compose("config", ["model=mlp"])) if not k.startswith("choices"))
GROUPS = ("model", "data", "augment", "task", "optimizer", "schedule")
# Small numbers only, so that no value trains for hours or allocates terabytes.
SPECIAL = """null true '' [] {} -1 0 1 2 0.5 1.5 nan inf -inf 1e400 1e-400 x [1,2] [null] {a:1} {a:{b:c}} [[[]]]
${epochs} ${oc.env:HOME} ${nothing} ${ $ ??? auto none 0x10 1_0 １ ../.. /dev/null / . ~ ' " \\ [ } , a,b range(0,3)
choice(1,2) torch.nn.Linear os.system é \u202e = @ _target_"""
VALUES = st.one_of(
    st.sampled_from([*SPECIAL.split(), "a b", "\t", "{a: 1, b: [2]}"]),
    st.integers(-3, 9).map(str),
    st.floats(-2, 2).map(str),
    st.text(max_size=6),
)
PREFIXES = ("", "+", "++", "~", "hydra.", "data.", "optimizer.", "model.", "task.")
OVERRIDES = st.one_of(
    st.tuples(st.sampled_from(KEYS), VALUES).map("=".join),
    st.tuples(st.sampled_from(GROUPS), VALUES).map("=".join),
    st.tuples(st.sampled_from(PREFIXES), st.text(max_size=8), st.just("="), VALUES).map("".join),
    st.text(max_size=12),
)
# Overrides that could make a run long or large, start many runs, or write elsewhere.
EXCLUDED = (
    "epochs=",
    "steps=",
    "model.values.width=",
    "data.limit=",
    "threads=",
    "overfit.steps=",
    "run_dir=",
    "-m",
    "--multi",
    "model.layers=",
    "sweep.",
    "check.",
)


@FUZZ
@given(st.lists(OVERRIDES, min_size=1, max_size=4))
def test_compose_accepts_or_refuses_any_overrides(overrides: list[str]) -> None:
    printing = ("--help", "-h", "--cfg")
    assert main([*overrides, "--cfg"]) in (0, 2) or any(flag in overrides for flag in printing)


@FUZZ
@given(st.lists(OVERRIDES, min_size=1, max_size=2))
def test_train_accepts_or_refuses_any_overrides(overrides: list[str]) -> None:
    safe = [o for o in overrides if "=" in o and not o.startswith(EXCLUDED) and "width" not in o]
    try:
        assert main([*BASE, *safe]) in (0, 1, 2, 3, 4)
    finally:
        shutil.rmtree("r", ignore_errors=True)
        shutil.rmtree("outputs", ignore_errors=True)
        assert not Path("touched").exists()
