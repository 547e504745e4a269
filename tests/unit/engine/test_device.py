"""Settings of the whole process."""

import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import sys
import torch
from cnntrain import compose
from cnntrain.commands.train import train

train(compose("epochs=1", "limit_batches=2", "threads=2", f"run_dir={sys.argv[1]}"), test=False)
print("subnormal:", (torch.full((1_000_000,), 1e-30) * 1e-10).count_nonzero().item())
"""


@pytest.mark.slow
def test_no_thread_computes_subnormal_numbers(tmp_path: Path) -> None:
    """A thread that was there before the setting would go on as it began: none may be."""
    command = [sys.executable, "-c", CODE, str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "subnormal: 0\n" in done.stdout
