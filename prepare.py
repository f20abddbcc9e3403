"""Data preparation, once, and the fixed run-time of every experiment. Not edited.

Writes below ~/.cache/autoresearch (AUTORESEARCH_CACHE moves it):
    shards/shard_00000.parquet           as the hub serves it, checked against its SHA-256
    tokenizer/ranks.tiktoken             a line a token: its bytes in base64, its rank
    tokenizer/tokenizer.json             split pattern, special tokens, hash of the ranks
    rows/shard_00000.<key>.u16           packed rows of T + 1 ids, uint16, little endian
    manifest.json                        written last: what is there, with sizes and hashes

The run-time half is what measures train.py: class `Run` with loader, clock, evaluation, summary.
"""

import argparse
import base64
import hashlib
import itertools
import json
import math
import os
import random
import shlex
import subprocess
import sys
import sysconfig
import time
from bisect import bisect_left, bisect_right, insort
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import requests
import rustbpe
import tiktoken
import torch
import torch.nn.functional as F

import constants as C

PREPARE = ("AUTORESEARCH_SMOKE=1 " if C.SMOKE else "") + "uv run prepare.py"  # advice in errors
VAL_NAME = C.SHARD_NAME.format(C.VAL_SHARD)
Batch = tuple[torch.Tensor, torch.Tensor]  # x, y: ids (B, T)
Model = Callable[[torch.Tensor], torch.Tensor]  # idx (B, T) -> logits (B, T, V)


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
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        error.filename = error.filename or str(path)  # a full disk does not say where
        raise
    finally:
        temporary.unlink(missing_ok=True)


