"""The fixed rules of an experiment. Not edited: numbers compare only under equal rules.

Data, tokenizer, rows, evaluation, time budget and seed, each value once; a change shows in
the `rules:` of a run. Environment variables that are read:

    AUTORESEARCH_SMOKE=1   tiny rules that run anywhere in a minute (no GPU, no network)
    AUTORESEARCH_SEED=N    seed of the run, default 42; never set by train.py
    AUTORESEARCH_SAVE=0    do not save the trained model
    AUTORESEARCH_DRY_RUN=1 build everything without data or memory, then end (a smoke run
                           does that for the full rules)
"""

import os
import time

from harness.machine import set_environment

STARTED_AT = time.perf_counter()  # of the process: train.py imports this before torch


def _environment_int(name: str, default: int, low: int, high: int) -> int:
    """Return the whole number in environment variable `name`, `default` if it is unset.

    ValueError if it is none from `low` to `high`.
    """
    text = os.environ.get(name, "") or str(default)
    if not (text.isascii() and text.isdigit() and low <= int(text) <= high):
        problem = f"{name}={text!r} is not a whole number from {low} to {high}"
        raise ValueError(f"{problem}; unset it")
    return int(text)


SMOKE = _environment_int("AUTORESEARCH_SMOKE", 0, 0, 1) == 1
SEED = _environment_int("AUTORESEARCH_SEED", 42, 0, 2**31 - 1)
SAVE = _environment_int("AUTORESEARCH_SAVE", 1, 0, 1) == 1
DRY_RUN = _environment_int("AUTORESEARCH_DRY_RUN", 0, 0, 1) == 1

set_environment(SMOKE)  # which torch reads when it is loaded

# Data: ClimbMix (arXiv:2504.13161), shuffled, as parquet shards with one column `text`.
DATASET = "karpathy/climbmix-400b-shuffle"  # on the Hugging Face hub
REVISION = "main"  # resolved to a commit on first contact; the manifest records which
SHARD_NAME = "shard_{:05d}.parquet"
VAL_SHARD = 6542  # the last one: validation, never training
# Training shards: enough for 300 s at 2.8 M tokens/s without a row twice; docs/data.md.
DEFAULT_NUM_SHARDS = 3 if SMOKE else 24

# Tokenizer: byte-level BPE (arXiv:1508.07909). GPT-4's split pattern, digits in pairs.
SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
# The last ids; the first of them is BOS.
SPECIAL_TOKENS = tuple(f"<|reserved_{i}|>" for i in range(4))
VOCAB_SIZE = 1024 if SMOKE else 8192  # ids, special tokens included
BOS_ID = VOCAB_SIZE - len(SPECIAL_TOKENS)
TOKENIZER_CHARS = 2_000_000 if SMOKE else 10**9  # characters it is trained on
TOKENIZER_DOC_CHARS = 10_000  # of each document, at most
# The training shards in which that text is looked for; it fills about four.
TOKENIZER_SHARDS = 6

# Rows: T + 1 ids, so that input and target are one row shifted by one; best-fit packed.
FULL_SEQ_LEN = 2048  # T, tokens
MAX_SEQ_LEN = 256 if SMOKE else FULL_SEQ_LEN
PACK_BUFFER_DOCS = 1000  # refilled to at least this many documents before every placement
PACK_BATCH_DOCS = 128  # documents per refill, of one row group

# Evaluation: the first rows of the validation shard, for every model and batch size.
EVAL_TOKENS = 2**16 if SMOKE else 40 * 524_288  # target tokens
EVAL_BATCH_ROWS = 128  # at once, at most; fewer if training or memory had room for fewer
LOGIT_TOLERANCE = 1e-3  # by which a logit may move when nothing it may see has changed

# What prepared rows depend on beside the shard and the tokenizer.
DATA_RULES = [VOCAB_SIZE, MAX_SEQ_LEN, EVAL_TOKENS, PACK_BUFFER_DOCS, PACK_BATCH_DOCS]

# Time, in seconds of wall clock.
# Of training; start-up, compilation and evaluation excluded.
TIME_BUDGET = 20 if SMOKE else 300
# From the start of the process, or the end of a preparation in it, to the first step.
STARTUP_LIMIT = 180 if SMOKE else 300
# A last step that is slower than all before may end late by this fraction of the budget;
# beyond it the run is void.
OVERRUN_TOLERANCE = 1.0 if SMOKE else 0.01

# Attention kernel, the only thing from the network that is executed. A version is one API
# for ever.
FLASH_ATTENTION_REPO = "kernels-community/flash-attn3"
FLASH_ATTENTION_VERSION = 1

# Kinds of warnings in a log, `warning: KIND: ...`, and whether one voids the run.
WARNINGS = {
    "gpu": True,  # throttled or shared: the run was slower than it can be
    "edit": False,  # something in train.py looks half-done
    "data": False,  # rows were trained on again
    "host": False,  # Python, not the GPU, may set the pace
    "repeat": False,  # the commit alone does not repeat the run
}

# What a run prints last; every tool of this family reads the first nine keys.
SUMMARY = """---
val_bpb: {run.val_bpb:.6f}
training_seconds: {run.clock.seconds:.1f}
total_seconds: {run.total_seconds:.1f}
peak_vram_mb: {run.peak_vram_mb:.1f}
mfu_percent: {run.mfu_percent:.2f}
total_tokens_M: {run.tokens_M:.1f}
num_steps: {run.num_steps}
num_params_M: {run.num_params_M:.1f}
depth: {run.depth}
tok_per_sec: {run.tok_per_sec:.0f}
tflops: {run.tflops:.2f}
startup_seconds: {run.startup_seconds:.1f}
import_seconds: {run.import_seconds:.1f}
open_seconds: {run.open_seconds:.1f}
compile_seconds: {run.compile_seconds:.1f}
data_wait_percent: {run.wait_percent:.2f}
eval_seconds: {run.eval_seconds:.1f}
epochs: {run.epochs:.2f}
attention: {run.attention}
gpu: {run.gpu}
gpu_health: {run.gpu_health}
seed: {run.seed}
commit: {run.commit}
data: {run.data}
rules: {run.rules}"""
