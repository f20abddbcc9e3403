"""Time the data path beside what the libraries allow: text, rows, batches, memory.

Usage: python benchmarks/prepare.py [FOLDER OF SHARDS]

Without a folder it writes shards of the Python installation's own source text. Speeds are
characters (or tokens) per second of wall clock, the best of REPEATS where a line says so.
"Alone" is the library on the same text with nothing around it: tiktoken with the split
pattern as it is written, rustbpe on a list of texts in memory. Needs no GPU and leaves
nothing behind.
"""

import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
sys.path.insert(0, str(Path(__file__).parent.parent))

import constants as C  # first: it sets what torch reads

# isort: split
import numpy as np
import pyarrow.parquet as pq
import rustbpe
import tiktoken
import torch

from harness.documents import read_documents, write_smoke_shards
from harness.files import describe
from harness.loader import Rows, load_batches
from harness.packing import build_rows
from harness.tokenizer import Tokenizer, ensure_tokenizer
from literal import pack_by_lengths

REPEATS = 3
# In processes of their own: what a preparation takes at most, and how soon a run has its
# first batch.
PREPARE_AND_WEIGH = r"""
import re, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import prepare  # the command, with all that it imports
def peak():  # of this process; what getrusage says holds that of the one that started it
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024
before = peak()
prepare.prepare(Path(sys.argv[2]), None, 8, source=sys.argv[3])
print(before, peak())
"""
FIRST_BATCH = """
import sys, time
start = time.perf_counter()
sys.path.insert(0, sys.argv[1])
import torch
torch_in = time.perf_counter()
from pathlib import Path
import train
from harness.loader import load_batches
from harness.run import Run
imported = time.perf_counter()
run = Run(Path(sys.argv[2]), torch.device("cpu"))
next(load_batches(run._train_rows, 8, run.device))
print(torch_in - start, imported - torch_in, time.perf_counter() - imported)
"""


def timed(action: Callable, repeats: int = 1) -> float:
    """Return the seconds that the quickest of `repeats` calls took."""
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        action()
        best = min(best, time.perf_counter() - start)
    return best


def report(what: str, value: float, unit: str = "") -> None:
    """Print one line of the result."""
    print(f"{what:56}{value:9.2f} {unit}", flush=True)


def report_text(what: str, chars: int, seconds: float) -> None:
    """Print one line of the result: the speed at which text went through."""
    report(what, chars / seconds / 1e6, "M characters/s")


def run_apart(program: str, *args: object) -> list[float]:
    """Return the numbers on the last line that `program`, Python's text, prints."""
    root = str(Path(__file__).parent.parent)
    command = [sys.executable, "-c", program, root, *map(str, args)]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return [float(word) for word in out.splitlines()[-1].split()]


def time_tokenizer(shards: list[Path], texts: list[list[str]], folder: Path) -> Tokenizer:
    """Time the training, ours and rustbpe's alone; return the tokenizer in `folder`.

    texts: the documents of each shard.
    """
    documents = itertools.chain.from_iterable(texts)
    capped = [text[: C.TOKENIZER_DOC_CHARS] for text in documents]
    chars = sum(map(len, capped))
    n_ranks = C.VOCAB_SIZE - len(C.SPECIAL_TOKENS)
    about = {path: describe(path) for path in shards}

    def alone() -> None:
        bpe = rustbpe.Tokenizer()
        bpe.train_from_iterator(iter(capped), n_ranks, pattern=C.SPLIT_PATTERN)

    def ours() -> None:
        (folder / "tokenizer.json").unlink(missing_ok=True)
        ensure_tokenizer(folder, about)

    alone_seconds = ours_seconds = float("inf")
    for _ in range(REPEATS):  # by turns, so that another load of the machine meets both
        alone_seconds = min(alone_seconds, timed(alone))
        ours_seconds = min(ours_seconds, timed(ours))
    report_text(f"rustbpe alone, all cores (best of {REPEATS})", chars, alone_seconds)
    report_text(f"tokenizer training (best of {REPEATS})", chars, ours_seconds)
    report("  more than rustbpe alone", 100 * (ours_seconds / alone_seconds - 1), "%")
    return Tokenizer.load(folder)


def time_rows(
    shards: list[Path], texts: list[list[str]], outs: list[Path], tokenizer: Tokenizer
) -> None:
    """Time the way from text to rows, leaving them in `outs`, one file per shard."""
    chars = [sum(map(len, text)) for text in texts]
    ranks = tokenizer.encoding._mergeable_ranks
    pattern = C.SPLIT_PATTERN
    plain = tiktoken.Encoding(
        "plain", pat_str=pattern, mergeable_ranks=ranks, special_tokens={}
    )

    def encode(encoding: tiktoken.Encoding) -> None:
        for text in texts[0]:
            encoding.encode_to_numpy(text, disallowed_special=())

    def build() -> None:
        build_rows(shards[0], outs[0], tokenizer)

    def build_all() -> None:
        with ThreadPoolExecutor() as pool:
            jobs = zip(shards, outs, strict=True)
            list(pool.map(lambda job: build_rows(*job, tokenizer), jobs))

    def on_one_core(what: str, action: Callable) -> None:
        seconds = timed(action, REPEATS)
        report_text(f"{what}, one core (best of {REPEATS})", chars[0], seconds)

    on_one_core("tiktoken alone", partial(encode, plain))
    ours = partial(encode, tokenizer.encoding)
    on_one_core("tiktoken alone, our search for the cuts", ours)
    on_one_core("text to rows", build)
    report_text("text to rows, all cores", sum(chars), timed(build_all))
    tokens = sum(len(tokenizer.encode(text)) for text in texts[0])
    kept = outs[0].stat().st_size / 2 / tokens
    report("characters per token, first shard", chars[0] / tokens)
    report("tokens that packing keeps, first shard", 100 * kept, "%")
    row_bytes = sum(out.stat().st_size for out in outs)
    shard_bytes = sum(shard.stat().st_size for shard in shards)
    report("rows over shards, bytes", row_bytes / shard_bytes)


