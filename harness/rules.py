"""What the numbers of a run rest on, by hashes: fixed files, constants, prepared data."""

import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import constants as C
from harness.files import PREPARE, atomic_write, content_key, describe
from harness.manifest import require_manifest
from harness.tokenizer import Tokenizer

LAST_RUN = "last_run.json"  # beside the manifest: what the run before rested on
# Constants that are no rules but of one run alone.
OWN = {"SEED", "SAVE", "DRY_RUN", "STARTED_AT"}


@dataclass
class Basis:
    """What one run rests on.

    rules: stands for fixed files, constants, tokenizer and validation rows; data: for the
    training rows. parts: what both are made of, which JSON can hold.
    """

    tokenizer: Tokenizer
    paths: dict[str, list[Path]]  # row files by split, in order
    rules: str
    data: str
    parts: dict


def open_basis(root: Path, folder: Path) -> Basis:
    """Return what a run of the checkout `root` on the data in `folder` rests on, checked.

    Validation rows and tokenizer are read; of training rows the size is checked, and the
    manifest's hashes are taken. ValueError says what is amiss and what to do.
    """
    manifest = require_manifest(folder)
    tokenizer = Tokenizer.load(folder / "tokenizer")
    if manifest.get("tokenizer") != tokenizer.sha256:
        problem = f"the rows in {folder} are of another tokenizer"
        raise ValueError(f"{problem}; run `{PREPARE}`")
    paths: dict[str, list[Path]] = {"train": [], "val": []}
    rows: dict[str, list[list[str]]] = {"train": [], "val": []}
    for name, entry in manifest["rows"].items():
        path, split = folder / "rows" / name, entry["split"]
        if not path.is_file() or path.stat().st_size != entry["size"]:
            raise ValueError(f"{path} is missing or cut short; run `{PREPARE}`")
        if split == "val" and describe(path)["sha256"] != entry["sha256"]:
            raise ValueError(f"{path} is damaged: its bytes changed; run `{PREPARE}`")
        paths[split].append(path)
        rows[split].append([name, entry["sha256"]])
    fixed = [root / "constants.py", root / "prepare.py", *root.glob("harness/*.py")]
    parts = {
        "fixed files": {
            path.relative_to(root).as_posix(): describe(path)["sha256"]
            for path in sorted(fixed)
        },
        "constants": {k: vars(C)[k] for k in dir(C) if k.isupper() and k not in OWN},
        "tokenizer": tokenizer.sha256,
        "validation rows": [sha256 for _, sha256 in rows["val"]],
    }
    rules = f"{'smoke' if C.SMOKE else 'full'}-{content_key(parts)[:8]}"
    data = content_key(rows["train"])[:8]
    parts |= {"rules": rules, "data": data, "training rows": rows["train"]}
    return Basis(tokenizer, paths, rules, data, json.loads(json.dumps(parts)))


def compare_with_last(folder: Path, parts: dict) -> str | None:
    """Return a line on what changed since the last run on `folder`, None if nothing did.

    The next run is compared with this one. A file that cannot be read or written is as
    if there had been no run.
    """
    path, before = folder / LAST_RUN, {}
    with suppress(OSError, ValueError):
        before = json.loads(path.read_text("utf-8"))
    if before == parts:
        return None
    with suppress(OSError), atomic_write(path) as file:
        file.write(json.dumps(parts, indent=1).encode())
    try:
        changes = list_changes(before, parts)
    except (KeyError, TypeError, AttributeError):  # no run before, or not ours
        return None
    return f"changed since the last run: {'; '.join(changes)}"


def list_changes(before: dict, now: dict) -> list[str]:
    """Return what differs between the parts of two runs, each in a few words."""

    def differing(part: str) -> list[str]:
        pairs = before[part], now[part]
        return sorted(
            k for k in {*pairs[0], *pairs[1]} if pairs[0].get(k) != pairs[1].get(k)
        )

    changes = []
    for part in ("rules", "data"):
        if before[part] != now[part]:
            changes.append(f"{part} {before[part]}, now {now[part]}")
    files = differing("fixed files")
    if files:
        changes.append(", ".join(files))
    if "constants.py" not in files and (names := differing("constants")):
        changes.append(f"constants in memory ({', '.join(names)})")
    changes += [
        part for part in ("tokenizer", "validation rows") if before[part] != now[part]
    ]
    if before["data"] != now["data"]:
        counts = [len(parts["training rows"]) for parts in (before, now)]
        changes.append("training rows ({} files, now {})".format(*counts))
    return changes
