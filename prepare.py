"""Data preparation, once, and the fixed run-time of every experiment. Not edited.

Writes below ~/.cache/autoresearch (AUTORESEARCH_CACHE moves it):
    shards/shard_00000.parquet           as the hub serves it, checked against its SHA-256
    tokenizer/ranks.tiktoken             a line a token: its bytes in base64, its rank
    tokenizer/tokenizer.json             split pattern, special tokens, hash of the ranks
    rows/shard_00000.<key>.u16           packed rows of T + 1 ids, uint16, little endian
    manifest.json                        written last: what is there, with sizes and hashes
It may be killed at any moment and started again: files appear whole or not at all, a download
(shards/.<name>.<hash>.part) goes on where it broke, and a lock keeps a second one waiting.

The run-time half is what measures train.py: class `Run` with loader, clock, evaluation, summary.
"""

import argparse
import atexit
import base64
import errno
import hashlib
import itertools
import json
import math
import os
import random
import shlex
import signal
import subprocess
import sys
import sysconfig
import time
from bisect import bisect_left, bisect_right, insort
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import rustbpe
import tiktoken
import torch
import torch.nn.functional as F

import constants as C
import gpu
from download import (
    DOWNLOADS,
    PREPARE,
    Progress,
    describe,
    describe_all,
    ensure_shards,
    naming,
    run_jobs,
)

try:
    import fcntl
except ImportError:  # Windows: no lock there
    fcntl = None

VAL_NAME = C.SHARD_NAME.format(C.VAL_SHARD)
Batch = tuple[torch.Tensor, torch.Tensor]  # x, y: ids (B, T)
Model = Callable[[torch.Tensor], torch.Tensor]  # idx (B, T) -> logits (B, T, V)
RANDOM = "keeps state between calls or is random (dropout: call model.eval())"


# ---- Files --------------------------------------------------------------------------------------
def data_dir() -> Path:
    """Return the folder that holds everything prepared under the rules in force."""
    root = os.environ.get("AUTORESEARCH_CACHE") or Path.home() / ".cache" / "autoresearch"
    return Path(root).expanduser().absolute() / ("smoke" if C.SMOKE else "climbmix")


