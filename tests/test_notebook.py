"""analysis.ipynb: well formed, free of one machine's traces, and it starts with the answer.

uv run --group analysis pytest tests/test_notebook.py

uv run --group analysis python tests/test_notebook.py   # renews the stored outputs
"""

import base64
import json
import re
import subprocess

import pytest

from cells import HEADER, NOTEBOOK, ROOT, cells, sources


def outputs(cell) -> dict[str, str]:
    """Return kind -> text of what a cell shows."""
    found = {}
    for output in cell["outputs"]:
        assert output["output_type"] != "error"
        data = output.get("data", {"stdout": output.get("text", "")})
        found |= {kind: "".join(text) for kind, text in data.items()}
    return found


def execute(folder=ROOT):
    """Return the notebook as Jupyter executes it in `folder`."""
    nbformat = pytest.importorskip("nbformat")
    client = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    resources = {"metadata": {"path": str(folder)}}
    return client.NotebookClient(notebook, timeout=120, resources=resources).execute()


def test_format():
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    for cell in cells():
        assert cell["cell_type"] in ("code", "markdown") and cell["id"]
        code = {"outputs", "execution_count"} <= set(cell)
        assert code == (cell["cell_type"] == "code")
    assert len({cell["id"] for cell in cells()}) == len(cells())


def test_no_more_code_than_a_reader_skips_before_the_answer():
    for number, source in enumerate(sources()):
        compile(source, f"analysis.ipynb[{number}]", "exec")
    assert len("\n".join(sources()).splitlines()) < 10


def test_the_first_stored_output_is_the_answer_and_says_that_it_is_an_example():
    stored = [outputs(cell) for cell in cells() if cell["cell_type"] == "code"]
    assert "This is an example" in stored[0]["stdout"]
    assert "60 s per run: 1.1746 \u2192 1.1496" in stored[0]["stdout"]
    assert stored[0]["image/png"]
    assert all("<h2>" in shown["text/html"] for shown in stored[1:])
    counts = [cell["execution_count"] for cell in cells() if cell["cell_type"] == "code"]
    assert counts == list(range(1, len(counts) + 1)), "not run from top to bottom"


def test_the_stored_outputs_say_what_the_page_says_today():
    pytest.importorskip("matplotlib")
    import analysis
    from morning import page

    night = analysis.read_night(ledger=ROOT / "docs" / "example.tsv")
    stored = [outputs(cell) for cell in cells() if cell["cell_type"] == "code"]
    said = [page.believe(night), page.try_next(night)]
    said += [page.best_commit(night) + page.everything(night)]
    assert [shown["text/html"] for shown in stored[1:]] == said, __doc__


def test_the_readme_shows_the_picture_of_the_example_and_says_what_it_is(monkeypatch):
    pytest.importorskip("matplotlib")
    import analysis
    from morning.page import headline

    monkeypatch.chdir(ROOT / "docs")
    said = headline(analysis.read_example())
    assert f"![{said}](docs/progress.png)" in (ROOT / "README.md").read_text("utf-8")


def test_no_machine_paths():
    text = NOTEBOOK.read_text(encoding="utf-8")
    text = re.sub(r'"image/png": "[^"]*"', "", text)
    assert not re.search(r"/(home|root|work|tmp|Users|usr|var)/|[A-Z]:\\\\", text)


def test_jupyter_shows_a_night_and_changes_no_tracked_file(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    line = "abc0001\t0.440000\t58.7\tkeep\tbaseline, seed {}\n"
    (tmp_path / "results.tsv").write_text(HEADER + line.format(42) + line.format(43))
    before = subprocess.check_output(["git", "status", "--short"], cwd=ROOT)
    shown = [outputs(c) for c in execute(tmp_path).cells if c["cell_type"] == "code"]
    assert "0.4400, the baseline alone" in shown[0]["stdout"]
    assert "example" not in str(shown)
    assert subprocess.check_output(["git", "status", "--short"], cwd=ROOT) == before


def renew_outputs():
    """Execute the notebook on docs/example.tsv, and store what it shows and the picture."""
    import nbformat

    assert not (ROOT / "results.tsv").exists(), "it would show your night"
    notebook = execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times
    notebook.metadata = {
        "kernelspec": {
            "display_name": "Python 3",
            "language": "python",
            "name": "python3",
        },
        "language_info": {"name": "python"},
    }
    nbformat.write(notebook, NOTEBOOK)
    image = next(
        outputs(cell)["image/png"] for cell in notebook.cells if cell.get("outputs")
    )
    (ROOT / "docs" / "progress.png").write_bytes(base64.b64decode(image))


if __name__ == "__main__":
    renew_outputs()
