"""README and program.md against the code: keys, commands, and numbers that are stated twice."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import constants as C
import prepare
from harness import gpu
from harness.files import PREPARE

ROOT = Path(C.__file__).parent
KEYS = re.findall(r"^(\w+): ", C.SUMMARY, re.MULTILINE)
OUTPUTS = {
    "run.log",
    "smoke.log",
    "results.tsv",
    "manifest.json",
}  # written by a command, not ours


@pytest.fixture(scope="module")
def full() -> dict:
    """The full rules; the tests themselves run under the smoke rules."""
    code = (
        "import json, constants as C; print(json.dumps({k: v for k, v in vars(C).items()"
    )
    code += " if k.isupper() and isinstance(v, int)}))"
    env = os.environ | {"AUTORESEARCH_SMOKE": "0", "PYTHONPATH": str(ROOT)}
    return json.loads(subprocess.check_output([sys.executable, "-c", code], env=env))


@pytest.fixture(scope="module")
def readme() -> str:
    return (ROOT / "README.md").read_text("utf-8")


@pytest.fixture(scope="module")
def program() -> str:
    return (ROOT / "program.md").read_text("utf-8")


def fenced_blocks(text: str) -> list[str]:
    return re.findall(r"^ *```[^\n]*\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL)


def numbers(text: str, pattern: str) -> set[int]:
    """Return the numbers that `pattern`'s one group finds, commas removed."""
    found = re.findall(pattern, text, re.IGNORECASE)
    return {int(n.replace(",", "")) for n in found}


# ---- The summary --------------------------------------------------------------------------------
def test_the_readme_explains_every_key(readme):
    # In a line of a table or a list, with more than the key itself.
    lines = [line for line in readme.splitlines() if re.match(r"\s*[-*|`]", line)]
    explained = {
        k for k in KEYS for line in lines if f"`{k}`" in line and len(line) > len(k) + 15
    }
    assert [key for key in KEYS if key not in explained] == []


@pytest.mark.parametrize("name", ["README.md", "program.md"])
def test_the_example_has_the_keys_in_order(name):
    blocks = fenced_blocks((ROOT / name).read_text("utf-8"))
    examples = [
        block for block in blocks if re.search(r"^ *val_bpb: ", block, re.MULTILINE)
    ]
    assert examples
    for block in examples:
        summary = block.partition("---\n")[2] or block
        assert re.findall(r"^ *(\w+): ", summary, re.MULTILINE) == KEYS


def test_the_example_of_program_md_looks_as_the_summary_is_printed(program):
    (block,) = (block for block in fenced_blocks(program) if "val_bpb: " in block)
    formats = dict(
        re.findall(r"^(\w+): \{[\w.]+(?::\.(\d)f)?\}", C.SUMMARY, re.MULTILINE)
    )
    for key, value in re.findall(r"^(\w+): (.*)", block, re.MULTILINE):
        if formats[key]:
            assert len(value.partition(".")[2]) == int(formats[key]), key


# ---- Commands -----------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["README.md", "program.md"])
def test_every_command_names_files_that_exist(name):
    text = (ROOT / name).read_text("utf-8")
    named = set()
    for block in fenced_blocks(text):
        for line in block.splitlines():
            if re.match(
                r"\s*(\w+=\S* )*(uv|git|python3?|timeout|\.ci/\S+|bash|sh) ?", line
            ):
                named |= set(
                    re.findall(r"(?<![\w/.<>])[\w.-]+(?:/[\w.-]+)*\.\w+(?![\w<])", line)
                )
    scripts = {n for n in named if n.endswith((".py", ".md", ".ipynb", ".toml", ".sh"))}
    assert scripts or name == "program.md"
    assert sorted(n for n in scripts - OUTPUTS if not (ROOT / n).exists()) == []


def test_every_file_in_backticks_in_the_readme_exists(readme):
    named = set(
        re.findall(
            r"`((?:tests|benchmarks|\.ci)/[\w./-]*|[\w-]+\.(?:py|md|ipynb|toml|lock))`",
            readme,
        )
    )
    assert {"constants.py", "prepare.py", "train.py", "program.md"} <= named
    assert sorted(n for n in named - OUTPUTS if not (ROOT / n).exists()) == []


