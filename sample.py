"""The trained model after a run: saved as plain arrays, and made to continue a text. Not edited.

Usage: uv run train.py --sample "text"

No part of the rules: train.py calls it when the result is known. Nothing is unpickled.
"""

import argparse
import contextlib
import dataclasses
import json
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

import constants as C
from harness import gpu
from harness.evaluation import Model, call_model
from harness.files import atomic_write, data_dir
from harness.run import Run
from harness.tokenizer import Tokenizer

MODEL = Path(__file__).parent / (
    "smoke.npz" if C.SMOKE else "model.npz"
)  # of the last run
ABOUT = "about.json"  # the entry of MODEL that is not a parameter
# Returns a model from the saved configuration, whose weights are then replaced.
Build = Callable[[dict, torch.device], torch.nn.Module]
SAMPLE_TOKENS, SAMPLE_TEMPERATURE = 300, 0.8


def save(run: Run, model: torch.nn.Module, config: object) -> None:
    """Write trained weights and `config`, a dataclass, to MODEL, over those of the run before.

    Whatever goes wrong is said in a line and costs no result.
    """
    if not C.SAVE:
        return
    try:
        for path in MODEL.parent.glob(f".{MODEL.name}.*.tmp"):  # of runs killed meanwhile
            path.unlink()
        about = {"config": dataclasses.asdict(config), "tokenizer": run.tokenizer.sha256}
        about |= {"commit": run.commit, "rules": run.rules, "val_bpb": run.val_bpb}
        weights = model.state_dict().items()
        # As of the bare model, if it was compiled as a whole.
        arrays = {
            k.removeprefix("_orig_mod."): v.cpu().float().numpy() for k, v in weights
        }
        with atomic_write(MODEL) as file:
            np.savez(file, **arrays, **{ABOUT: np.array(json.dumps(about))})
    except Exception as error:  # also of a train.py whose configuration JSON cannot hold
        print(
            f"the model was not saved in {MODEL} ({error}); its result stands", flush=True
        )


def load_model() -> tuple[dict, dict[str, torch.Tensor]]:
    """Return what is known of the model in MODEL, and its weights; ValueError if it is no good."""
    again = "run uv run train.py first, without AUTORESEARCH_SAVE=0"
    if not MODEL.is_file():
        raise ValueError(f"there is no {MODEL}; {again}")
    try:
        with np.load(MODEL, allow_pickle=False) as file:
            about = json.loads(str(file[ABOUT]))
            about = {
                key: about[key] for key in ("config", "tokenizer", "commit", "val_bpb")
            }
            names = [name for name in file.files if name != ABOUT]
            return about, {name: torch.from_numpy(file[name]) for name in names}
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        EOFError,
        zipfile.BadZipFile,
    ) as error:
        raise ValueError(f"{MODEL} is damaged ({error}); {again}") from error


def restore(build: Build, device: torch.device):
    """Return the saved model, its tokenizer and what is known of it; or a ValueError."""
    about, weights = load_model()
    tokenizer = Tokenizer.load(data_dir() / "tokenizer")
    if about["tokenizer"] != tokenizer.sha256:
        problem = f"{MODEL} was trained with another tokenizer than that in {data_dir()}"
        raise ValueError(f"{problem}; run uv run train.py again")
    try:
        model = build(about["config"], device)
        model.load_state_dict(weights)
    except (RuntimeError, TypeError, ValueError) as error:
        if gpu.is_out_of_memory(error):
            raise
        what = str(error).replace("\n", " ")[:200]
        problem = (
            f"{MODEL} is of another train.py, that of commit {about['commit']} ({what})"
        )
        raise ValueError(
            f"{problem}; check that commit out or run uv run train.py"
        ) from error
    return model, tokenizer, about


@torch.no_grad()
def continue_text(
    model: Model, tokenizer: Tokenizer, text: str, device: torch.device
) -> Iterator[bytes]:
    """Yield the bytes of tokens that `model` draws after `text`, until it ends or there are enough.

    Without a cache of keys: every token is a call on all ids so far, which any model understands.
    Drawn on the CPU from the seed of the rules.
    """
    ids, generator = (
        tokenizer.encode(text).tolist(),
        torch.Generator().manual_seed(C.SEED),
    )
    for _ in range(SAMPLE_TOKENS):
        idx = torch.tensor([ids[-C.MAX_SEQ_LEN :]], device=device)
        logits = call_model(model, idx)[0, -1].float().cpu()
        chances = (logits / SAMPLE_TEMPERATURE).softmax(0)
        ids.append(int(chances.multinomial(1, generator=generator)))
        if ids[-1] >= tokenizer.bos_id:  # the next document
            return
        yield tokenizer.encoding.decode_single_token_bytes(ids[-1])


def main(argv: list[str], build: Build) -> None:
    """Continue the text of `--sample TEXT` on standard output, with the model of the last run."""
    parser = argparse.ArgumentParser(
        "train.py", description="Train a model, or use the last one."
    )
    parser.add_argument("--sample", metavar="TEXT", required=True, help="continue TEXT")
    text, device = parser.parse_args(argv).sample, gpu.choose_device(training=False)
    try:
        model, tokenizer, about = restore(build, device)
        print(
            f"model of commit {about['commit']}, val_bpb {about['val_bpb']:.6f}",
            file=sys.stderr,
        )
        write(text, continue_text(model, tokenizer, text, device))
    except ValueError as error:
        sys.exit(f"train.py: {error}")
    except RuntimeError as error:
        if not gpu.is_out_of_memory(error):
            raise
        problem = "the model has no room on the GPU beside what else uses it"
        sys.exit(
            f"train.py: {problem}; CUDA_VISIBLE_DEVICES= in front keeps it on the CPU"
        )


def write(text: str, pieces: Iterator[bytes]) -> None:
    """Write text and pieces to standard output, as bytes: a token may be a piece of a character."""
    out = sys.stdout.buffer
    out.write(text.encode(errors="replace"))
    # One length is drawn after the other: nothing is worth compiling. Ctrl-C: enough.
    with contextlib.suppress(KeyboardInterrupt), torch.compiler.set_stance("force_eager"):
        for piece in pieces:
            out.write(piece)
            out.flush()
    out.write(b"\n")
    out.flush()
