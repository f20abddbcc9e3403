"""benchmarks/cards.py: real runs with other knobs, budgets and memory, and a line for each."""

import contextlib
import importlib.util
import io
import os
import sys
import types
from pathlib import Path

import pytest

import constants as C
import forks

SCRIPT = Path(C.__file__).parent / "benchmarks" / "cards.py"
SMALL = "DEPTH=1,N_EMBD=32,HEAD_DIM=16,NGRAM_ENTRIES=2**6,TOTAL_BATCH_SIZE=2**15"


@pytest.fixture(scope="module")
def lines(prepared, tmp_path_factory) -> list[str]:
    spec = importlib.util.spec_from_file_location("cards", SCRIPT)
    cards, printed = importlib.util.module_from_spec(spec), io.StringIO()
    cache = tmp_path_factory.mktemp("cache")
    (cache / "smoke").symlink_to(prepared)
    own = {"AUTORESEARCH_SAVE": "0", "AUTORESEARCH_CACHE": str(cache)}

    def run(command, cwd, **_):
        assert command[0] == sys.executable
        return forks.run(*command[1:], env=os.environ | own, folder=cwd)

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(sys, "path", [*sys.path])  # to which the script adds
        spec.loader.exec_module(cards)
        patch.setattr(cards, "subprocess", types.SimpleNamespace(run=run))
        cards.main([f"8:0.5:{SMALL}", "8:1:DEPHT=6", "8:1:N_EMBD=7"])
    return printed.getvalue().splitlines()


def test_a_run_is_a_line_of_its_summary(lines):
    row = dict(zip(lines[0].split("\t"), lines[1].split("\t"), strict=True))
    assert row["run"] == f"8:0.5:{SMALL}" and row["batch"] == "1 micro-steps of 2 rows"
    assert 0 < float(row["val_bpb"]) < 6 and int(row["num_steps"]) > 0
    # 2 tables of 1024 x 32, value embeddings of the same, the n-grams' and 12 * 32^2: 0.1 M
    assert row["num_params_M"] == "0.1" and row["attention"] == "masked"


def test_a_run_that_fails_says_why_in_its_line_and_the_others_go_on(lines):
    assert lines[2:] == [
        "8:1:DEPHT=6\tfailed: train.py has no knob DEPHT",
        "8:1:N_EMBD=7\tfailed: ValueError: HEAD_DIM (32) is odd or does not divide N_EMBD (7)",
    ]
