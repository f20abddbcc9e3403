"""analysis.ipynb: well formed, free of one machine's traces, and runs on every kind of log.

The cells are executed as plain code, so the tests need pandas and matplotlib but no Jupyter:

    uv run --group analysis pytest tests/test_notebook.py

    uv run --group analysis python tests/test_notebook.py   # renews the stored example outputs
"""

import json
import math
import os
import re
import statistics
import subprocess
import tempfile
from pathlib import Path

import pytest
from cells import HEADER, NOTEBOOK, cells, sources

from loop import ledger

# A made-up night: commit number, val_bpb, memory_gb, status, description.
NIGHT = [
    (0, 0.4418, 58.7, "keep", "baseline, seed 42, rules full-0a1b2c3d"),
    (0, 0.4425, 58.7, "keep", "baseline, seed 43, rules full-0a1b2c3d"),
    (0, 0.4413, 58.7, "keep", "baseline, seed 44, rules full-0a1b2c3d"),
    (1, 0.4391, 58.7, "keep", "Muon learning rate 0.04 -> 0.03"),
    (2, 0.4402, 64.1, "discard", "depth 10, one head fewer"),
    (3, 0.0, 0.0, "crash", "batch of 192 rows: out of memory"),
    (4, 0.4388, 58.7, "discard", "warm-down over 60 % of the budget"),
    (5, 0.4379, 58.8, "discard", 'window pattern "SSSL" -> "SSL"'),
    (1, 0.4396, 58.7, "keep", "Muon learning rate 0.04 -> 0.03, repeat, seed 43"),
    (5, 0.4383, 58.8, "keep", 'window pattern "SSSL" -> "SSL", repeat, seed 43'),
    (6, 0.5127, 58.7, "discard", "no value embeddings"),
    (7, 0.4412, 51.0, "discard", "GELU instead of ReLU^2"),
    (8, 0.4387, 58.9, "discard", "softcap 15 -> 20"),
    (9, 0.0, 0.0, "crash", "fp8 head: NaN at step 3"),
    (10, 0.4352, 58.8, "keep", "embedding lr x 1.5, $\\beta_2$ 0.95 -> 0.9"),
    (11, 0.4355, 57.2, "discard", "no learnt residual scale: 12 lines fewer"),
    (
        11,
        0.4356,
        57.2,
        "keep",
        "no learnt residual scale: 12 lines fewer, repeat, seed 43",
    ),
    (12, 0.4361, 58.8, "discard", "QK-norm gain 1.2"),
    (13, 0.4334, 57.3, "keep", "256 more hidden units in every second MLP"),
    (14, 0.4337, 57.3, "discard", "weight decay 0.2 -> 0.15"),
]


def to_log(rows):
    return HEADER + "".join("{}\t{:.6f}\t{:.1f}\t{}\t{}\n".format(*row) for row in rows)