@pytest.mark.parametrize("name", ["README.md", "program.md"])
def test_every_option_and_variable_in_the_docs_is_one_that_the_code_reads(name):
    text = (ROOT / name).read_text("utf-8")
    code = "".join(
        (ROOT / file).read_text("utf-8")
        for file in ("constants.py", "prepare.py", *(ROOT / "harness").glob("*.py"))
    )
    variables = set(re.findall(r"\b(AUTORESEARCH_[A-Z]+|HF_[A-Z_]+)\b", text))
    assert variables and sorted(v for v in variables if v not in code) == []
    options = set(re.findall(r"prepare\.py (--[a-z-]+)", text))
    assert sorted(option for option in options if f'"{option}"' not in code) == []


def test_links_within_the_readme_lead_somewhere(readme):
    targets = re.findall(r"\]\((?!https?://|#|mailto:)([^)#\s]+)", readme)
    assert sorted(t for t in targets if not (ROOT / t).exists()) == []


# ---- Numbers that are stated twice --------------------------------------------------------------
@pytest.mark.parametrize("name", ["README.md", "program.md"])
def test_the_budget_in_the_docs_is_the_budget(full, name):
    text = (ROOT / name).read_text("utf-8")
    stated = numbers(text, r"\b(\d+)[ -](?:s|seconds?) of training\b")
    stated |= numbers(text, r"\btrain\w*\b[^.\n]{0,60}?\bfor (\d+) (?:s|seconds)\b")
    assert stated == {full["TIME_BUDGET"]}


def test_the_numbers_of_the_protocol_in_the_readme_are_the_rules(readme, full):
    vocabulary = numbers(readme, r"\b(\d[\d,]{3,}) (?:ids|tokens in the vocabulary)\b")
    vocabulary |= numbers(readme, r"\bvocabulary of (\d[\d,]{3,})\b")
    assert vocabulary <= {full["VOCAB_SIZE"]}
    assert numbers(readme, r"\bsequence length (?:of )?(\d[\d,]*)\b") <= {
        full["MAX_SEQ_LEN"]
    }
    plain = readme.replace(",", "")
    assert str(full["EVAL_TOKENS"]) in plain and str(full["VOCAB_SIZE"]) in plain


def test_the_default_number_of_shards_in_the_readme_is_the_rule_and_is_enough(
    readme, full
):
    n = full["DEFAULT_NUM_SHARDS"]
    assert numbers(readme, r"\b(\d+) training shards\. So many") == {n}
    assert numbers(readme, r"once: (\d+) shards of about 100 MB") == {n + 1}
    packed = 250e6 / 4.5 * 0.65  # tokens of a shard, as both texts say
    assert n - 1 < full["TIME_BUDGET"] * 2.1e6 / packed <= n


@pytest.mark.parametrize(
    "option", ["--num-shards", "--download-workers", "--source", "--check"]
)
def test_every_option_of_prepare_is_in_the_readme(readme, option):
    assert f"prepare.py {option}" in readme


def test_program_md_reads_the_keys_that_a_run_prints(program):
    read = set(re.findall(r"\^(\w+):", program))
    assert "warning" in read and read <= {*KEYS, "warning"}


def test_the_help_and_the_docstring_of_prepare_agree(capsys):
    with pytest.raises(SystemExit):
        prepare.main(["--help"])
    options = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
    assert set(re.findall(r"--[a-z-]+", prepare.__doc__)) <= options


def test_the_command_that_errors_name_is_the_one_of_the_readme(readme):
    assert "AUTORESEARCH_SMOKE=1 uv run train.py" in readme
    assert "AUTORESEARCH_SMOKE=1 uv run train.py" in Path(gpu.__file__).read_text("utf-8")
    assert PREPARE.endswith("uv run prepare.py") and "uv run prepare.py" in readme
