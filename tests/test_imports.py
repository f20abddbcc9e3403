"""What a run loads, and when: nothing that only a preparation or a fetch needs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

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


@pytest.mark.parametrize(
    "name",
    [
        "train",
        "sample",
        "prepare",
        "harness.rehearsal",
        "benchmarks/prepare",
        "benchmarks/step",
    ],
)
def test_threads_are_few_and_sleep_as_they_are_told_to_before_torch_is_loaded(name):
    """Beside other work, sample.py took six times as long with threads that spin.

    And a check in as many threads as there are cores takes those of the run beside it.
    """
    script = f"""
import os, runpy, sys
class Watch:
    def find_spec(name, path, target=None):
        if name == "torch":
            print(os.environ.get("OMP_WAIT_POLICY"), os.environ.get("OMP_NUM_THREADS"))
            os._exit(0)
sys.meta_path.insert(0, Watch)
runpy.run_path({name.replace(".", "/") + ".py"!r}, run_name="script")
"""
    env = {k: v for k, v in os.environ.items() if not k.startswith("OMP_")}
    env["AUTORESEARCH_SMOKE"] = "1"
    how = {"cwd": ROOT, "capture_output": True, "text": True, "env": env}
    done = subprocess.run([sys.executable, "-c", script], **how)
    assert done.stdout in ("PASSIVE 2\n", "PASSIVE 1\n"), done.stderr
