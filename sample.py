"""Continue a text with the model of the last run. Not edited.

Usage: uv run sample.py "The first thing to know about rivers is"

On the GPU if there is one that can train; CUDA_VISIBLE_DEVICES=-1 in front keeps it on the CPU.
AUTORESEARCH_SMOKE=1 in front takes the model of the last smoke run. No part of the rules.
"""

import constants as C  # first: it sets what torch reads

# isort: split
import argparse
import contextlib
import sys
from collections.abc import Iterator

import torch
from torch import compiler

import train
from harness import checkpoint, gpu
from harness.attention import masked_attention
from harness.evaluation import Model, call_model
from harness.files import TRAIN, command_with, data_dir
from harness.streams import drop, keep_output
from harness.tokenizer import Tokenizer

SAMPLE_TOKENS = 300
SAMPLE_TEMPERATURE = 0.8


def restore(device: torch.device) -> tuple[torch.nn.Module, Tokenizer, dict]:
    """Return the saved model in evaluation mode, its tokenizer and what is known of it.

    Built by GPTConfig and build_model of train.py. ValueError says why it cannot be had.
    """
    about, weights = checkpoint.load()
    tokenizer = Tokenizer.load(data_dir() / "tokenizer")
    if about["tokenizer"] != tokenizer.sha256:
        problem = f"{checkpoint.MODEL} is of another tokenizer than that in {data_dir()}"
        raise ValueError(f"{problem}; run `{TRAIN}` again")
    try:
        config = train.GPTConfig(**about["config"])
        model = train.build_model(config, masked_attention, device)
        model.load_state_dict(weights)
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        if gpu.is_out_of_memory(error):
            raise
        what = str(error).replace("\n", " ")[:200]
        commit = about["commit"]
        raise ValueError(
            f"{checkpoint.MODEL} is of another train.py, that of commit {commit} ({what}); "
            f"check that commit out or run `{TRAIN}`"
        ) from error
    return model.eval(), tokenizer, about


@torch.no_grad()
def continue_text(
    model: Model, tokenizer: Tokenizer, text: str, device: torch.device
) -> Iterator[bytes]:
    """Yield the bytes of each token that `model` draws after `text`, SAMPLE_TOKENS at most.

    Ends with the document. Without a cache of keys: every token is a call on all ids so far,
    which any model understands. Drawn on the CPU from the seed of the rules.
    """
    ids = tokenizer.encode(text).tolist()
    generator = torch.Generator().manual_seed(C.SEED)
    for _ in range(SAMPLE_TOKENS):
        idx = torch.tensor([ids[-C.MAX_SEQ_LEN :]], device=device)
        logits = call_model(model, idx)[0, -1].float().cpu()
        probabilities = (logits / SAMPLE_TEMPERATURE).softmax(0)
        ids.append(int(probabilities.multinomial(1, generator=generator)))
        if ids[-1] >= tokenizer.bos_id:  # the next document
            return
        yield tokenizer.encoding.decode_single_token_bytes(ids[-1])


def write(text: str, pieces: Iterator[bytes]) -> None:
    """Write text and pieces to standard output, as bytes: a token may be a piece of a character.

    Ctrl-C and a reader that has seen enough end it; OSError for any other lost output.
    """
    out = sys.stdout.buffer
    try:
        # One length is drawn after the other: nothing is worth compiling.
        with contextlib.suppress(KeyboardInterrupt), compiler.set_stance("force_eager"):
            out.write(text.encode())
            for piece in pieces:
                out.write(piece)
                out.flush()
        out.write(b"\n")
        out.flush()
    except OSError as error:
        drop(sys.stdout)
        if not isinstance(error, BrokenPipeError):
            raise


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", help="the text to continue")
    text, device = parser.parse_args(argv).text, gpu.choose_device(training=False)
    text = text.encode(errors="replace").decode()  # a byte that is not UTF-8 is "?"
    try:
        model, tokenizer, about = restore(device)
        result = f"model of commit {about['commit']}, val_bpb {about['val_bpb']:.6f}"
        print(result, file=sys.stderr)
        write(text, continue_text(model, tokenizer, text, device))
    except (OSError, ValueError) as error:
        sys.exit(f"sample.py: {error}")
    except RuntimeError as error:
        if not gpu.is_out_of_memory(error):
            raise
        problem = "the model has no room on the GPU beside what else uses it"
        command = command_with("CUDA_VISIBLE_DEVICES=-1", "uv run sample.py TEXT")
        sys.exit(f"sample.py: {problem}; `{command}` keeps it on the CPU")


if __name__ == "__main__":
    keep_output()
    main()
