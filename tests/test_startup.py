"""The first training step imports nothing that it does not need."""

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
def step_and_exit(*arguments):
    step(*arguments)
    heavy = {"matplotlib", "optuna", "torchvision", "sklearn", "PIL", "triton", "torch._dynamo"}
    print("imported:", *(heavy & set(sys.modules)), flush=True)
    os._exit(0)
loop.apply_gradients = step_and_exit
main(["threads=1", "data.limit=60", "data=digits"])
"""


@pytest.mark.slow
def test_the_first_step_does_not_import_plotting_and_sweeps() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "imported:", done.stdout + done.stderr


@pytest.mark.slow
def test_a_run_of_one_step_draws_its_first_batch() -> None:
    train(compose("data.limit=60", "steps=1", "log.every_steps=100", "threads=1", "run_dir=short"))
    assert Path("short/figures/first_batch.png").is_file()
