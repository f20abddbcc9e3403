"""Documents to packed rows of T + 1 ids, in files named by what they rest on."""

import hashlib
import itertools
import math
import os
import time
from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

import constants as C
from harness.documents import REPLACE, count_rows, name_few, read_documents
from harness.files import atomic_write, content_key
from harness.jobs import Progress, describe_all, run_jobs
from harness.output import plural
from harness.tokenizer import Tokenizer

LOW_KEPT = 0.5  # of training tokens: text of usual lengths keeps 0.65 and more
LOW_DISTINCT = 0.9  # of validation rows


def pack_rows(batches: Iterable[list[np.ndarray]], capacity: int) -> Iterator[np.ndarray]:
    """Pack documents into rows of exactly `capacity` ids, without padding.

    batches: lists of documents, each an array that opens with BOS. Before every placement
    the buffer is refilled to PACK_BUFFER_DOCS; the longest document that fits is placed,
    or else the shortest, cropped; of equals the earliest. Yields the same array of shape
    (capacity,) each time. Source: best-fit packing, arXiv:2404.10830.
    """
    source = iter(batches)
    arrivals = itertools.count()
    documents: dict[int, np.ndarray] = {}  # arrival -> ids
    # (length, -arrival), sorted: the last of one length is the earliest that came.
    sizes: list[tuple[int, int]] = []
    row = np.empty(capacity, np.uint16)
    filled = 0
    while True:
        while len(sizes) < C.PACK_BUFFER_DOCS:
            batch = next(source, None)
            if batch is None:
                break
            for ids in batch:
                arrival = next(arrivals)
                documents[arrival] = ids
                insort(sizes, (len(ids), -arrival))
        if not sizes:
            return
        room = capacity - filled
        at = bisect_right(sizes, (room, 0)) - 1
        if at < 0:  # none fits: the earliest of the shortest
            at = bisect_left(sizes, (sizes[0][0] + 1, -math.inf)) - 1
        _, arrival = sizes.pop(at)
        ids = documents.pop(-arrival)[:room]
        row[filled : filled + len(ids)] = ids
        filled += len(ids)
        if filled == capacity:
            yield row
            filled = 0


@dataclass
class Counts:
    """What `build_rows` met in a shard: documents, those left out, and ids with BOS."""

    documents: int = 0
    empty: int = 0
    tokens: int = 0


def build_rows(
    shard: Path,
    out: Path,
    tokenizer: Tokenizer,
    n_rows: int | None = None,
    progress: Progress | None = None,
    own: bool = False,
) -> Counts:
    """Tokenize and pack one shard, on its own, to the row file `out`; return the counts.

    n_rows: stop after so many, starting the shard over when it runs out; None: once over.
    progress: told of every batch of documents; may stop the work by raising.
    own: the shard is the user's. Empty documents are left out then, and one that is too
    short for `n_rows` is an error; the hub's are taken as the reference takes them.
    ValueError for a shard without documents.
    """
    if not any(read_documents(shard)):
        raise ValueError(f"{shard} holds no document; {REPLACE}")
    passes = itertools.repeat(shard) if n_rows and not own else [shard]
    counts = Counts()

    def batches() -> Iterator[list[np.ndarray]]:
        for texts in itertools.chain.from_iterable(map(read_documents, passes)):
            if progress is not None:
                progress.add(len(texts))
            counts.documents += len(texts)
            if own:
                full = [text for text in texts if text]
                counts.empty += len(texts) - len(full)
                texts = full
            batch = [tokenizer.encode(text) for text in texts]
            counts.tokens += sum(map(len, batch))
            yield batch

    with atomic_write(out) as file:
        made = 0
        for row in itertools.islice(pack_rows(batches(), C.MAX_SEQ_LEN + 1), n_rows):
            file.write(row.astype("<u2").tobytes())
            made += 1
        if n_rows and made < n_rows:
            rows = plural(made, "row")
            fill = f"its {counts.tokens:,} tokens fill {rows} of {C.MAX_SEQ_LEN}"
            need = f"validation needs {n_rows:,} rows, {C.EVAL_TOKENS:,} tokens"
            advice = (
                f"give it about {math.ceil(n_rows / max(made, 1))} times as much text"
            )
            if counts.tokens > C.EVAL_TOKENS:  # what is longer than a row is cropped
                advice = f"cut its long documents into pieces, or {advice}"
            raise ValueError(f"{shard} is too short: {fill}, and {need}; {advice}")
    return counts


def row_name(name: str, about: dict, tokenizer_sha256: str, own: str = "") -> str:
    """Return the name of a shard's row file; it changes with all that the rows rest on.

    name, about: the shard's file name and what `describe` returns for it.
    own: for the user's shards, whose split depends on the other shards, the split.
    """
    parts = [C.DATA_RULES, C.SPLIT_PATTERN, about["sha256"], tokenizer_sha256]
    if own:
        parts += ["own", own]
    return f"{Path(name).stem}.{content_key(*parts)}.u16"


