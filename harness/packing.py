"""Documents to packed rows of T + 1 ids, in files named by what they rest on."""

import itertools
import math
import os
import time
from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

import constants as C
from harness.documents import read_documents
from harness.files import PREPARE, atomic_write, content_key
from harness.jobs import Progress, describe_all, run_jobs
from harness.tokenizer import Tokenizer


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


def build_rows(
    shard: Path,
    out: Path,
    tokenizer: Tokenizer,
    n_rows: int | None = None,
    progress: Progress | None = None,
) -> None:
    """Tokenize and pack one shard, on its own, to the row file `out`.

    n_rows: stop after so many, starting the shard over when it runs out; None: once over.
    progress: told of every batch of documents; may stop the work by raising.
    ValueError for a shard without documents, or with one that tiktoken gives up on.
    """
    if not any(read_documents(shard)):
        raise ValueError(f"{shard} holds no document; delete it and run {PREPARE}")
    passes = itertools.repeat(shard) if n_rows else [shard]

    def batches() -> Iterator[list[np.ndarray]]:
        for texts in itertools.chain.from_iterable(map(read_documents, passes)):
            if progress is not None:
                progress.add(len(texts))
            try:
                yield [tokenizer.encode(text) for text in texts]
            except ValueError as error:  # a million blanks without a break, for one
                problem = f"{shard}: tiktoken gives up on a document ({error})"
                advice = f"delete the shard and run {PREPARE}"
                raise ValueError(f"{problem}; {advice}") from error

    with atomic_write(out) as file:
        for row in itertools.islice(pack_rows(batches(), C.MAX_SEQ_LEN + 1), n_rows):
            file.write(row.astype("<u2").tobytes())


def row_name(name: str, about: dict, tokenizer_sha256: str) -> str:
    """Return the name of a shard's row file; it changes with all that the rows rest on.

    name, about: the shard's file name and what `describe` returns for it.
    """
    key = content_key(C.DATA_RULES, C.SPLIT_PATTERN, about["sha256"], tokenizer_sha256)
    return f"{Path(name).stem}.{key}.u16"


def ensure_rows(
    folder: Path,
    place: Path,
    shards: dict[str, dict],
    tokenizer: Tokenizer,
    known: dict[str, dict],
    workers: int | None,
) -> dict[str, dict]:
    """Have a row file of every shard in `place`; return split, size and SHA-256 by name.

    shards: name -> size and SHA-256; the last one is for validation. known: what this
    returned before; a file of the right name is right unless `known` tells otherwise.
    ValueError for a shard that cannot be packed, or too little text for one training row.
    """
    names = {  # row file -> shard
        row_name(name, about, tokenizer.sha256): name for name, about in shards.items()
    }
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
    for name in [name for name in names if name not in rows]:
        shard = place / names[name]
        n_rows = C.EVAL_TOKENS // C.MAX_SEQ_LEN if name == val else None
        out = folder / "rows" / name
        progress.total += pq.read_metadata(shard).num_rows
        jobs[name] = partial(build_rows, shard, out, tokenizer, n_rows, progress)
    if known and not known.keys() & names.keys():
        print("rows: of other shards, tokenizer or rules; they are repacked", flush=True)
    run_jobs(jobs, workers or os.cpu_count(), progress)
    rows |= describe_all(folder / "rows", list(jobs))
    tokens = sum(rows[name]["size"] // 2 for name in train)
    if tokens == 0:
        raise ValueError(f"the training shards in {place} do not fill one row")
    seconds = time.monotonic() - progress.started_at
    text = f"{tokens / 1e6:.1f} M training tokens in {len(train)} files"
    print(f"rows: {text}, {len(jobs)} packed in {seconds:.1f} s", flush=True)
    splits = dict.fromkeys(train, "train") | {val: "val"}
    return {name: {"split": split, **rows[name]} for name, split in splits.items()}
