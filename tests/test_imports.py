"""What a run loads: nothing that only a preparation or a fetch needs."""

import subprocess
import sys
from pathlib import Path

import constants as C

ROOT = Path(C.__file__).parent
UNUSED = {"requests", "urllib3", "huggingface_hub", "pyarrow", "kernels"}


def test_a_run_loads_no_library_that_only_a_preparation_needs():
    # As a start of train.py on prepared data does: what open_run calls is imported by then.
    script = "import sys, train; print(*sys.modules)"
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "harness.rules" in done.stdout.split()
    assert UNUSED & {*done.stdout.split()} == set()
