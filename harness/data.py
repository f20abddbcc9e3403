"""All of the preparation in order, the manifest that records it, and the check of what is there."""

import json
import sys
from pathlib import Path

import constants as C
from harness.documents import list_source, write_smoke_shards
from harness.download import DOWNLOADS, ensure_shards
from harness.files import PREPARE, atomic_write, content_key, lock, remove_temporaries
from harness.jobs import describe_all
from harness.packing import ensure_rows, row_name
from harness.tokenizer import Tokenizer, ensure_tokenizer

VAL_NAME = C.SHARD_NAME.format(C.VAL_SHARD)


def load_manifest(folder: Path) -> dict:
    """Return the manifest of `folder`, or {} if there is none that can be read."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
        body = {key: value for key, value in manifest.items() if key != "key"}
        good = manifest.get("key", content_key(body)) == content_key(body)
        for entry in (*manifest["rows"].values(), *manifest["shards"].values()):
            good = good and {"size", "sha256"} <= {*entry}
        good = good and all("split" in entry for entry in manifest["rows"].values())
        return manifest if good else {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def prepare(
    folder: Path,
    num_shards: int | None,
    workers: int | None = None,
    downloads: int = DOWNLOADS,
    source: str | None = None,
) -> None:
    """Bring `folder` to the state that the rules and `num_shards` training shards ask for.

    source: a folder of the user's own shards, "hub", or None for where they came from before;
    num_shards: -1 for all, None for as many as before, or at first for the default, which is all
    of such a folder. OSError and ValueError say what could not be done; what is done is kept.
    """
    print(f"preparing {folder}", flush=True)
    with lock(folder):
        remove_temporaries(folder)
        manifest, place = load_manifest(folder), folder / "shards"
        source = source or manifest.get("source", "hub")
        if manifest.get("source", "hub") != source:
            manifest = {}
        if source != "hub":
            print(
                f"shards: those of {source}; --source hub goes back to the hub's",
                flush=True,
            )
            place = Path(source)
            names = list_source(place, None if num_shards == -1 else num_shards)
            revision, shards = source, describe_all(place, names)
        else:
            if num_shards is None:  # as many as before
                num_shards = len(manifest.get("shards", ())) - 1
                num_shards = num_shards if num_shards > 0 else C.DEFAULT_NUM_SHARDS
            num_shards = C.VAL_SHARD if num_shards == -1 else num_shards
            names = [*map(C.SHARD_NAME.format, range(num_shards)), VAL_NAME]
            if C.SMOKE:
                revision = f"library of Python {sys.version.split()[0]}"
                shards = write_smoke_shards(place, names)
            else:
                revision, shards = ensure_shards(place, names, manifest, downloads)
        train = {place / name: shards[name] for name in names[:-1]}
        tokenizer = ensure_tokenizer(folder / "tokenizer", train)
        rows = ensure_rows(
            folder, place, shards, tokenizer, manifest.get("rows", {}), workers
        )
        about = {
            "rules": C.DATA_RULES,
            "revision": revision,
            "tokenizer": tokenizer.sha256,
        }
        about |= {} if source == "hub" else {"source": source}
        about |= {"shards": shards, "rows": rows}
        about |= {"key": content_key(about)}  # so that a change to any byte is noticed
        if load_manifest(folder) != json.loads(json.dumps(about)):
            with atomic_write(folder / "manifest.json") as file:
                file.write(json.dumps(about, indent=1).encode())
        for path in (folder / "rows").iterdir():  # of other shards, tokenizers or rules
            if path.name not in rows:
                path.unlink()


def check(folder: Path) -> list[str]:
    """Return a sentence for each prepared file in `folder` that is not as it was prepared.

    Reads everything, writes nothing. ValueError if there is no manifest to go by.
    """
    manifest = load_manifest(folder)
    if manifest.get("rules") != C.DATA_RULES:
        path = folder / "manifest.json"
        raise ValueError(f"{path} is missing, damaged or of other rules; run {PREPARE}")
    place, problems = Path(manifest.get("source", folder / "shards")), []
    for part, where in (("shards", place), ("rows", folder / "rows")):
        found = describe_all(where, list(manifest[part]))
        for name, entry in manifest[part].items():
            if not (where / name).is_file():
                problems.append(f"{where / name} is missing")
            elif found[name]["size"] != entry["size"]:
                sizes = f"{found[name]['size']} bytes, not {entry['size']}"
                problems.append(f"{where / name} is damaged: it has {sizes}")
            elif found[name]["sha256"] != entry["sha256"]:
                problems.append(f"{where / name} is damaged: its bytes changed")
    try:
        tokenizer = Tokenizer.load(folder / "tokenizer")
        if tokenizer.sha256 != manifest["tokenizer"]:
            problems.append(
                f"the tokenizer in {folder / 'tokenizer'} is not that of the rows"
            )
    except ValueError as error:
        problems.append(str(error))
    names = {
        row_name(*shard, manifest["tokenizer"]) for shard in manifest["shards"].items()
    }
    if names != set(manifest["rows"]):
        problems.append(
            f"the rows in {folder / 'rows'} are not of these shards and rules"
        )
    return problems