def row_names(
    shards: dict[str, dict], tokenizer_sha256: str, own: bool
) -> dict[str, str]:
    """Return row file -> shard, in order; the last shard is for validation."""
    *train, val = shards
    splits = dict.fromkeys(train, "train") | {val: "val"}
    return {
        row_name(name, about, tokenizer_sha256, splits[name] if own else ""): name
        for name, about in shards.items()
    }


def report_kept(kept: float, own: bool) -> None:
    """Print the fraction of training tokens that packing kept; of own text, warn of a low one."""
    text = f"packing kept {100 * kept:.0f} % of the training tokens"
    why = "documents are cropped to fill rows"
    if C.SMOKE and not own:
        why = f"normal for a smoke run, whose rows are of {C.MAX_SEQ_LEN} tokens"
    print(f"rows: {text}; {why}", flush=True)
    if own and kept < LOW_KEPT:
        length = f"longer than a row of {C.MAX_SEQ_LEN} tokens"
        advice = "cut them into pieces before"
        print(f"rows: WARNING: documents {length} are cropped; {advice}", flush=True)


def report_distinct(path: Path, own: bool) -> None:
    """Print how many validation rows in file `path` differ; of own text, warn of few."""
    size = 2 * (C.MAX_SEQ_LEN + 1)
    seen = set()
    with open(path, "rb") as file:
        while row := file.read(size):
            seen.add(hashlib.sha256(row).digest())
    n_rows = path.stat().st_size // size
    are = "is" if len(seen) == 1 else "are"
    text = f"{len(seen):,} of {n_rows:,} validation rows {are} distinct"
    print(f"rows: {text}", flush=True)
    if own and len(seen) < LOW_DISTINCT * n_rows:
        what = "val_bpb rests on little text"
        advice = "give the validation shard more text that does not repeat"
        print(f"rows: WARNING: {what}; {advice}", flush=True)


def ensure_rows(
    folder: Path,
    place: Path,
    shards: dict[str, dict],
    tokenizer: Tokenizer,
    known: dict[str, dict],
    workers: int | None,
    own: bool = False,
) -> dict[str, dict]:
    """Have a row file of every shard in `place`; return split, size and SHA-256 by name.

    shards: name -> size and SHA-256; the last one is for validation. known: what this
    returned before; a file of the right name is right unless `known` tells otherwise.
    own: they are the user's. ValueError for a shard that cannot be packed, or too little
    text for one training row or for validation.
    """
    names = row_names(shards, tokenizer.sha256, own)
    *train, val = names
    there = [name for name in names if (folder / "rows" / name).is_file()]
    rows = describe_all(folder / "rows", there)
    for name in there:
        expected = known.get(name, rows[name])
        if any(expected[key] != value for key, value in rows[name].items()):
            print(f"rows/{name} is damaged: it is repacked", flush=True)
            del rows[name]
    progress = Progress("packing", " documents", 0)
    jobs = {}
    # Validation first: where it is too short, all other work is in vain.
    for name in [name for name in (val, *train) if name not in rows]:
        shard = place / names[name]
        n_rows = C.EVAL_TOKENS // C.MAX_SEQ_LEN if name == val else None
        out = folder / "rows" / name
        progress.total += count_rows(shard)
        jobs[name] = partial(build_rows, shard, out, tokenizer, n_rows, progress, own)
    if known and not known.keys() & names.keys():
        print("rows: of other shards, tokenizer or rules; they are repacked", flush=True)
    counts = run_jobs(jobs, workers or os.cpu_count(), progress)
    rows |= describe_all(folder / "rows", list(jobs))
    tokens = sum(rows[name]["size"] // 2 for name in train)
    if tokens == 0:
        problem = f"the training shards in {place} do not fill one row"
        raise ValueError(f"{problem} of {C.MAX_SEQ_LEN} tokens; give them more text")
    seconds = time.monotonic() - progress.started_at
    text = f"{tokens / 1e6:.1f} M training tokens in {plural(len(train), 'file')}"
    print(f"rows: {text}, {len(jobs)} packed in {seconds:.1f} s", flush=True)
    empty = sum(count.empty for count in counts.values())
    if empty:
        documents = sum(count.documents for count in counts.values())
        where = [f"{c.empty:,} of {names[name]}" for name, c in counts.items() if c.empty]
        text = f"{empty:,} of {documents:,} documents, {name_few(where)}"
        print(f"rows: left out, empty, null or not UTF-8: {text}", flush=True)
    packed = [name for name in train if name in counts]
    met = sum(counts[name].tokens for name in packed)
    if met:
        kept = sum(rows[name]["size"] // 2 for name in packed) / met
        report_kept(kept, own)
    report_distinct(folder / "rows" / val, own)
    splits = dict.fromkeys(train, "train") | {val: "val"}
    return {name: {"split": split, **rows[name]} for name, split in splits.items()}
