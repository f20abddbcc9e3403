"""All of the preparation in order, the manifest that records it, and the check by it."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import constants as C
from harness.documents import list_source, write_smoke_shards
from harness.download import ANSWERS, DOWNLOADS, ensure_shards
from harness.files import PREPARE, atomic_write, content_key, lock, remove_temporaries
from harness.jobs import describe_all
from harness.manifest import load_manifest, require_manifest
from harness.output import plural
from harness.packing import ensure_rows, row_names
from harness.tokenizer import Tokenizer, ensure_tokenizer

VAL_NAME = C.SHARD_NAME.format(C.VAL_SHARD)


def drop_copies(shards: dict[str, dict]) -> dict[str, dict]:
    """Return the user's shards without training shards that are copies of another one.

    The last is for validation. ValueError if a training shard is a copy of it.
    """
    *train, val = shards
    first = {}
    for name in train:
        sha256 = shards[name]["sha256"]
        if sha256 == shards[val]["sha256"]:
            problem = f"{name} is a copy of {val}, the validation shard"
            raise ValueError(f"{problem}; take one of them out of the folder")
        if sha256 in first:
            print(f"shards: left out, a copy of {first[sha256]}: {name}", flush=True)
        first.setdefault(sha256, name)
    return {name: shards[name] for name in (*first.values(), val)}


def list_changes(before: dict[str, dict], now: dict[str, dict]) -> list[str]:
    """Return a few words on each of the user's shards that changed since `before`."""
    if not before:
        return []
    changes = [f"{name} is gone" for name in before if name not in now]
    changes += [f"{name} is new" for name in now if name not in before]
    changes += [
        f"{name} has changed"
        for name in before
        if before[name] != now.get(name, before[name])
    ]
    if [*before][-1] != [*now][-1]:
        changes.append(f"the validation shard is {[*now][-1]}, not {[*before][-1]}")
    return changes


def describe_source(
    source: Path, num_shards: int | None, manifest: dict
) -> dict[str, dict]:
    """Return size + SHA-256 by name of the user's shards that a preparation takes.

    Arguments and errors are those of `prepare`.
    """
    *train, val = list_source(source, None if num_shards == -1 else num_shards)
    if num_shards is None:  # no more than before
        train = train[: manifest.get("num_shards")]
    return drop_copies(describe_all(source, [*train, val]))


def ensure_source(
    folder: Path, source: str, num_shards: int | None, manifest: dict, downloads: int
) -> tuple[Path, str, dict[str, dict]]:
    """Have the shards; return their folder, revision, and size + SHA-256 by name.

    The last of them is for validation. Arguments and errors are those of `prepare`.
    """
    if source != "hub":
        advice = "`--source hub` goes back to the hub's"
        print(f"shards: those of {source}; {advice}", flush=True)
        place = Path(source)
        shards = describe_source(place, num_shards, manifest)
        for line in list_changes(manifest.get("shards", {}), shards):
            print(f"shards: since the last preparation {line}", flush=True)
        return place, source, shards
    if num_shards is None:  # as many as before
        num_shards = len(manifest.get("shards", ())) - 1
        if num_shards <= 0:
            num_shards = C.DEFAULT_NUM_SHARDS
    if num_shards == -1:
        num_shards = C.VAL_SHARD
    names = [*map(C.SHARD_NAME.format, range(num_shards)), VAL_NAME]
    place = folder / "shards"
    if C.SMOKE:
        revision = f"library of Python {sys.version.split()[0]}"
        return place, revision, write_smoke_shards(place, names)
    revision, shards = ensure_shards(place, names, manifest, downloads)
    return place, revision, shards


def refuse_to_guess(folder: Path, source: str | None) -> None:
    """Raise ValueError if a damaged manifest alone knew the source, and none is given."""
    path = folder / "manifest.json"
    if not path.exists():
        return
    if source:
        print(f"{path} is damaged: all that it described is checked again", flush=True)
        return
    count = len([*folder.glob("rows/*.u16")]) - 1  # of training
    number = f" --num-shards {count}" if count > 0 else ""
    problem = f"{path} is damaged, and it alone says where the shards are from"
    advice = (
        f"run `{PREPARE} --source hub{number}`, or `--source DIR` if they are your own"
    )
    raise ValueError(f"{problem}; {advice}")


@contextmanager
def put_back(folder: Path) -> Iterator[None]:
    """Leave the files of `folder` as they were, if there were any, when text is refused."""
    before = {path: path.read_bytes() for path in folder.glob("*.*")}
    try:
        yield
    except ValueError:
        for path, body in before.items():
            with atomic_write(path) as file:
                file.write(body)
        raise