def write_night(folder):
    """Put NIGHT's results.tsv and a git repository with its commits into `folder`."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}

    def git(*arguments):
        run = {
            "cwd": folder,
            "env": env,
            "check": True,
            "capture_output": True,
            "text": True,
        }
        return subprocess.run(["git", *arguments], **run).stdout.strip()

    git("init", "--quiet")
    git("config", "commit.gpgsign", "false")
    commits = {}
    for number in sorted({row[0] for row in NIGHT}):
        for role in ("GIT_AUTHOR", "GIT_COMMITTER"):
            env |= {f"{role}_NAME": "night", f"{role}_EMAIL": "night@localhost"}
            env[f"{role}_DATE"] = (
                f"{1_763_935_200 + 420 * number} +0000"  # every seven minutes
            )
        git("commit", "--quiet", "--allow-empty", "--message", f"idea {number}")
        commits[number] = git("rev-parse", "--short", "HEAD")
    rows = [(commits[number], *rest) for number, *rest in NIGHT]
    (folder / "results.tsv").write_text(to_log(rows), encoding="utf-8")


@pytest.fixture
def execute(tmp_path, monkeypatch):
    """Run all code cells in `tmp_path` on a log (None: no file); return what they defined."""
    pytest.importorskip("pandas")
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))

    def run(text=None):
        if text is not None:
            Path("results.tsv").write_text(text, encoding="utf-8")
        names = {"__name__": "__main__"}
        for number, source in enumerate(sources()):
            exec(compile(source, f"analysis.ipynb[{number}]", "exec"), names)
        assert Path("progress.png").read_bytes().startswith(b"\x89PNG")
        return names

    yield run
    matplotlib.pyplot.close("all")


def test_format():
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    for cell in cells():
        assert cell["cell_type"] in ("code", "markdown") and cell["id"]
        assert cell["cell_type"] == "markdown" or {"outputs", "execution_count"} <= set(
            cell
        )
    assert len({cell["id"] for cell in cells()}) == len(cells())


def test_cells_compile():
    for number, source in enumerate(sources()):
        compile(source, f"analysis.ipynb[{number}]", "exec")


def test_stored_outputs_are_complete():
    outputs = [cell["outputs"] for cell in cells() if cell["cell_type"] == "code"]
    assert not outputs[0] and all(outputs[1:]), "one cell computes, the others show"
    kinds = [output["output_type"] for cell in outputs for output in cell]
    assert "error" not in kinds
    assert sum("image/png" in o.get("data", {}) for cell in outputs for o in cell) == 4
    counts = [cell["execution_count"] for cell in cells() if cell["cell_type"] == "code"]
    assert counts == list(range(1, len(counts) + 1)), "not run from top to bottom"


def test_no_machine_paths():
    text = NOTEBOOK.read_text(encoding="utf-8")
    images = re.compile(r'"image/png": "[^"]*"')
    assert not re.search(
        r"/(home|root|work|tmp|Users|usr|var)/|[A-Z]:\\\\", images.sub("", text)
    )


def test_only_the_analysis_group_is_imported():
    allowed = {
        "math",
        "re",
        "subprocess",
        "pathlib",
        "statistics",
        "matplotlib",
        "pandas",
    }
    found = re.findall(r"^(?:from|import) (\w+)", "\n".join(sources()), re.MULTILINE)
    assert set(found) <= allowed


def test_columns_are_those_of_the_loop(execute):
    assert execute()["COLUMNS"] == HEADER.rstrip("\n").split("\t")
    assert HEADER == ledger.HEADER


@pytest.mark.parametrize("text", [None, "", "\n", HEADER, HEADER.rstrip("\n")])
def test_nothing_logged(execute, text):
    names = execute(text)
    assert len(names["log"]) == 0 and names["n_kept"] == 0


def test_crashes_only(execute):
    names = execute(
        to_log([(f"abc000{i}", 0, 0, "crash", "out of memory") for i in range(3)])
    )
    assert list(names["experiments"].status) == ["crash"] * 3
    assert math.isnan(names["noise"])


def test_a_single_run(execute):
    names = execute(to_log([("abc0001", 0.44, 58.7, "keep", "baseline, seed 42")]))
    assert names["start"] == names["best"] == 0.44 and math.isnan(names["noise"])


def test_odd_descriptions_stay_one_row_each(execute):
    odd = [
        'an "open quote',
        '""',
        "'",
        "$x_{",
        "a, b; c",
        "\u6df1 \u2192 \u00fc \u2028",
        "NA",
        "#",
        "\\",
    ]
    rows = [
        (f"12e45{i:02d}", 0.44 - i / 1000, 50, "keep", text) for i, text in enumerate(odd)
    ]
    names = execute(to_log(rows))
    assert list(names["log"].description) == odd
    assert list(names["log"].commit) == [row[0] for row in rows]
    assert not names["strays"]


def test_lines_that_are_no_rows_are_shown_not_counted(execute, capsys):
    row = "abc0001\t0.44\t58.7\tkeep\tbaseline\r\n"
    names = execute(HEADER + row + "note to self\nabc0002 0.43 58.7 keep spaces\n")
    assert len(names["log"]) == 1
    assert capsys.readouterr().out.count("skipped, not a run:") == 2


def test_baseline_that_crashed(execute):
    rows = [
        ("abc0001", 0, 0, "crash", "baseline, seed 42"),
        ("abc0002", 0.44, 58.7, "keep", "smaller batch"),
        ("abc0003", 0.43, 58.7, "keep", "deeper"),
    ]
    names = execute(to_log(rows))
    assert (names["start"], names["best"], names["n_kept"]) == (0.44, 0.43, 2)


def test_nothing_kept(execute):
    rows = [
        (f"abc000{i}", 0.44 + i / 1000, 58.7, "discard", f"idea {i}") for i in range(4)
    ]
    names = execute(to_log(rows))
    assert names["n_kept"] == 0 and names["start"] == 0.44


def test_night(execute, tmp_path):
    write_night(tmp_path)
    names = execute()
    assert (len(names["log"]), len(names["tries"]), names["n_kept"]) == (20, 14, 5)
    groups = [
        [0.4418, 0.4425, 0.4413],
        [0.4391, 0.4396],
        [0.4379, 0.4383],
        [0.4355, 0.4356],
    ]
    squares = sum(statistics.variance(g) * (len(g) - 1) for g in groups)
    assert names["noise"] == pytest.approx(math.sqrt(squares / 5))
    chain = names["chain"]
    assert chain.gain.iloc[1] == pytest.approx(statistics.fmean(groups[0]) - 0.43935)
    assert list(chain.clear.iloc[1:]) == [True, True, True, False, True]
    assert names["best"] == 0.4334 and names["ceiling"] < 0.5127
    assert len(names["hours"]) == 14 and names["hours"].max() == pytest.approx(
        13 * 7 / 60
    )


def test_keep_after_a_provisional_discard(execute):
    rows = [
        ("abc0001", 0.440, 58.7, "keep", "baseline, seed 42"),
        ("abc0002", 0, 0, "crash", "idea"),
        ("abc0002", 0.438, 58.7, "discard", "idea, again"),
        ("abc0002", 0.437, 58.7, "keep", "idea, repeat, seed 43"),
    ]
    names = execute(to_log(rows))
    assert names["experiments"].loc["abc0002", ["status", "runs"]].tolist() == ["keep", 2]
    assert names["log"].val_bpb.isna().tolist() == [False, True, False, False]
    assert names["best"] == pytest.approx(0.4375)


def test_expected_best_of_n_draws(execute):
    expected_best = execute()["expected_best"]
    assert expected_best(0) == expected_best(1) == 0
    assert expected_best(10) == pytest.approx(
        1.5388, rel=0.01
    )  # tables of normal order statistics
    assert expected_best(100) == pytest.approx(2.5076, rel=0.01)


def renew_outputs():
    """Execute the notebook on NIGHT with Jupyter and store the outputs."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        write_night(Path(folder))
        NotebookClient(notebook, resources={"metadata": {"path": folder}}).execute()
    for cell in notebook.cells:
        cell.metadata.clear()  # times of execution
    notebook.metadata = {
        "kernelspec": {
            "display_name": "Python 3",
            "language": "python",
            "name": "python3",
        },
        "language_info": {"name": "python"},
    }
    nbformat.write(notebook, NOTEBOOK)


if __name__ == "__main__":
    renew_outputs()
