"""Results of short commands have the bits of the golden record.

The bits depend on the kind of CPU and on the build of torch, so this test runs on demand only, on a machine
like that of the record: `python -m pytest -m long tests/golden`.
"""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.long
def test_results_match_the_record() -> None:
    script = Path(__file__).with_name("golden_record.py")
    done = subprocess.run([sys.executable, str(script), "compare"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-3000:]}"
