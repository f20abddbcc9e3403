"""The notebook as its cells, and the header of the log that it reads."""

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "analysis.ipynb"
HEADER = "commit\tval_bpb\tmemory_gb\tstatus\tdescription\n"


def cells():
    return json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]


def sources():
    return ["".join(cell["source"]) for cell in cells() if cell["cell_type"] == "code"]
