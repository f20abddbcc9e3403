"""The trained model of the last run, kept as plain arrays. Nothing is unpickled. Not edited."""

import dataclasses
import json
import sys
import zipfile
from pathlib import Path

import numpy as np
import torch

import constants as C
from harness.files import TRAIN, atomic_write, smoke_command
from harness.run import Run

MODEL = Path(__file__).parent.parent / ("smoke.npz" if C.SMOKE else "model.npz")
ABOUT = "about.json"  # the entry of MODEL that is not a parameter
UNREADABLE = (OSError, ValueError, KeyError, TypeError, EOFError, RuntimeError)
UNREADABLE += (zipfile.BadZipFile,)


def save(run: Run, model: torch.nn.Module, config: object) -> None:
    """Write trained weights and `config`, a dataclass, to MODEL, over those of the run before.

    To be called last: the result is printed by then, and whatever goes wrong here is
    said in a line on standard error.
    """
    if not C.SAVE:
        return
    try:
        for path in MODEL.parent.glob(f".{MODEL.name}.*.tmp"):  # of runs killed meanwhile
            path.unlink()
        if isinstance(run.measured, torch.nn.Module):  # an average, say
            mine, measured = ({*map(id, m.parameters())} for m in (model, run.measured))
            if not mine & measured:
                raise ValueError("it is not the one that run.evaluate measured")
        about = {"config": dataclasses.asdict(config), "tokenizer": run.tokenizer.sha256}
        about |= {"commit": run.commit, "rules": run.rules, "val_bpb": run.val_bpb}
        weights = model.state_dict().items()
        prefix = "_orig_mod."  # of a model that was compiled as a whole
        arrays = {k.removeprefix(prefix): v.cpu().float().numpy() for k, v in weights}
        with atomic_write(MODEL) as file:
            np.savez(file, **arrays, **{ABOUT: np.array(json.dumps(about))})
    except Exception as error:  # also of a train.py whose configuration JSON cannot hold
        problem = f"the model was not saved in {MODEL} ({error}); its result stands"
        print(problem, file=sys.stderr, flush=True)


def load() -> tuple[dict, dict[str, torch.Tensor]]:
    """Return what is known of the model in MODEL, and its weights; ValueError if it is no good."""
    again = f"run `{TRAIN}` first, without AUTORESEARCH_SAVE=0"
    if not MODEL.is_file():
        command = smoke_command("uv run sample.py TEXT")
        smoke = "" if C.SMOKE else f"; `{command}` takes a smoke run's"
        raise ValueError(f"there is no {MODEL}; {again}{smoke}")
    try:
        with np.load(MODEL, allow_pickle=False) as file:
            about = json.loads(str(file[ABOUT]))
            keys = ("config", "tokenizer", "commit", "val_bpb")
            about = {key: about[key] for key in keys}
            names = [name for name in file.files if name != ABOUT]
            return about, {name: torch.from_numpy(file[name]) for name in names}
    except UNREADABLE as error:
        raise ValueError(f"{MODEL} is damaged ({error}); {again}") from error
