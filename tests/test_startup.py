"""What is not needed for the first step is not imported before it."""

import subprocess
import sys
from pathlib import Path

import pytest

from cnntrain import compose, train

CODE = """
import importlib, os, sys
from cnntrain.cli import main
loop = importlib.import_module("cnntrain.train.loop")
step = loop.apply_gradients
def first(*arguments):
    step(*arguments)
    late = {"matplotlib", "optuna", "torchvision", "sklearn", "PIL", "triton", "torch._dynamo"}
    print("imported:", *(late & set(sys.modules)), flush=True)
    os._exit(0)
loop.apply_gradients = first
main(["threads=1", "data.limit=60", "data=digits"])
"""


@pytest.mark.slow
def test_the_first_step_comes_before_what_only_pictures_and_sweeps_need() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "imported:", done.stdout + done.stderr


@pytest.mark.slow
def test_the_first_batch_is_still_drawn_however_short_the_run() -> None:
    train(compose("data.limit=60", "steps=1", "log.every_steps=100", "threads=1", "run_dir=short"))
    assert Path("short/figures/first_batch.png").is_file()