def check_literally(shard: Path, tokenizer: Tokenizer, folder: Path) -> None:
    """Compare a shard's rows with those of full scans of its documents, id for id."""
    documents = []  # in batches, as packing reads them
    file = pq.ParquetFile(shard)
    for group in range(file.num_row_groups):
        texts = file.read_row_group(group)["text"].to_pylist()
        for start in range(0, len(texts), C.PACK_BATCH_DOCS):
            batch = texts[start : start + C.PACK_BATCH_DOCS]
            documents.append([tokenizer.encode(text) for text in batch])
    lengths = [np.array([len(ids) for ids in batch]) for batch in documents]
    expected = pack_by_lengths(lengths, C.MAX_SEQ_LEN + 1, C.PACK_BUFFER_DOCS)
    flat = [ids for batch in documents for ids in batch]
    rows = (np.concatenate([flat[k][:n] for k, n in parts]) for parts in expected)
    build_rows(shard, folder / "literal.u16", tokenizer)
    made = np.fromfile(folder / "literal.u16", "<u2").reshape(-1, C.MAX_SEQ_LEN + 1)
    same = len(made) == len(expected) and all(map(np.array_equal, made, rows))
    verdict = "equal" if same else "DIFFER FROM"
    print(f"{len(made)} rows of {shard.name} {verdict} the literal ones")


def time_loader(outs: list[Path]) -> None:
    """Time the way from the rows in `outs` to batches."""
    torch.set_num_threads(1)
    batch_size = 8 if C.SMOKE else 64
    n = 100
    batches = load_batches(Rows(outs), batch_size, torch.device("cpu"))

    def read() -> None:
        for _ in range(n):
            next(batches)

    timed(read)  # brings the page cache up
    speed = n * batch_size * C.MAX_SEQ_LEN / timed(read, REPEATS) / 1e6
    report(f"rows to batches, one core (best of {REPEATS})", speed, "M tokens/s")


def time_preparation(shards: list[Path], folder: Path) -> None:
    """Time and weigh a preparation of `shards` in `folder`, then time a run's start."""
    start = time.perf_counter()
    before, most = run_apart(PREPARE_AND_WEIGH, folder, shards[0].parent)
    seconds = time.perf_counter() - start
    size = sum(shard.stat().st_size for shard in shards) / 1e6
    print(f"all {len(shards)} shards ({size:.0f} MB) with 8 workers, {seconds:.0f} s:")
    imports = f"GB, {before / 1e9:.2f} GB"
    report("  resident memory, of which imports", most / 1e9, imports)
    manifest = json.loads((folder / "manifest.json").read_text())
    tokens = sum(row["size"] / 2 for row in manifest["rows"].values())
    report("  tokens in rows", tokens / 1e6, "M")
    if manifest["rules"] == C.DATA_RULES:
        runs = [run_apart(FIRST_BATCH, folder) for _ in range(REPEATS)]
        parts = ["import torch", "import the rest", "open to first batch"]
        for what, times in zip(parts, zip(*runs, strict=True), strict=True):
            report(f"{what} (best of {REPEATS})", min(times), "s")


def main() -> None:
    """Print one line per measurement."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        source = Path(sys.argv[1]) if len(sys.argv) > 1 else folder / "shards"
        if len(sys.argv) == 1:
            write_smoke_shards(source, [C.SHARD_NAME.format(i) for i in range(5)])
        shards = sorted(source.glob("*.parquet"))
        if len(shards) < 3:
            sys.exit(f"benchmarks/prepare.py: fewer than three parquet files in {source}")
        used = shards[:2]
        texts = [[*itertools.chain.from_iterable(read_documents(p))] for p in used]
        chars = sum(len(text) for part in texts for text in part) / 1e6
        print(f"{os.cpu_count()} cores, {len(used)} shards, {chars:.1f} M characters")
        tokenizer = time_tokenizer(used, texts, folder / "tokenizer")
        outs = [folder / f"{k}.u16" for k in range(len(used))]
        time_rows(used, texts, outs, tokenizer)
        time_loader(outs)
        check_literally(shards[-1], tokenizer, folder)
        del texts
        time_preparation(shards, folder / "all")


if __name__ == "__main__":
    main()