@contextmanager
def atomic_write(path: Path) -> Iterator:
    """Open a temporary binary file that becomes `path` only if the block succeeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with naming(path), open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_temporaries(folder: Path, pid: int | str = "*") -> None:
    """Delete what `atomic_write` of process `pid` left below `folder` when it was killed."""
    for path in [*folder.glob(f".*.{pid}.tmp"), *folder.glob(f"*/.*.{pid}.tmp")]:
        path.unlink(missing_ok=True)


def content_key(*parts: object) -> str:
    """Return 12 hex digits that change with any of `parts`, which JSON can hold."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Keep `folder` to one preparation at a time, waiting for another and saying so.

    The system drops the lock with the process, however that ends.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        try:
            file = stack.enter_context(open(folder / ".lock", "ab"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"another prepare.py is at work in {folder}; waiting for its end", flush=True)
                fcntl.flock(file, fcntl.LOCK_EX)
        except (OSError, AttributeError) as error:  # a folder to read only; no locks here
            print(f"no lock on {folder} ({error}); do not prepare twice at once", flush=True)
        yield


# ---- Shards -------------------------------------------------------------------------------------
MAX_BATCH_BYTES = 1 << 28  # of text in PACK_BATCH_DOCS documents; what is larger is a lie or a bomb


def write_smoke_shards(folder: Path, names: list[str]) -> dict[str, dict]:
    """Write shards of the Python installation's own source text, for the smoke rules."""
    library = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(library.glob("*.py")) + sorted(library.glob("[a-ru-z]*/*.py"))
    text = "\n\n\n".join(path.read_text("utf-8", "ignore") for path in files)
    documents = [part for part in text.split("\n\n\n") if part.strip()]
    random.Random(0).shuffle(documents)
    for k, name in enumerate(names):
        with atomic_write(folder / name) as file:
            pq.write_table(pa.table({"text": documents[k :: len(names)]}), file, row_group_size=256)
    return {name: describe(folder / name) for name in names}


def list_source(source: Path, num_shards: int | None) -> list[str]:
    """Return the names of the user's shards to be used, the validation shard last.

    As in the data set, the last file by name is for validation and the others are for training,
    `num_shards` of them (None: all). ValueError for too few, or for one that cannot be used.
    """
    names = sorted(path.name for path in source.glob("*.parquet") if path.is_file())
    if len(names) < 2:
        what = "files *.parquet; give two or more, the last by name is for validation"
        raise ValueError(f"{source} holds {len(names)} {what}")
    if num_shards is not None and num_shards >= len(names):
        raise ValueError(f"{source} holds {len(names) - 1} training shards, not {num_shards}")
    names = [*names[:-1][:num_shards], names[-1]]
    for name in names:
        if not any(read_documents(source / name)):
            raise ValueError(f"{source / name} has no rows; delete it and run {PREPARE}")
    return names


def read_documents(path: Path) -> Iterator[list[str]]:
    """Yield a shard's documents in order, in lists of up to PACK_BATCH_DOCS of one row group.

    Never holds more of the file than that, whatever the file says of its sizes. ValueError for
    a file that is not parquet, is damaged, or has no column `text` of strings.
    """
    try:
        with pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as shard:
            schema, rows = shard.schema_arrow, 0
            if "text" not in schema.names:
                raise ValueError(f"it has the columns {', '.join(schema.names)[:100] or 'none'}")
            kind = schema.field("text").type
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
                raise ValueError(f"it is of type {kind}, not string")
            leaves = map(shard.schema.column, range(len(shard.schema)))
            place = [leaf.path for leaf in leaves].index("text")
            for group in range(shard.num_row_groups):
                column = shard.metadata.row_group(group).column(place)
                limit = MAX_BATCH_BYTES * max(1, column.num_values / C.PACK_BATCH_DOCS)
                if column.total_uncompressed_size > limit:
                    size = f"{column.total_uncompressed_size:,} bytes"
                    raise ValueError(f"{column.num_values} documents are {size}")
                for batch in shard.iter_batches(
                    C.PACK_BATCH_DOCS, row_groups=[group], columns=["text"], use_threads=False
                ):
                    if batch.nbytes > MAX_BATCH_BYTES:
                        raise ValueError(f"{batch.num_rows} documents are {batch.nbytes:,} bytes")
                    if batch.column(0).null_count:
                        raise ValueError(f"{batch.column(0).null_count} nulls")
                    rows += batch.num_rows
                    yield batch.column(0).to_pylist()
            if rows != shard.metadata.num_rows:
                raise ValueError(f"it says {shard.metadata.num_rows} rows and holds {rows}")
    except (pa.ArrowException, KeyError, OSError, ValueError, MemoryError, OverflowError) as error:
        text = f"{path} holds no good column `text` ({error}); delete it and run {PREPARE}"
        raise ValueError(text) from error


# ---- Tokenizer ----------------------------------------------------------------------------------
def fast_pattern(pattern: str) -> str:
    """Return a split pattern that cuts as C.SPLIT_PATTERN does, and is searched quicker.

    Only the look-ahead needs tiktoken's backtracking engine: what stands before it becomes one
    group for the automaton, 1.3 times the characters a second. The possessive marks can go:
    after `[^\\r\\n\\p{L}\\p{N}]?+` comes `\\p{L}+`, which does not match what the former gives
    back, and after `[^\\s\\p{L}\\p{N}]++` comes `[\\r\\n]*`, which matches always.
    """
    head, ahead, tail = pattern.partition(r"|\s+(?!\S)")
    return f"(?:{head.replace('?+', '?').replace('++', '+')}){ahead}{tail}"


class Tokenizer:
    """Byte-level BPE over tiktoken. Special strings in a text are text, never special tokens."""

    def __init__(self, ranks: dict[bytes, int], pattern: str, special_tokens: list[str]):
        special = {name: len(ranks) + i for i, name in enumerate(special_tokens)}
        self.encoding = tiktoken.Encoding(
            "autoresearch",
            pat_str=fast_pattern(pattern),
            mergeable_ranks=ranks,
            special_tokens=special,
        )
        self.bos_id, self.n_vocab = len(ranks), len(ranks) + len(special)
        # Raw bytes, never the decoded text: a lone piece of a character would count as U+FFFD, 3.
        lengths = [len(token) for token in sorted(ranks, key=ranks.__getitem__)]
        self.token_bytes = np.array(lengths + [0] * len(special), np.int64)

    def encode(self, text: str) -> np.ndarray:
        """Return BOS and the ids of `text`, uint16; ValueError if tiktoken gives up on it."""
        found = self.encoding.encode_to_numpy(text, disallowed_special=())
        ids = np.empty(len(found) + 1, np.uint16)
        ids[0], ids[1:] = self.bos_id, found
        return ids

    @classmethod
    def load(cls, folder: Path) -> "Tokenizer":
        """Read what `ensure_tokenizer` wrote; ValueError says what is wrong with it."""
        try:
            about = json.loads((folder / "tokenizer.json").read_text("utf-8"))
            body = (folder / "ranks.tiktoken").read_bytes()
            made = (hashlib.sha256(body).hexdigest(), about["pattern"], *about["special_tokens"])
            if made != (about["ranks_sha256"], C.SPLIT_PATTERN, *C.SPECIAL_TOKENS):
                raise ValueError("its files are not of one making, or of other rules")
            pairs = (line.split() for line in body.splitlines())
            ranks = {base64.b64decode(token): int(rank) for token, rank in pairs}
            tokenizer = cls(ranks, about["pattern"], about["special_tokens"])
            tokenizer.key, tokenizer.sha256 = about["key"], about["ranks_sha256"]
            return tokenizer
        except (OSError, ValueError, KeyError, TypeError) as error:
            problem = f"the tokenizer in {folder} is missing or damaged ({error})"
            raise ValueError(f"{problem}; run {PREPARE}") from error


def ensure_tokenizer(folder: Path, shards: dict[Path, dict]) -> Tokenizer:
    """Return the tokenizer of `folder`, trained anew if it is not of these shards (with hashes)."""
    shards = dict(itertools.islice(shards.items(), C.TOKENIZER_SHARDS))
    rules = (C.SPLIT_PATTERN, C.SPECIAL_TOKENS, C.VOCAB_SIZE, C.TOKENIZER_CHARS)
    hashes = [about["sha256"] for about in shards.values()]
    key = content_key(*rules, C.TOKENIZER_DOC_CHARS, hashes)
    try:
        if (tokenizer := Tokenizer.load(folder)).key == key:
            return tokenizer
        print("tokenizer: of other shards or rules, it is trained anew", flush=True)
    except ValueError as error:
        if folder.exists():
            print(str(error).replace(f"run {PREPARE}", "it is trained anew"), flush=True)
    chars, progress = 0, Progress("tokenizer", " characters", C.TOKENIZER_CHARS)

    def texts() -> Iterator[str]:
        nonlocal chars
        for batch in itertools.chain.from_iterable(map(read_documents, shards)):
            before = chars
            for text in batch:
                chars += len(text[: C.TOKENIZER_DOC_CHARS])
                yield text[: C.TOKENIZER_DOC_CHARS]
                if chars >= C.TOKENIZER_CHARS:
                    return
            progress.add(chars - before)

    bpe, n_ranks = rustbpe.Tokenizer(), C.VOCAB_SIZE - len(C.SPECIAL_TOKENS)
    train = partial(bpe.train_from_iterator, texts(), n_ranks, pattern=C.SPLIT_PATTERN)
    run_jobs({"": train}, 1, progress)  # on a thread, so that Ctrl-C need not wait for the merges
    ranks = sorted((rank, bytes(token)) for token, rank in bpe.get_mergeable_ranks())
    if len(ranks) != n_ranks:
        raise ValueError(f"{chars:,} characters give {len(ranks)} of {n_ranks} tokens; use more")
    body = b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in ranks)
    sha256 = hashlib.sha256(body).hexdigest()
    about = {"pattern": C.SPLIT_PATTERN, "special_tokens": C.SPECIAL_TOKENS, "key": key}
    with atomic_write(folder / "ranks.tiktoken") as file:
        file.write(body)
    with atomic_write(folder / "tokenizer.json") as file:
        file.write(json.dumps(about | {"ranks_sha256": sha256}, indent=1).encode())
    text = f"trained on {chars:,} characters, of {C.TOKENIZER_CHARS:,} wanted"
    print(f"tokenizer: {text}, {time.monotonic() - progress.started_at:.1f} s", flush=True)
    return Tokenizer.load(folder)


