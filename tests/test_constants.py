"""The fixed rules: as the protocol has them, and what the environment may change."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import constants as C

ROOT = Path(C.__file__).parent
# The protocol's, once more: a changed split would make another number of val_bpb.
PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)


def test_full_rules_are_the_protocols():
    names = "SMOKE SPLIT_PATTERN VOCAB_SIZE BOS_ID TOKENIZER_CHARS TOKENIZER_DOC_CHARS MAX_SEQ_LEN "
    names += (
        "EVAL_TOKENS PACK_BUFFER_DOCS PACK_BATCH_DOCS VAL_SHARD TIME_BUDGET SEED DATASET"
    )
    program = "import constants as C, json, sys; "
    program += "print(json.dumps({name: getattr(C, name) for name in sys.argv[1:]}))"
    command = [sys.executable, "-c", program, *names.split()]
    answer = subprocess.run(
        command, cwd=ROOT, env={}, check=True, capture_output=True, text=True
    )
    assert json.loads(answer.stdout) == {
        "SMOKE": False,
        "SPLIT_PATTERN": PATTERN,
        "VOCAB_SIZE": 8192,
        "BOS_ID": 8188,
        "TOKENIZER_CHARS": 1_000_000_000,
        "TOKENIZER_DOC_CHARS": 10_000,
        "MAX_SEQ_LEN": 2048,
        "EVAL_TOKENS": 20_971_520,
        "PACK_BUFFER_DOCS": 1000,
        "PACK_BATCH_DOCS": 128,
        "VAL_SHARD": 6542,
        "TIME_BUDGET": 300,
        "SEED": 42,
        "DATASET": "karpathy/climbmix-400b-shuffle",
    }


def test_default_shards_are_so_many_that_no_row_comes_again():
    program = "import constants as C; print(C.DEFAULT_NUM_SHARDS, C.TIME_BUDGET)"
    command = [sys.executable, "-c", program]
    n, seconds = map(int, subprocess.check_output(command, cwd=ROOT, env={}).split())
    # Tokens of a shard: characters, per token, kept by packing.
    packed = 250e6 / 4.5 * 0.65
    assert n - 1 < seconds * 2.8e6 / packed <= n


@pytest.mark.parametrize(
    "name, value",
    [
        ("AUTORESEARCH_SMOKE", "yes"),
        ("AUTORESEARCH_SMOKE", "2"),
        ("AUTORESEARCH_SEED", "abc"),
        ("AUTORESEARCH_SEED", "-1"),
        ("AUTORESEARCH_SEED", "1.5"),
        ("AUTORESEARCH_SEED", "٣"),
        ("AUTORESEARCH_SEED", str(2**31)),
    ],
)
def test_an_unknown_value_in_the_environment_is_named(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(
        ValueError, match=f"{name}='{value}' is not a whole number from 0 to"
    ):
        runpy.run_path(C.__file__)


def test_values_in_the_environment_are_used_and_empty_ones_are_none(monkeypatch):
    monkeypatch.setenv("AUTORESEARCH_SEED", "7")
    monkeypatch.setenv("AUTORESEARCH_SMOKE", "")
    rules = runpy.run_path(C.__file__)
    assert rules["SEED"] == 7 and rules["SMOKE"] is False
    monkeypatch.delenv("AUTORESEARCH_SEED")
    assert runpy.run_path(C.__file__)["SEED"] == 42


def test_an_error_at_import_ends_with_its_sentence_and_a_status():
    env = os.environ | {"AUTORESEARCH_SMOKE": "yes"}
    done = subprocess.run(
        [sys.executable, C.__file__], env=env, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("ValueError: AUTORESEARCH_SMOKE='yes'")


@pytest.mark.parametrize(
    "own, expected", [(None, "expandable_segments:True"), ("x:1", "x:1")]
)
def test_the_gpus_memory_grows_in_one_segment_unless_the_user_says_otherwise(
    own, expected
):
    # What train.py imports first sets it, since torch reads it when it is loaded.
    code = "import sys, os, constants; assert 'torch' not in sys.modules;"
    code += "print(os.environ['PYTORCH_CUDA_ALLOC_CONF'])"
    env = {k: v for k, v in os.environ.items() if k != "PYTORCH_CUDA_ALLOC_CONF"}
    env |= {"PYTHONPATH": os.path.dirname(C.__file__)}
    env |= {"PYTORCH_CUDA_ALLOC_CONF": own} if own else {}
    command = [sys.executable, "-c", code]
    assert subprocess.check_output(command, env=env, text=True) == f"{expected}\n"
