"""Whether this machine can train: asked before a night begins. Not edited."""

import os
import subprocess
import sys

from loop.git import ROOT, Refused

PROBE = """from harness import gpu, health
try: found = health.measure_health(gpu.choose_device())
except ValueError as error: raise SystemExit(str(error))
if found.company == "shared": raise SystemExit(f"another process holds the GPU: {found}")"""


def check_machine(environments: list[dict[str, str]]) -> None:
    """Refuse if a GPU or the data is not ready. environments: of the GPUs' runs."""
    for env in environments:
        probe("-c", PROBE, **env)
    probe("prepare.py", "--check")


def probe(*command: str, **env: str) -> None:
    """Run Python on something that has to work before a night begins."""
    io = {"env": os.environ | env, "capture_output": True, "text": True}
    done = subprocess.run([sys.executable, *command], cwd=ROOT, **io)
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
        raise Refused(f"the machine is not ready: {' '.join(said)}")
