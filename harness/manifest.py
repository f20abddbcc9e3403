"""The manifest of what is prepared, as preparations and runs read it."""

import json
from pathlib import Path

import constants as C
from harness.files import PREPARE, content_key


def load_manifest(folder: Path) -> dict:
    """Return the manifest of `folder`, or {} if it is missing or damaged.

    OSError if it cannot be read.
    """
    try:
        manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
        body = {key: value for key, value in manifest.items() if key != "key"}
        good = manifest.get("key", content_key(body)) == content_key(body)
        for entry in (*manifest["rows"].values(), *manifest["shards"].values()):
            good = good and {"size", "sha256"} <= {*entry}
        good = good and all("split" in entry for entry in manifest["rows"].values())
        return manifest if good else {}
    except (FileNotFoundError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def require_manifest(folder: Path) -> dict:
    """Return the manifest of `folder`; ValueError if there is none of the rules in force."""
    manifest, path = load_manifest(folder), folder / "manifest.json"
    if manifest.get("rules") == C.DATA_RULES:
        return manifest
    if not path.exists():
        problem = f"nothing is prepared in {folder}"
    else:
        problem = f"{path} is {'of other rules' if manifest else 'damaged'}"
    raise ValueError(f"{problem}; run `{PREPARE}`")