def prepare(
    folder: Path,
    num_shards: int | None,
    workers: int | None = None,
    downloads: int = DOWNLOADS,
    source: str | None = None,
) -> None:
    """Bring `folder` to what the rules and `num_shards` training shards ask for.

    source: a folder of the user's own shards, "hub", or None for where they came from
    before. num_shards: -1 for all, None for as many as before, or at first for the
    default, which is all of such a folder. workers, downloads: threads that pack and that
    fetch. OSError and ValueError say what could not be done; what is done is kept.
    """
    print(f"preparing {folder}", flush=True)
    with lock(folder):
        remove_temporaries(folder)
        manifest = load_manifest(folder)
        if not manifest:
            refuse_to_guess(folder, source)
        source = source or manifest.get("source", "hub")
        if manifest.get("source", "hub") != source:
            manifest = {}
        place, revision, shards = ensure_source(
            folder, source, num_shards, manifest, downloads
        )
        *train, _ = shards
        texts = {place / name: shards[name] for name in train}
        known = manifest.get("rows", {})
        own = source != "hub"
        with put_back(folder / "tokenizer"):
            tokenizer = ensure_tokenizer(folder / "tokenizer", texts)
            rows = ensure_rows(folder, place, shards, tokenizer, known, workers, own)
        about = {
            "rules": C.DATA_RULES,
            "revision": revision,
            "tokenizer": tokenizer.sha256,
        }
        if own:
            about["source"] = source
            limit = manifest.get("num_shards") if num_shards is None else num_shards
            if limit not in (None, -1):  # a plain run stays with it
                about["num_shards"] = limit
        about |= {"shards": shards, "rows": rows}
        about |= {"key": content_key(about)}  # so that a change to any byte is noticed
        if load_manifest(folder) != json.loads(json.dumps(about)):
            with atomic_write(folder / "manifest.json") as file:
                file.write(json.dumps(about, indent=1).encode())
            (folder / "shards" / ANSWERS).unlink(missing_ok=True)  # the manifest has it
        for path in (folder / "rows").iterdir():  # of other shards, tokenizers or rules
            if path.name not in rows:
                path.unlink()


def name_prepared(folder: Path) -> str:
    """Return which text the next run on `folder` uses, "" if it would refuse what is there."""
    try:
        manifest = require_manifest(folder)
        if Tokenizer.load(folder / "tokenizer").sha256 != manifest["tokenizer"]:
            return ""
        for name, entry in manifest["rows"].items():
            if (folder / "rows" / name).stat().st_size != entry["size"]:
                return ""
    except (OSError, ValueError):
        return ""
    shards = plural(len(manifest["shards"]) - 1, "training shard")
    source = f"the {manifest['revision']}" if C.SMOKE else "the hub"
    return f"{shards} of {manifest.get('source', source)}"


def check(folder: Path) -> list[str]:
    """Return a sentence on each prepared file in `folder` that is not as it was prepared.

    Reads everything, writes nothing. ValueError if there is no manifest to go by.
    """
    manifest = require_manifest(folder)
    own = "source" in manifest
    problems = []
    places = {"shards": folder / "shards", "rows": folder / "rows"}
    if own:
        place = Path(manifest["source"])
        try:
            if not place.exists():  # rows that came from another machine, say
                print(f"{place} is gone: its shards are not checked; no run reads them")
            else:
                shards = describe_source(place, None, manifest)
                for line in list_changes(manifest["shards"], shards):
                    what = "since the last preparation; a new run goes by that"
                    problems.append(f"{place}: {line} {what}")
        except ValueError as error:
            problems.append(str(error))
        del places["shards"]
    for part, where in places.items():
        found = describe_all(where, list(manifest[part]))
        for name, entry in manifest[part].items():
            path = where / name
            if not path.is_file():
                problems.append(f"{path} is missing")
            elif found[name]["size"] != entry["size"]:
                sizes = f"{found[name]['size']} bytes, not {entry['size']}"
                problems.append(f"{path} is damaged: it has {sizes}")
            elif found[name]["sha256"] != entry["sha256"]:
                problems.append(f"{path} is damaged: its bytes changed")
    try:
        tokenizer = Tokenizer.load(folder / "tokenizer")
        if tokenizer.sha256 != manifest["tokenizer"]:
            path = folder / "tokenizer"
            problems.append(f"the tokenizer in {path} is not that of the rows")
    except ValueError as error:
        problems.append(str(error))
    names = row_names(manifest["shards"], manifest["tokenizer"], own)
    if names.keys() != manifest["rows"].keys():
        path = folder / "rows"
        problems.append(f"the rows in {path} are not of these shards and rules")
    return problems
