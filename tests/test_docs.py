"""README, docs/ and program.md against the code: keys, commands, files, numbers stated twice."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import constants as C
from harness import gpu
from harness.files import PREPARE
from loop.night import SAME

ROOT = Path(C.__file__).parent
KEYS = re.findall(r"^(\w+): ", C.SUMMARY, re.MULTILINE)
# What speaks of the code as it is, which the lab notebook does not.
DOCS = sorted(f"docs/{p.name}" for p in ROOT.glob("docs/*.md") if p.name != "LOG.md")
PAGES = ["README.md", "program.md", *DOCS]
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
def docs() -> str:
    """README.md and the pages of docs/, one after the other."""
    return "\n".join((ROOT / page).read_text("utf-8") for page in ["README.md", *DOCS])


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
def test_the_docs_explain_every_key(docs):
    # In a line of a table or a list, with more than the key itself.
    lines = [line for line in docs.splitlines() if re.match(r"\s*[-*|`]", line)]
    explained = {
        k for k in KEYS for line in lines if f"`{k}`" in line and len(line) > len(k) + 15
    }
    assert [key for key in KEYS if key not in explained] == []


def test_the_example_has_the_keys_in_order_and_looks_as_it_is_printed():
    blocks = fenced_blocks((ROOT / "README.md").read_text("utf-8"))
    (block,) = (block for block in blocks if re.search("^val_bpb: ", block, re.MULTILINE))
    lines = re.findall(r"^(\w+): (.*)", block.partition("---\n")[2], re.MULTILINE)
    assert [key for key, _ in lines] == KEYS
    pattern = r"^(\w+): \{[\w.]+(?::\.(\d)f)?\}"
    digits = dict(re.findall(pattern, C.SUMMARY, re.MULTILINE))
    for key, value in lines:
        assert not digits[key] or len(value.partition(".")[2]) == int(digits[key]), key


# ---- Commands -----------------------------------------------------------------------------------
@pytest.mark.parametrize("name", PAGES)
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
    assert scripts or name != "README.md"
    assert sorted(n for n in scripts - OUTPUTS if not (ROOT / n).exists()) == []


@pytest.mark.parametrize("name", PAGES)
def test_every_file_in_backticks_exists(name):
    folders, ends = (
        r"(?:tests|benchmarks|harness|docs|\.ci)",
        r"(?:py|md|ipynb|toml|lock)",
    )
    text = (ROOT / name).read_text("utf-8")
    named = {*re.findall(rf"`({folders}/[\w./-]*|[\w-]+\.{ends})`", text)}
    if name == "README.md":
        assert {"constants.py", "prepare.py", "train.py", "program.md"} <= named
    assert sorted(n for n in named - OUTPUTS if not (ROOT / n).exists()) == []


@pytest.mark.parametrize("name", PAGES)
def test_every_option_and_variable_in_the_docs_is_one_that_the_code_reads(name):
    text = (ROOT / name).read_text("utf-8")
    code = "".join(
        (ROOT / file).read_text("utf-8")
        for file in (
            *("constants.py", "prepare.py", "experiment.py"),
            *(ROOT / "harness").glob("*.py"),
            *(ROOT / "loop").glob("*.py"),
        )
    )
    variables = set(re.findall(r"\b(AUTORESEARCH_[A-Z]+)\b", text))
    assert sorted(v for v in variables if v not in code) == []
    options = set(re.findall(r"prepare\.py (--[a-z-]+)", text))
    assert sorted(option for option in options if f'"{option}"' not in code) == []


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    page = ROOT / name
    text = page.read_text("utf-8")
    targets = re.findall(r"\]\((?!https?://|#|mailto:)([^)#\s]+)", text)
    assert sorted(t for t in targets if not (page.parent / t).exists()) == []


@pytest.mark.parametrize(
    "option", ["--num-shards", "--download-workers", "--source", "--check"]
)
def test_every_option_of_prepare_is_in_the_docs(docs, option):
    assert f"prepare.py {option}" in docs


def test_the_loop_reads_keys_that_a_run_prints():
    text = (ROOT / "loop" / "night.py").read_text("utf-8")
    same = {*SAME} - {"kernels"}  # which a line before the summary says
    read = same | {*re.findall(r"""\bget\(["']([a-z_]{5,})""", text)}
    assert "val_bpb" in read and read <= {*KEYS}


def test_program_md_names_commands_and_statuses_of_experiment_py(program):
    command = [sys.executable, ROOT / "experiment.py", "--help"]
    said = subprocess.check_output(command, text=True)
    named = set(re.findall(r"uv run experiment\.py (\w+)", program))
    assert named == {"start", "run", "wait", "status", "void"}
    assert all(re.search(rf"^    {name} ", said, re.MULTILINE) for name in named)
    stated = re.findall(r"^\| (\d) \|", program, re.MULTILINE)
    text = (ROOT / "experiment.py").read_text("utf-8").partition("Exit status: ")[2]
    assert stated == [n for n in re.findall(r"\b(\d) ", text[:250]) if n != "2"]


def test_the_commands_that_errors_name_are_those_of_the_readme(readme):
    assert PREPARE.endswith("uv run prepare.py") and "uv run prepare.py" in readme
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ValueError) as error:
        patch.setattr(C, "SMOKE", False)
        patch.setattr("harness.gpu.compute_capability", lambda: (0, 0))
        gpu.choose_device()
    (command,) = re.findall(r"`(AUTORESEARCH_SMOKE=1 uv run [^`]+)`", str(error.value))
    assert command in readme


# ---- Numbers that are stated twice --------------------------------------------------------------
def test_the_disk_that_preparation_takes_is_one_number(full, readme):
    shards = full["DEFAULT_NUM_SHARDS"]
    # Shards of 100 MB and rows of 36 M tokens each, as docs/data.md counts; compiled code.
    gigabytes = (shards + 1) * 0.1 + shards * 36e6 * 2 / 1e9 + 0.3
    page = (ROOT / "docs" / "install.md").read_text("utf-8")
    stated = numbers(readme, r"about (\d+) GB on disk")
    total, packages, data = re.search(
        r"about (\d+) GB of disk \| ([\d.]+) packages, (\d+) data", page
    ).groups()
    assert stated == {int(data)} == {round(gigabytes)}
    assert int(total) == round(float(packages) + int(data))


@pytest.mark.parametrize("page", PAGES)
def test_the_budget_in_the_docs_is_the_budget(full, page):
    text = (ROOT / page).read_text("utf-8")
    budgets = numbers(text, r"\b(\d+)[ -](?:s|seconds?) of training\b")
    budgets |= numbers(text, r"\btrain\w*\b[^.\n]{0,60}?\bfor (\d+) (?:s|seconds)\b")
    assert budgets <= {full["TIME_BUDGET"]}
