"""Documents to packed rows of T + 1 ids, in files that are named by what they rest on."""

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

    batches: lists of documents, each an array that opens with BOS. Before every placement the
    buffer is refilled to PACK_BUFFER_DOCS; the longest document that fits is placed, or else the
    shortest, cropped; of equals the earliest. Yields one array each time. Source: arXiv:2404.10830.
    """
    source, arrivals = iter(batches), itertools.count()
    documents: dict[int, np.ndarray] = {}  # arrival -> ids
    sizes: list[
        tuple[int, int]
    ] = []  # (length, -arrival), sorted: of equals the last came first
    row, filled = np.empty(capacity, np.uint16), 0
    while True:
        while (
            len(sizes) < C.PACK_BUFFER_DOCS and (batch := next(source, None)) is not None
        ):
            for ids in batch:
                documents[arrival := next(arrivals)] = ids
                insort(sizes, (len(ids), -arrival))
        if not sizes:
            return
        at = bisect_right(sizes, (capacity - filled, 0)) - 1
        if at < 0:  # none fits: the earliest of the shortest
            at = bisect_left(sizes, (sizes[0][0] + 1, -math.inf)) - 1
        ids = documents.pop(-sizes.pop(at)[1])[: capacity - filled]
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
    """Tokenize and pack one shard, on its own, to a row file; ValueError if it has no document.

    n_rows: stop after so many, starting the shard over when it runs out; None: once through.
    progress: told of every batch of documents; may stop the work by raising.
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
            except ValueError as error:  # a million blanks in a row, for one
                text = f"{shard}: tiktoken gives up on a document ({error}); delete the shard"
                raise ValueError(f"{text} and run {PREPARE}") from error

    with atomic_write(out) as file:
        for row in itertools.islice(pack_rows(batches(), C.MAX_SEQ_LEN + 1), n_rows):
            file.write(row.astype("<u2").tobytes())


def row_name(name: str, about: dict, tokenizer_sha256: str) -> str:
    """Return the name of a shard's row file; it changes with everything that the rows rest on."""
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
    """Have the row file of every shard in `place`; return file name -> split, size and SHA-256.

    A file of the right name is right unless `known` tells otherwise. The last shard validates.
    """
    names = {
        row_name(name, about, tokenizer.sha256): name for name, about in shards.items()
    }
    there = [name for name in names if (folder / "rows" / name).is_file()]
    rows = describe_all(folder / "rows", there)
    for name in there:
        if any(rows[name][key] != known.get(name, rows[name])[key] for key in rows[name]):
            print(f"rows/{name} is damaged: it is packed anew", flush=True)
            del rows[name]
    documents = Progress("packing", " documents", 0)
    val, jobs = row_name(*[*shards.items()][-1], tokenizer.sha256), {}
    for name in [name for name in names if name not in rows]:
        shard = place / names[name]
        n_rows = C.EVAL_TOKENS // C.MAX_SEQ_LEN if name == val else None
        documents.total += pq.read_metadata(shard).num_rows
        jobs[name] = partial(
            build_rows,
            shard,
            folder / "rows" / name,
            tokenizer,
            n_rows,
            progress=documents,
        )
    if known and not known.keys() & names.keys():
        print(
            "rows: of other shards, tokenizer or rules; they are packed anew", flush=True
        )
    run_jobs(jobs, workers or os.cpu_count(), documents)
    rows |= describe_all(folder / "rows", list(jobs))
    rows = {n: {"split": "val" if n == val else "train", **rows[n]} for n in names}
    tokens = sum(
        about["size"] // 2 for about in rows.values() if about["split"] == "train"
    )
    if tokens == 0:
        raise ValueError(f"the training shards in {place} do not fill one row")
    seconds = time.monotonic() - documents.started_at
    text = f"{tokens / 1e6:.1f} M training tokens in {len(rows) - 1} files"
    print(f"rows: {text}, {len(jobs)} packed in {seconds:.1f} s", flush=True)
    return rows
