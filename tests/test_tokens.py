"""What an agent is ordered to read is short: in tokens, of which its context holds so many."""

import re
import subprocess
from pathlib import Path

import pytest

import constants as C

ROOT = Path(C.__file__).parent
# Besides program.md itself, which gives the order.
ORDERED = ["train.py", "constants.py", "harness/run.py", "harness/ops.py"]
MOST_OF_ALL, MOST_OF_TRAIN = 18_000, 8_500  # tokens
BYTES_PER_TOKEN = 3.58  # of train.py, where no tokenizer can be had
SHELL = 30_000  # characters of a command's output, beyond which agents' shells cut out the middle
LONG, MOST_LONG = 90, 30  # characters of a line; lines that may have more


def read(name: str) -> str:
    """Return a file of this repository; of train.py the default's, which an edit may outgrow."""
    if name == "train.py":
        for branch in ("main", "origin/main"):
            command = ["git", "show", f"{branch}:train.py"]
            done = subprocess.run(command, cwd=ROOT, capture_output=True)
            if not done.returncode:
                return done.stdout.decode()
    return (ROOT / name).read_text("utf-8")


def count_tokens(name: str) -> float:
    """Return the tokens of a file of this repository, roughly without the group `tokens`."""
    text = read(name)
    try:
        from bpe_openai import get_encoding
    except ImportError:
        return len(text.encode()) / BYTES_PER_TOKEN
    return len(get_encoding("o200k_base").encode_ordinary(text))


def test_program_md_orders_to_read_exactly_the_files_that_are_counted():
    text = (ROOT / "program.md").read_text("utf-8")
    (item,) = re.findall(r"^\d+\. Read .*", text, re.MULTILINE)
    assert re.findall(r"`([^`]+)`", item) == ORDERED


def test_what_an_agent_is_ordered_to_read_is_short():
    counts = {name: count_tokens(name) for name in ["program.md", *ORDERED]}
    assert sum(counts.values()) <= MOST_OF_ALL, counts


def test_train_py_is_short():
    assert count_tokens("train.py") <= MOST_OF_TRAIN


def test_a_shell_shows_each_file_whole_that_an_agent_is_ordered_to_read():
    for name in ["program.md", *ORDERED]:
        assert len(read(name)) < SHELL, name


def test_lines_of_train_py_fit_a_window():
    lines = read("train.py").splitlines()
    assert len([line for line in lines if len(line) > LONG]) <= MOST_LONG


def test_tokens_are_counted_by_the_real_tokenizer_or_nearly():
    pytest.importorskip("bpe_openai")
    nearly = len(read("train.py").encode()) / BYTES_PER_TOKEN
    assert count_tokens("train.py") == pytest.approx(nearly, rel=0.05)