def describe(path: Path) -> dict:
    """Return {"size": bytes, "sha256": hex} of a file; a missing one is like an empty one."""
    content = path.read_bytes() if path.is_file() else b""
    return {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def content_key(*parts: object) -> str:
    """Return 12 hex digits that change with any of `parts`, which JSON can hold."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]


# ---- Shards -------------------------------------------------------------------------------------
HTTP_TIMEOUT = (10, 60)  # seconds: to connect, between two bytes
DOWNLOADS = 8  # side by side
RETRY_SECONDS = (0, 1, 2, 4, 8)  # waits before the tries for one shard


def persist(action: Callable, *args):
    """Return action(*args), tried again while the network fails; ConnectionError at last."""
    for wait in RETRY_SECONDS:
        time.sleep(wait)
        try:
            return action(*args)
        except (requests.RequestException, ConnectionError, ValueError) as error:
            problem = error
    raise ConnectionError(f"{args[-1]}: {problem}; run {PREPARE} again") from problem


def stat_shard(session: requests.Session, revision: str, name: str) -> tuple[str, str, dict]:
    """Ask the hub about a shard; return its address, commit and {"size": bytes, "sha256": hex}."""
    endpoint = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    url = f"{endpoint}/datasets/{C.DATASET}/resolve/{revision}/{name}"
    answer = session.head(url, allow_redirects=False, timeout=HTTP_TIMEOUT)
    answer.raise_for_status()
    keys = ("X-Repo-Commit", "X-Linked-Size", "X-Linked-Etag")
    commit, size, sha256 = (answer.headers.get(key, "").strip('"') for key in keys)
    if len(sha256) != 64 or not size.isdigit() or not commit:
        raise ValueError(f"{url} was answered without size, SHA-256 and commit: not the hub?")
    return url, commit, {"size": int(size), "sha256": sha256}


def download_shard(session: requests.Session, revision: str, path: Path) -> dict:
    """Have a shard at `path` as the hub has it; return size and SHA-256, or raise OSError."""
    url, _, remote = stat_shard(session, revision, path.name)
    if describe(path) != remote:
        get = session.get(url, stream=True, timeout=HTTP_TIMEOUT)
        with get as answer, atomic_write(path) as file:
            answer.raise_for_status()
            file.writelines(answer.iter_content(1 << 20))
            file.flush()
            if describe(Path(file.name)) != remote:
                raise ConnectionError(f"{file.tell()} of {remote['size']} bytes, or wrong ones")
        print(f"  {path.name} {remote['size'] / 1e6:.0f} MB\n", end="", flush=True)
    return remote


def ensure_shards(folder: Path, names: list[str], manifest: dict) -> tuple[str, dict[str, dict]]:
    """Have shards in `folder`, or raise ConnectionError; return the commit, size + SHA-256 each."""
    known, revision = manifest.get("shards", {}), manifest.get("revision", C.REVISION)
    shards = {n: known[n] for n in names if n in known and describe(folder / n) == known[n]}
    session, missing = requests.Session(), [name for name in names if name not in shards]
    if token := os.environ.get("HF_TOKEN"):
        session.headers["Authorization"] = f"Bearer {token}"  # requests drops it on a new host
    if missing:
        _, revision, _ = persist(stat_shard, session, revision, missing[0])
        print(f"shards: fetching {len(missing)} of {C.DATASET} at {revision}", flush=True)
    with ThreadPoolExecutor(DOWNLOADS) as pool:
        get = (persist, download_shard, session, revision)
        jobs = {name: pool.submit(*get, folder / name) for name in missing}
    if problems := [str(job.exception()) for job in jobs.values() if job.exception()]:
        raise ConnectionError(f"{len(problems)} shards are missing: " + "; ".join(problems))
    shards |= {name: job.result() for name, job in jobs.items()}
    return revision, {name: shards[name] for name in names}


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


def read_documents(path: Path) -> Iterator[list[str]]:
    """Yield a shard's documents in order, in lists of up to PACK_BATCH_DOCS of one row group."""
    try:
        with pq.ParquetFile(path) as shard:
            for group in range(shard.num_row_groups):
                column = shard.read_row_group(group, columns=["text"]).column("text")
                texts = column.to_pylist()
                if not all(isinstance(text, str) for text in texts):
                    raise ValueError(f"of type {column.type} with {column.null_count} nulls")
                for start in range(0, len(texts), C.PACK_BATCH_DOCS):
                    yield texts[start : start + C.PACK_BATCH_DOCS]
    except (pa.ArrowException, KeyError, OSError, ValueError) as error:
        text = f"{path} holds no column `text` ({error}); delete it and run {PREPARE}"
        raise ValueError(text) from error


# ---- Tokenizer ----------------------------------------------------------------------------------
class Tokenizer:
    """Byte-level BPE over tiktoken. Special strings in a text are text, never special tokens."""

    def __init__(self, ranks: dict[bytes, int], pattern: str, special_tokens: list[str]):
        special = {name: len(ranks) + i for i, name in enumerate(special_tokens)}
        self.encoding = tiktoken.Encoding(
            "autoresearch", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special
        )
        self.bos_id, self.n_vocab = len(ranks), len(ranks) + len(special)
        # Raw bytes, never the decoded text: a lone piece of a character would count as U+FFFD, 3.
        lengths = [len(token) for token in sorted(ranks, key=ranks.__getitem__)]
        self.token_bytes = np.array(lengths + [0] * len(special), np.int64)

    def encode(self, text: str) -> np.ndarray:
        """Return BOS and the ids of `text`, uint16."""
        ids = self.encoding.encode_to_numpy(text, disallowed_special=())
        return np.concatenate(([self.bos_id], ids)).astype(np.uint16)

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
    hashes = [about["sha256"] for about in shards.values()]
    key = content_key(C.SPLIT_PATTERN, C.SPECIAL_TOKENS, C.VOCAB_SIZE, C.TOKENIZER_CHARS, hashes)
    try:
        if (tokenizer := Tokenizer.load(folder)).key == key:
            return tokenizer
    except ValueError:
        pass  # there is none, or it is damaged: it is made anew
    chars, start = 0, time.perf_counter()

    def texts() -> Iterator[str]:
        nonlocal chars
        for text in itertools.chain.from_iterable(itertools.chain(*map(read_documents, shards))):
            chars += len(text[: C.TOKENIZER_DOC_CHARS])
            yield text[: C.TOKENIZER_DOC_CHARS]
            if chars >= C.TOKENIZER_CHARS:
                return

    bpe, n_ranks = rustbpe.Tokenizer(), C.VOCAB_SIZE - len(C.SPECIAL_TOKENS)
    bpe.train_from_iterator(texts(), n_ranks, pattern=C.SPLIT_PATTERN)
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
    print(f"tokenizer: {text}, {time.perf_counter() - start:.1f} s", flush=True)
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


def build_rows(shard: Path, out: Path, tokenizer: Tokenizer, n_rows: int | None = None) -> None:
    """Tokenize and pack one shard, on its own, to a row file; ValueError if it has no document.

    n_rows: stop after so many, starting the shard over when it runs out; None: once through.
    """
    if not any(read_documents(shard)):
        raise ValueError(f"{shard} holds no document; delete it and run {PREPARE}")
    passes = itertools.repeat(shard) if n_rows else [shard]
    texts = itertools.chain.from_iterable(map(read_documents, passes))
    batches = ([tokenizer.encode(text) for text in batch] for batch in texts)
    with atomic_write(out) as file:
        for row in itertools.islice(pack_rows(batches, C.MAX_SEQ_LEN + 1), n_rows):
            file.write(row.astype("<u2").tobytes())


def ensure_rows(folder: Path, shards: dict, tokenizer: Tokenizer, known: dict, workers: int):
    """Have the row file of every shard; return file name -> split, size and SHA-256.

    A name carries the key of all it depends on: a file is right unless `known` tells otherwise.
    """

    def ensure(name: str) -> tuple[str, dict]:
        split = "val" if name == VAL_NAME else "train"
        key = content_key(C.DATA_RULES, shards[name]["sha256"], tokenizer.sha256)
        path = folder / "rows" / f"{Path(name).stem}.{key}.u16"
        about = {"split": split, **describe(path)}
        if not path.is_file() or about != known.get(path.name, about):
            n_rows = C.EVAL_TOKENS // C.MAX_SEQ_LEN if split == "val" else None
            build_rows(folder / "shards" / name, path, tokenizer, n_rows)
            about |= describe(path)
            print(f"  {path.name} {about['size'] / 2e6:.1f} M tokens\n", end="", flush=True)
        return path.name, about

    start = time.perf_counter()
    with ThreadPoolExecutor(workers) as pool:  # tiktoken and Arrow release the interpreter's lock
        rows = dict(pool.map(ensure, shards))
    tokens = sum(about["size"] // 2 for about in rows.values() if about["split"] == "train")
    if tokens == 0:
        raise ValueError(f"the training shards in {folder / 'shards'} do not fill one row")
    print(f"rows: {tokens / 1e6:.1f} M training tokens, {time.perf_counter() - start:.1f} s")
    return rows


def load_manifest(folder: Path) -> dict:
    """Return the manifest of `folder`, or {} if there is none that can be read."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
        good = all({"split", "size", "sha256"} <= {*entry} for entry in manifest["rows"].values())
        return manifest if good and isinstance(manifest["shards"], dict) else {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def prepare(folder: Path, num_shards: int, workers: int | None = None) -> None:
    """Bring `folder` to the state that the rules and `num_shards` training shards ask for."""
    print(f"preparing {folder}", flush=True)
    manifest = load_manifest(folder)
    names = [*map(C.SHARD_NAME.format, range(num_shards)), VAL_NAME]
    if C.SMOKE:
        revision = f"library of Python {sys.version.split()[0]}"
        shards = write_smoke_shards(folder / "shards", names)
    else:
        revision, shards = ensure_shards(folder / "shards", names, manifest)
    train = {folder / "shards" / name: shards[name] for name in names if name != VAL_NAME}
    tokenizer = ensure_tokenizer(folder / "tokenizer", train)
    rows = ensure_rows(folder, shards, tokenizer, manifest.get("rows", {}), workers)
    about = {"rules": C.DATA_RULES, "revision": revision, "tokenizer": tokenizer.sha256}
    with atomic_write(folder / "manifest.json") as file:
        file.write(json.dumps(about | {"shards": shards, "rows": rows}, indent=1).encode())
    for path in (folder / "rows").iterdir():  # of other shards, tokenizers or rules
        if path.name not in rows:
            path.unlink()


def main(argv: list[str] | None = None) -> None:
    last, text = C.VAL_SHARD, "training shards, -1 for all (default %(default)s)"
    parser = argparse.ArgumentParser(description="Download, tokenize and pack the data, once.")
    parser.add_argument("--num-shards", type=int, default=C.DEFAULT_NUM_SHARDS, help=text)
    num_shards = parser.parse_args(argv).num_shards
    num_shards = last if num_shards == -1 else num_shards
    if not 1 <= num_shards <= last:
        parser.error(f"--num-shards is 1 to {last}, or -1 for all")
    try:
        prepare(data_dir(), num_shards)
    except (OSError, ValueError) as error:
        sys.exit(f"prepare.py: {error}")
    try:
        if not C.SMOKE:
            load_flash_attention()
    except RuntimeError as error:
        print(f"attention: FlashAttention-3 was not fetched here; {error}")
    print("prepared", flush=True)


def load_flash_attention() -> Callable[..., torch.Tensor]:
    """Return FlashAttention-3's `flash_attn_func(q, k, v, causal=, window_size=)`.

    All are (B, T, H, D) in bf16; RuntimeError says why it cannot be had. Source: arXiv:2407.08608.
    """
    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)
    if capability[0] != 8 and capability != (9, 0):
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
                with atomic_write(pin) as out:
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
        self.ends = [*itertools.accumulate(map(len, self.files))]

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> np.ndarray:
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
            ahead, ids = read(), ids.long()
            yield ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
            ids = ahead

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


def check_model(model: Model, idx: torch.Tensor) -> None:
    """Refuse, by RuntimeError, a model that keeps state, sees the future or mixes rows.

    After each of several cuts the ids of every second row are replaced: logits before the cut
    and in the other rows must stay; the last position before it shows a shift.
    """

    def refuse_if_moved(what: str, a: torch.Tensor, b: torch.Tensor) -> None:
        moved = [float((p.float() - q.float()).abs().max()) for p, q in zip(a, b, strict=True)]
        if max(moved, default=0.0) > C.LOGIT_TOLERANCE:
            raise RuntimeError(f"evaluation refused: the model {what}; moved {max(moved):.3g}")

    T, generator = idx.shape[1], torch.Generator(idx.device).manual_seed(0)
    base = call_model(model, idx).clone()  # a captured graph would write over it
    refuse_unless_finite(base.sum(dtype=torch.float32))
    state = "keeps state between calls or is random (dropout: call model.eval())"
    refuse_if_moved(state, base, call_model(model, idx))
    for cut in (1, T // 3, T // 2, T - 1):
        changed = idx.clone()
        part = changed[::2, cut:]
        shift = torch.randint(1, C.VOCAB_SIZE, part.shape, generator=generator, device=idx.device)
        part.copy_((part + shift) % C.VOCAB_SIZE)  # never the same id
        logits = call_model(model, changed)
        refuse_if_moved(f"sees the future from {cut} on", base[::2, :cut], logits[::2, :cut])
        refuse_if_moved("mixes rows", base[1::2], logits[1::2])


@torch.no_grad()
def evaluate_bpb(model: Model, rows: torch.Tensor, sizes: torch.Tensor, batch_size: int) -> float:
    """Return the bits per byte of `model` over all of `rows`, whatever the batch size.

    rows: ids (R, T + 1); sizes: bytes of each token, (V,), 0 for special ones, which do not
    count. Cross-entropy is computed here, in float32. RuntimeError for a refused model.
    """
    # Nats, bytes, logits: read once at the end, so that the device never waits for the host.
    sums = torch.zeros(3, dtype=torch.float64, device=rows.device)
    check_model(model, rows[:batch_size, :-1].long().contiguous())
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
    refuse_unless_finite(sums[2])
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
        hashes = [describe(Path(C.__file__)), describe(Path(__file__)), self.tokenizer.sha256]
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
        self.rules = f"{'smoke' if C.SMOKE else 'full'}-{content_key(*hashes)[:8]}"
        self.train_rows, self.val_rows = Rows(paths["train"]), Rows(paths["val"])
        self.epoch_tokens = len(self.train_rows) * C.MAX_SEQ_LEN
        self.clock, self.seed, self.cuda = Clock(C.TIME_BUDGET), C.SEED, device.type == "cuda"
        self.tokens, self.num_steps, self.val_bpb = 0, 0, math.nan
        self.finished: deque[Step] = deque()  # steps that the device is through with, for the log
        self.random_ids = torch.Generator(device).manual_seed(C.SEED)
        torch.manual_seed(C.SEED)
        self.import_seconds = self.opened_at - C.STARTED_AT
        self.open_seconds = time.perf_counter() - self.opened_at
        self.waited = 0.0  # seconds that the loop has waited for batches

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
        batches = load_batches(self.train_rows, batch_size, self.device)
        if self.cuda:  # warm-up's work and memory are not the run's
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        if (waited := time.perf_counter() - self.opened_at) > C.STARTUP_LIMIT:
            raise RuntimeError(f"start-up took {waited:.0f} of {C.STARTUP_LIMIT} s; compile less")
        self.startup_seconds = time.perf_counter() - C.STARTED_AT
        self.compile_seconds = self.startup_seconds - self.import_seconds - self.open_seconds
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
        if self.cuda:
            torch.cuda.synchronize(self.device)  # what ran beside the steps counts as well
        self._settle(0)
        self.clock.running = False
        if (late := self.clock.seconds - C.TIME_BUDGET) > C.TIME_BUDGET * C.OVERRUN_TOLERANCE:
            raise RuntimeError(f"the last step ended {late:.1f} s late; the run is void, repeat it")

    def _batches(self, step: Step, batches: Iterator, tokens: int, count: int) -> Iterator[Batch]:
        for _ in range(count):
            if self.num_steps != step.number or not self.clock.running:
                raise RuntimeError(f"step {step.number} is over; its batches cannot be had now")
            step.tokens += tokens
            self.tokens += tokens
            start, batch = time.perf_counter(), next(batches)
            self.waited += time.perf_counter() - start
            yield batch

    def _settle(self, ahead: int) -> None:
        for step in self.clock.settle(ahead):
            step.loss = float(step.loss)
            if not math.isfinite(step.loss):
                what = f"training loss is {step.loss} at step {step.number} (lrm {step.lrm:.2f})"
                raise RuntimeError(f"{what}; the run is void, lower a learning rate or revert")
            self.finished.append(step)

    def evaluate(self, model: Model, batch_size: int) -> float:
        """Measure `model` on the validation rows, see `evaluate_bpb`; training must be over."""
        if self.clock.running or not self.num_steps or math.isfinite(self.val_bpb):
            raise RuntimeError("evaluate after training, once, and do not break out of run.steps")
        start, ids = time.perf_counter(), np.concatenate(self.val_rows.files).view(np.int16)
        sizes = torch.from_numpy(self.tokenizer.token_bytes).to(self.device)
        self.val_bpb = evaluate_bpb(model, torch.from_numpy(ids).to(self.device), sizes, batch_size)
        self.eval_seconds = time.perf_counter() - start
        return self.val_bpb

    def print_summary(self, num_params: int, depth: int, flops_per_token: float, attention: str):
        """Print the result, last of all; RuntimeError if there is none."""
        if not math.isfinite(self.val_bpb):
            raise RuntimeError("there is no result to print; evaluate first")
        self.num_params, self.depth, self.attention = num_params / 1e6, depth, attention
        self.tok_per_sec = self.tokens / self.clock.seconds
        self.wait_percent = 100 * self.waited / self.clock.seconds
        self.gpu = torch.cuda.get_device_name(self.device) if self.cuda else "none (cpu)"
        peak = next((flops for part, flops in C.PEAK_FLOPS.items() if part in self.gpu), math.nan)
        self.mfu_percent = 100 * flops_per_token * self.tok_per_sec / peak
        self.peak_vram_mb = torch.cuda.max_memory_allocated() / 2**20 if self.cuda else 0.0
        self.epochs, self.tokens_M = self.tokens / self.epoch_tokens, self.tokens / 1e6
        self.total_seconds = time.perf_counter() - C.STARTED_AT
        print(C.SUMMARY.format(run=self), flush=True)


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
    return Run(data_dir(), device)


if __name__ == "__main__":
    main()
