"""What an agent is ordered to read is short: in tokens, of which its context holds so many."""

import re
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


def count_tokens(name: str) -> float:
    """Return the tokens of a file of this repository, roughly without the group `tokens`."""
    text = (ROOT / name).read_text("utf-8")
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
        assert len((ROOT / name).read_text("utf-8")) < SHELL, name


def test_lines_of_train_py_fit_a_window():
    lines = (ROOT / "train.py").read_text("utf-8").splitlines()
    assert len([line for line in lines if len(line) > LONG]) <= MOST_LONG


def test_tokens_are_counted_by_the_real_tokenizer_or_nearly():
    pytest.importorskip("bpe_openai")
    nearly = (ROOT / "train.py").stat().st_size / BYTES_PER_TOKEN
    assert count_tokens("train.py") == pytest.approx(nearly, rel=0.05)