# ---- Rows ---------------------------------------------------------------------------------------
def pack_rows(batches: Iterable[list[np.ndarray]], capacity: int) -> Iterator[np.ndarray]:
    """Pack documents into rows of exactly `capacity` ids, without padding.

    batches: lists of documents, each an array that opens with BOS. Before every placement the
    buffer is refilled to PACK_BUFFER_DOCS; the longest document that fits is placed, or else the
    shortest, cropped; of equals the earliest. Yields one array each time. Source: arXiv:2404.10830.
    """
    source, arrivals = iter(batches), itertools.count()
    documents: dict[int, np.ndarray] = {}  # arrival -> ids
    sizes: list[tuple[int, int]] = []  # (length, -arrival), sorted: of equals the last came first
    row, filled = np.empty(capacity, np.uint16), 0
    while True:
        while len(sizes) < C.PACK_BUFFER_DOCS and (batch := next(source, None)) is not None:
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
    names = {row_name(name, about, tokenizer.sha256): name for name, about in shards.items()}
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
            build_rows, shard, folder / "rows" / name, tokenizer, n_rows, progress=documents
        )
    if known and not known.keys() & names.keys():
        print("rows: of other shards, tokenizer or rules; they are packed anew", flush=True)
    run_jobs(jobs, workers or os.cpu_count(), documents)
    rows |= describe_all(folder / "rows", list(jobs))
    rows = {n: {"split": "val" if n == val else "train", **rows[n]} for n in names}
    tokens = sum(about["size"] // 2 for about in rows.values() if about["split"] == "train")
    if tokens == 0:
        raise ValueError(f"the training shards in {place} do not fill one row")
    seconds = time.monotonic() - documents.started_at
    text = f"{tokens / 1e6:.1f} M training tokens in {len(rows) - 1} files"
    print(f"rows: {text}, {len(jobs)} packed in {seconds:.1f} s", flush=True)
    return rows


# ---- All of it ----------------------------------------------------------------------------------
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
            print(f"shards: those of {source}; --source hub goes back to the hub's", flush=True)
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
        rows = ensure_rows(folder, place, shards, tokenizer, manifest.get("rows", {}), workers)
        about = {"rules": C.DATA_RULES, "revision": revision, "tokenizer": tokenizer.sha256}
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
            problems.append(f"the tokenizer in {folder / 'tokenizer'} is not that of the rows")
    except ValueError as error:
        problems.append(str(error))
    names = {row_name(*shard, manifest["tokenizer"]) for shard in manifest["shards"].items()}
    if names != set(manifest["rows"]):
        problems.append(f"the rows in {folder / 'rows'} are not of these shards and rules")
    return problems


def explain(error: Exception) -> str:
    """Return what an error says and, for one of the operating system, what to do about it."""
    if (number := getattr(error, "errno", None)) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        advice = "free some space or move AUTORESEARCH_CACHE"
    elif number in (errno.EROFS, errno.EACCES, errno.EPERM):
        advice = "make it writable or set AUTORESEARCH_CACHE to a folder that is"
    else:
        return str(error)
    return f"{error}; {advice}, and run {PREPARE} again: it goes on where it stopped"


def main(argv: list[str] | None = None) -> None:
    last, folder = C.VAL_SHARD, data_dir()
    parser = argparse.ArgumentParser(description="Download, tokenize and pack the data, once.")
    add = parser.add_argument
    text = "training shards, -1 for all (default: as many as before, at first "
    text += f"{C.DEFAULT_NUM_SHARDS}, or all of --source)"
    add("--num-shards", type=int, help=text)
    text = "shards to fetch side by side (default %(default)s)"
    add("--download-workers", type=int, default=DOWNLOADS, help=text)
    text = "a folder of your own shards, or `hub` (default: as prepared before, hub at first)"
    add("--source", metavar="DIR", help=text)
    add("--check", action="store_true", help="verify everything that is prepared; change nothing")
    args = parser.parse_args(argv)
    if args.num_shards not in (None, -1, *range(1, last + 1)):
        parser.error(f"--num-shards is 1 to {last}, or -1 for all")
    if not 1 <= args.download_workers <= 64:
        parser.error("--download-workers is 1 to 64")
    if (source := args.source) and source != "hub":
        source = str(Path(source).expanduser().absolute())
    try:
        if args.check:
            if problems := check(folder):
                print("\n".join(problems), flush=True)
                sys.exit(f"prepare.py: {len(problems)} damaged; run {PREPARE} to mend them")
            print(f"all is well in {folder}", flush=True)
            return
        prepare(folder, args.num_shards, None, args.download_workers, source)
        try:
            if not C.SMOKE:
                load_flash_attention()
        except RuntimeError as error:
            print(f"attention: FlashAttention-3 was not fetched here; {error}")
    except (OSError, ValueError) as error:
        sys.exit(f"prepare.py: {explain(error)}")
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # one is enough
        remove_temporaries(folder, os.getpid())
        print(f"\nprepare.py: interrupted; run {PREPARE} again, it goes on", file=sys.stderr)
        sys.stderr.flush()
        os._exit(130)  # threads in a library's code or on a stalled server are not waited for
    print("prepared", flush=True)


def load_flash_attention() -> Callable[..., torch.Tensor]:
    """Return FlashAttention-3's `flash_attn_func(q, k, v, causal=, window_size=)`.

    All are (B, T, H, D) in bf16; RuntimeError says why it cannot be had. Source: arXiv:2407.08608.
    """
    if (capability := gpu.compute_capability())[0] != 8 and capability != (9, 0):
        raise RuntimeError("FlashAttention-3 needs a GPU of compute capability 8.x or 9.0")
    pin = data_dir() / "flash_attention.txt"  # where the build lies that prepare.py fetched
    try:
        from kernels import get_kernel, get_local_kernel  # here: the import takes a second

        build = Path(pin.read_text("utf-8")) if pin.is_file() else pin
        if build.is_dir():
            module = get_local_kernel(build)  # asks nobody
        else:
            module = get_kernel(C.FLASH_ATTENTION_REPO, version=C.FLASH_ATTENTION_VERSION)
            if file := getattr(module, "__file__", None):
                with suppress(OSError), atomic_write(pin) as out:  # not a cache that is read-only
                    out.write(str(Path(file).parent).encode())
        return getattr(module, "flash_attn_interface", module).flash_attn_func
    except Exception as error:  # of five libraries; FlexAttention serves whatever went wrong
        text = f"{C.FLASH_ATTENTION_REPO} could not be loaded ({type(error).__name__}: {error})"
        raise RuntimeError(text.splitlines()[0]) from error


# ---- Run-time: clock ----------------------------------------------------------------------------
class Clock:
    """Counts the time budget, in seconds, by what the device has finished; the host runs ahead."""

    MAX_AHEAD = 2  # steps that the host may have queued: enough to hide launches, and no more

    def __init__(self, budget: float, now: Callable[[], float] = time.perf_counter):
        self.budget, self.now, self.running = budget, now, False
        self.started_at: float | None = None
        self.seconds = 0.0  # from the start to the end of the last finished step
        self.durations: deque[float] = deque(maxlen=8)  # of the last steps, to judge the next by
        self.queued: deque = deque()  # (CUDA event at its end, None on a CPU; step)

    def start(self) -> None:
        self.started_at, self.running = self.now(), True

    def settle(self, ahead: int) -> Iterator["Step"]:
        """Wait until at most `ahead` steps are unfinished; yield the finished ones, timed."""
        while len(self.queued) > ahead:
            event, step = self.queued.popleft()
            if event is not None:
                event.synchronize()
            end = self.now() - self.started_at
            step.seconds, self.seconds = end - self.seconds, end
            self.durations.append(step.seconds)
            yield step

    def next_start(self) -> float:
        """Return the seconds after the start at which the device will begin the next step."""
        mean = sum(self.durations) / max(len(self.durations), 1)
        return self.seconds + len(self.queued) * mean

    def fits(self) -> bool:
        """Return whether one more step, as slow as the slowest of late, ends within the budget."""
        return self.next_start() + max(self.durations, default=0.0) <= self.budget


# ---- Run-time: loader ---------------------------------------------------------------------------
class Rows:
    """The rows of several files as one read-only array of ids, memory-mapped."""

    def __init__(self, paths: list[Path]):
        maps = (np.memmap(path, "<u2", "r") for path in paths if path.stat().st_size)
        self.files = [np.asarray(ids).reshape(-1, C.MAX_SEQ_LEN + 1) for ids in maps]
        self.ends, self.reads = [*itertools.accumulate(map(len, self.files))], 0

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> np.ndarray:
        self.reads += 1
        k = bisect_right(self.ends, index)
        return self.files[k][index - self.ends[k]]  # negative: counted from the file's end


def load_batches(rows: Rows, batch_size: int, device: torch.device) -> Iterator[Batch]:
    """Yield batches x, y of shape (B, T), int64, on the device, y being x shifted by one.

    Rows come as they lie, then epoch by epoch in a new permutation. On a GPU, one batch is copied
    on its own stream while another is used; the events that guard both are torch's allocators'.
    """
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    orders = (np.random.default_rng(n).permutation(len(rows)) for n in itertools.count(2))
    order = itertools.chain(range(len(rows)), itertools.chain.from_iterable(orders))

    def read() -> torch.Tensor:
        batch = np.stack([rows[i] for i in itertools.islice(order, batch_size)])
        ids = torch.from_numpy(batch.view(np.int16))  # holds every id; uint16 has few operations
        with torch.cuda.stream(stream):
            return ids if stream is None else ids.pin_memory().to(device, non_blocking=True)

    def hand_out(ids: torch.Tensor) -> Iterator[Batch]:
        while True:
            if stream is not None:
                torch.cuda.current_stream().wait_stream(stream)
                ids.record_stream(torch.cuda.current_stream())
            now, ids = ids.long(), read()
            yield now[:, :-1].contiguous(), now[:, 1:].contiguous()

    return hand_out(read())  # the first read is done when the clock starts


# ---- Run-time: evaluation -----------------------------------------------------------------------
def bits_per_byte(nats: float, nbytes: int) -> float:
    """Return cross-entropy in bits for each byte of text. Source: arXiv:2101.00027, section 3.1."""
    return nats / (math.log(2) * nbytes)


def call_model(model: Model, idx: torch.Tensor) -> torch.Tensor:
    """Return model(idx); RuntimeError if it is not logits of shape (B, T, V)."""
    logits, expected = model(idx), (*idx.shape, C.VOCAB_SIZE)
    tensor = isinstance(logits, torch.Tensor)
    if not tensor or logits.shape != expected or not logits.is_floating_point():
        got = f"{tuple(logits.shape)} {logits.dtype}" if tensor else type(logits).__name__
        raise RuntimeError(f"evaluation refused: model(idx) gave {got}, not logits {expected}")
    return logits


def refuse_unless_finite(total: float | torch.Tensor) -> None:
    """Refuse, by RuntimeError, logits whose sum is not finite."""
    if not math.isfinite(total):
        raise RuntimeError("evaluation refused: the model gave logits that are not finite")


def refuse_if_moved(a: torch.Tensor, b: torch.Tensor, what: str = RANDOM) -> None:
    """Refuse, by RuntimeError, logits `b` that are not `a` again up to rounding."""
    moved = [float((p.float() - q.float()).abs().max()) for p, q in zip(a, b, strict=True)]
    if max(moved, default=0.0) > C.LOGIT_TOLERANCE:
        raise RuntimeError(f"evaluation refused: the model {what}; moved {max(moved):.3g}")


@torch.no_grad()
def check_model(model: Model, idx: torch.Tensor) -> torch.Tensor:
    """Refuse, by RuntimeError, a model that keeps state, sees the future or mixes rows.

    After each of several cuts the ids of every second row are replaced: logits before the cut
    and in the other rows must stay; the last position before it shows a shift. Returns logits.
    """
    T, generator = idx.shape[1], torch.Generator(idx.device).manual_seed(0)
    base = call_model(model, idx).clone()  # a captured graph would write over it
    refuse_unless_finite(base.sum(dtype=torch.float32))
    refuse_if_moved(base, call_model(model, idx))
    for cut in (1, T // 3, T // 2, T - 1):
        changed = idx.clone()
        part = changed[::2, cut:]
        shift = torch.randint(1, C.VOCAB_SIZE, part.shape, generator=generator, device=idx.device)
        part.copy_((part + shift) % C.VOCAB_SIZE)  # never the same id
        logits = call_model(model, changed)
        refuse_if_moved(base[::2, :cut], logits[::2, :cut], f"sees the future from {cut} on")
        refuse_if_moved(base[1::2], logits[1::2], "mixes rows")
        del logits  # gigabytes, which the next call can use
    return base[:8].clone()  # not a view: the whole is gigabytes


@torch.no_grad()
def evaluate_bpb(model: Model, rows: torch.Tensor, sizes: torch.Tensor, batch_size: int) -> float:
    """Return the bits per byte of `model` over all of `rows`, whatever the batch size.

    rows: ids (R, T + 1); sizes: bytes of each token, (V,), 0 for special ones, which do not
    count. Cross-entropy is computed here, in float32. RuntimeError for a refused model.
    """
    # Nats, bytes, logits: read once at the end, so that the device never waits for the host.
    sums = torch.zeros(3, dtype=torch.float64, device=rows.device)
    base = check_model(model, first := rows[:batch_size, :-1].long().contiguous())
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size].long()
        n = len(batch)
        # Every call has one shape; the rows that fill the last one up are not counted.
        idx = torch.cat([batch, batch[:1].expand(batch_size - n, -1)])[:, :-1].contiguous()
        logits = call_model(model, idx)[:n]
        sums[2] += logits.sum(dtype=torch.float32)
        for part, ids in zip(logits.split(8), batch.split(8), strict=True):
            part, y = part.float().flatten(0, 1), ids[:, 1:].flatten()  # (b * T, V), (b * T,)
            loss = F.cross_entropy(part, y, reduction="none").double() * (sizes[y] > 0)
            sums[:2] += torch.stack([loss.sum(), sizes[y].sum()])
        del logits, part, loss  # as above
    refuse_unless_finite(sums[2])
    refuse_if_moved(base, call_model(model, first)[: len(base)])  # shows a slow drift
    return bits_per_byte(float(sums[0]), int(sums[1]))


# ---- Run-time: the run --------------------------------------------------------------------------
@dataclass
class Step:
    """One optimizer step: what the loop needs for it, and what is known when it is done."""

    number: int
    progress: float  # share of the time budget gone when the device begins it, 0 to 1
    epoch: int  # 1 is the first
    batches: Iterator[Batch] = iter(())  # one for each micro-step
    loss: torch.Tensor | float | None = None  # set by the loop: mean over all micro-steps, nats
    lrm: float = 1.0  # set by the loop, for its step line
    tokens: int = 0
    seconds: float = 0.0


class Run:
    """One experiment under the rules, on what `prepare` wrote; ValueError says what is amiss."""

    def __init__(self, folder: Path, device: torch.device):
        self.opened_at, self.device, self.commit = time.perf_counter(), device, git_commit()
        manifest, path = load_manifest(folder), folder / "manifest.json"
        if manifest.get("rules") != C.DATA_RULES:
            raise ValueError(f"{path} is missing, damaged or of other rules; run {PREPARE}")
        self.tokenizer = Tokenizer.load(folder / "tokenizer")
        if manifest.get("tokenizer") != self.tokenizer.sha256:
            raise ValueError(f"the rows in {folder} are of another tokenizer; run {PREPARE}")
        fixed = ("constants.py", "prepare.py", "download.py", "gpu.py", "attention.py")
        hashes = [*(describe(Path(__file__).with_name(name)) for name in fixed)]
        hashes.append(self.tokenizer.sha256)
        paths: dict[str, list[Path]] = {"train": [], "val": []}
        for name, entry in manifest["rows"].items():
            path = folder / "rows" / name
            paths[entry["split"]].append(path)
            if not path.is_file() or path.stat().st_size != entry["size"]:
                raise ValueError(f"{path} is missing or cut short; run {PREPARE}")
            if entry["split"] == "val":
                if describe(path)["sha256"] != entry["sha256"]:
                    raise ValueError(f"{path} is damaged: its bytes changed; run {PREPARE}")
                hashes.append(entry["sha256"])
        own = {"SEED", "SAVE", "STARTED_AT"}  # not rules, but of this run alone
        values = {k: vars(C)[k] for k in dir(C) if k.isupper() and k not in own}
        self.rules = f"{'smoke' if C.SMOKE else 'full'}-{content_key(*hashes, values)[:8]}"
        self.train_rows, self.val_rows = Rows(paths["train"]), Rows(paths["val"])
        self.epoch_tokens = len(self.train_rows) * C.MAX_SEQ_LEN
        self.clock, self.seed, self.cuda = Clock(C.TIME_BUDGET), C.SEED, device.type == "cuda"
        self.tokens, self.num_steps, self.batch_size, self.val_bpb = 0, 0, 0, math.nan
        self.evaluated = self.printed = False
        self.finished: deque[Step] = deque()  # steps that the device is through with, for the log
        self.random_ids = torch.Generator(device).manual_seed(C.SEED)
        torch.manual_seed(C.SEED)
        self.import_seconds = self.opened_at - C.STARTED_AT
        self.open_seconds = time.perf_counter() - self.opened_at
        self.waits: list[tuple] = []  # gpu.mark before and after each batch
        self.watch = gpu.Watch(device)

    def random_batch(self, batch_size: int) -> Batch:
        """Return random ids for warm-up; torch's own generator is left alone."""
        shape = (batch_size, C.MAX_SEQ_LEN + 1)
        ids = torch.randint(C.VOCAB_SIZE, shape, generator=self.random_ids, device=self.device)
        return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    def steps(self, batch_size: int, grad_accum_steps: int) -> Iterator[Step]:
        """Start the clock, which can be done once, and yield steps while it runs.

        A step holds `grad_accum_steps` batches of `batch_size` rows, to be used before the next
        is asked for; the loop sets its loss. RuntimeError for a late start or a loss not finite.
        """
        if self.clock.started_at is not None:
            raise RuntimeError("the clock has been started; one run trains once")
        if torch.initial_seed() != self.seed:
            raise RuntimeError("train.py set a seed; it comes from the rules (AUTORESEARCH_SEED)")
        batches = load_batches(self.train_rows, batch_size, self.device)
        self.watch.look()
        if (waited := time.perf_counter() - self.opened_at) > C.STARTUP_LIMIT:
            raise RuntimeError(f"start-up took {waited:.0f} of {C.STARTUP_LIMIT} s; compile less")
        self.startup_seconds = time.perf_counter() - C.STARTED_AT
        self.compile_seconds = self.startup_seconds - self.import_seconds - self.open_seconds
        self.batch_size = batch_size
        self.clock.start()
        return self._steps(batches, batch_size * C.MAX_SEQ_LEN, grad_accum_steps)

    def _steps(self, batches: Iterator[Batch], tokens: int, count: int) -> Iterator[Step]:
        while self.clock.fits():
            progress = min(self.clock.next_start() / self.clock.budget, 1.0)
            step = Step(self.num_steps, progress, self.tokens // self.epoch_tokens + 1)
            step.batches = self._batches(step, batches, tokens, count)
            yield step
            if step.loss is None:
                raise RuntimeError(f"step {step.number} ended without a loss; set step.loss")
            step.loss = torch.as_tensor(step.loss).detach().to("cpu", non_blocking=True)
            event = torch.cuda.current_stream().record_event() if self.cuda else None
            self.num_steps += 1
            self.clock.queued.append((event, step))
            self._settle(Clock.MAX_AHEAD if self.cuda else 0)
        self._settle(0)
        if self.cuda:
            torch.cuda.synchronize(self.device)  # what ran beside the steps counts as well
            self.clock.seconds = self.clock.now() - self.clock.started_at
        self.clock.running = False
        if (late := self.clock.seconds - C.TIME_BUDGET) > C.TIME_BUDGET * C.OVERRUN_TOLERANCE:
            raise RuntimeError(f"the last step ended {late:.1f} s late; the run is void, repeat it")

    def _batches(self, step: Step, batches: Iterator, tokens: int, count: int) -> Iterator[Batch]:
        for _ in range(count):
            if self.num_steps != step.number or not self.clock.running:
                raise RuntimeError(f"step {step.number} is over; its batches cannot be had now")
            step.tokens += tokens
            self.tokens += tokens
            start, batch = gpu.mark(self.device), next(batches)
            self.waits.append((start, gpu.mark(self.device)))
            yield batch

    def _settle(self, ahead: int) -> None:
        for step in self.clock.settle(ahead):
            step.loss = float(step.loss)
            if not math.isfinite(step.loss):
                what = f"training loss is {step.loss} at step {step.number} (lrm {step.lrm:.2f})"
                raise RuntimeError(f"{what}; the run is void, lower a learning rate or revert")
            self.finished.append(step)

    def evaluate(self, model: Model) -> float:
        """Measure `model` on the validation rows, see `evaluate_bpb`; training must be over.

        In batches of as many rows as training's, which are compiled, or fewer if they do not fit.
        That is tried on random ids: a model that runs out of memory has not seen the text.
        """
        if self.clock.running or not self.num_steps or self.evaluated:
            raise RuntimeError("evaluate after training, once, and do not break out of run.steps")
        self.evaluated = True  # also if the model is refused: it has seen validation text
        sizes = torch.from_numpy(self.tokenizer.token_bytes).to(self.device)  # waits for the GPU
        late = self.clock.now() - self.clock.started_at - self.clock.seconds
        extra = self.train_rows.reads + self.val_rows.reads - self.tokens // C.MAX_SEQ_LEN
        if late > C.TIME_BUDGET * C.OVERRUN_TOLERANCE or extra > self.batch_size:  # read ahead
            what = f"{late:.1f} s and {extra - self.batch_size} rows were used outside the clock"
            raise RuntimeError(f"evaluation refused: {what}; the run is void")
        self.watch.look()
        start, ids = time.perf_counter(), np.concatenate(self.val_rows.files).view(np.int16)
        rows = torch.from_numpy(ids).to(self.device)
        batch_size = gpu.find_batch_size(
            lambda size: check_model(model, self.random_batch(size)[0]),
            limit=min(max(self.batch_size, 2), C.EVAL_ROWS),  # two show whether rows are mixed
            row_bytes=3 * 4 * C.MAX_SEQ_LEN * C.VOCAB_SIZE,  # logits in float32, about thrice
            device=self.device,
        )
        self.val_bpb = evaluate_bpb(model, rows, sizes, batch_size)
        self.eval_seconds = time.perf_counter() - start
        return self.val_bpb

    def print_summary(self, num_params: int, depth: int, flops_per_token: float, attention: str):
        """Print the result, once and last of all; RuntimeError if there is none."""
        if not math.isfinite(self.val_bpb) or self.printed:
            raise RuntimeError("there is no result to print; evaluate first, print once")
        self.num_params, self.depth, self.attention = num_params / 1e6, depth, attention
        self.tok_per_sec = self.tokens / self.clock.seconds
        waited = sum(gpu.seconds_between(*wait) for wait in self.waits)
        self.wait_percent = 100 * waited / self.clock.seconds
        self.gpu = torch.cuda.get_device_name(self.device) if self.cuda else "none (cpu)"
        self.tflops = flops_per_token * self.tok_per_sec / 1e12
        self.mfu_percent = 100e12 * self.tflops / gpu.peak_flops(self.gpu)
        self.peak_vram_mb = self.watch.peak_bytes() / 2**20
        self.gpu_health, warnings = self.watch.report()
        self.epochs, self.tokens_M = self.tokens / self.epoch_tokens, self.tokens / 1e6
        self.total_seconds = time.perf_counter() - C.STARTED_AT
        print("\n".join([*warnings, C.SUMMARY.format(run=self)]), flush=True)
        self.printed = True


def git_commit() -> str:
    """Return the short hash of the checkout, `+dirty` when tracked files differ from it."""
    git = f"git -C {shlex.quote(str(Path(__file__).parent))} describe --always --exclude='*'"
    status, text = subprocess.getstatusoutput(f"{git} --dirty=+dirty")
    return "none" if status else text


def open_run(device: torch.device) -> Run:
    """Return the run on prepared data, preparing it first (and saying so) if there is none."""
    if not (data_dir() / "manifest.json").exists():
        print(f"nothing is prepared in {data_dir()}: preparing first", flush=True)
        main([])
    atexit.register(demand_result, run := Run(data_dir(), device))
    sys.excepthook = partial(end_at_once, run)
    return run


def end_at_once(run: Run, kind: type, error: BaseException, trace) -> None:
    """Print an uncaught error, for want of memory in one line, and end the process with status 1.

    At once: torch waits up to 300 s for compile workers that it has only just started.
    """
    if gpu.is_out_of_memory(error):
        print(gpu.explain_memory(run, error), file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)
    sys.stderr.flush()
    demand_result(run)
    os._exit(1)


def demand_result(run: Run) -> None:
    """End the process with status 1, whatever it was to end with, if `run` printed no result."""
    if not run.printed:
        print("prepare.py: the run ended without a result", flush=True)
        os._exit(1)


if __name__ == "__main__":
    main()
