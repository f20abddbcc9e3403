"""Run train.py as on a card with less memory or less speed, and print what came of it.

Usage: python benchmarks/cards.py [GB:SECONDS[:KNOB=VALUE,...] ...]
Example: python benchmarks/cards.py 8:60 8:60:TOTAL_BATCH_SIZE=2**16,DEPTH=6

GB caps the memory that torch may take, less RESERVED for what a card holds beside it.
SECONDS is the time budget: a chip of a fifth of the speed does in 300 s what this one
does in 60. Each run is a process of its own, from preparation to evaluation.
AUTORESEARCH_SMOKE=1 tries this on a CPU.
"""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

RESERVED = 0.75  # GB of a card: CUDA context, libraries' own memory, a desktop
RUNS = ["8:60", "12:60", "16:60", "24:60", "40:60", "80:60"]
KEYS = ["val_bpb", "num_steps", "tok_per_sec", "peak_vram_mb", "num_params_M"]
KEYS += ["startup_seconds", "eval_seconds", "epochs", "attention"]


def train_capped(gb: str, seconds: str, knobs: str = "") -> None:
    """Be one run: train.py with memory, time budget and knobs changed in this process."""
    import constants

    # Before train.py reads it; shows in its `rules:`.
    constants.TIME_BUDGET = float(seconds)
    import torch
    from step import set_knob

    import train

    try:
        for knob in filter(None, knobs.split(",")):
            set_knob(knob)
    except AttributeError as error:
        sys.exit(str(error))
    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory / 2**30
        fraction = min(1.0, (float(gb) - RESERVED) / total)
        torch.cuda.set_per_process_memory_fraction(fraction)
    train.main()


def main(runs: list[str]) -> None:
    """Print one line per run, `runs` being GB:SECONDS[:KNOB=VALUE,...]."""
    print("\t".join(["run", "batch", *KEYS]))
    for run in runs:
        command = [sys.executable, __file__, "--child", *run.split(":")]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        lines = (done.stdout + done.stderr).splitlines()
        values = dict(line.split(": ", 1) for line in lines if ": " in line)
        if done.returncode:
            reason = lines[-1] if lines else done.returncode
            print(f"{run}\tfailed: {reason}", flush=True)
        else:
            batch = values["batch"].rpartition(" of ")[0]
            cells = [run, batch, *(values[key] for key in KEYS)]
            print("\t".join(cells), flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        train_capped(*sys.argv[2:])
    else:
        main(sys.argv[1:] or RUNS)
