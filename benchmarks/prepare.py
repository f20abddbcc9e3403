"""Time the data path: text to packed rows, and rows to batches, beside what the libraries allow.

Usage: python benchmarks/prepare.py [FOLDER OF SHARDS]

Without a folder it writes shards of the Python installation's own source text. Rates are
characters (or tokens) a second of wall clock; "tiktoken alone" encodes the same text with nothing
around it, the floor of what tokenizing can take. Needs no GPU and leaves nothing behind.
"""

import itertools
import os
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

import constants as C
import prepare


def timed(action: Callable) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if len(sys.argv) > 1:
            shards = sorted(Path(sys.argv[1]).rglob("*.parquet"))[:4]
        else:
            names = [C.SHARD_NAME.format(i) for i in range(4)]
            prepare.write_smoke_shards(folder / "shards", names)
            shards = [folder / "shards" / name for name in names]
        if not shards:
            sys.exit(f"benchmarks/prepare.py: no parquet file below {sys.argv[1]}")
        about = {path: prepare.describe(path) for path in shards}
        texts = [[*itertools.chain.from_iterable(prepare.read_documents(path))] for path in shards]
        chars = [sum(map(len, text)) for text in texts]
        cores = os.cpu_count()
        print(f"{cores} cores, {len(shards)} shards, {sum(chars) / 1e6:.1f} M characters")

        seconds = timed(lambda: prepare.ensure_tokenizer(folder / "tokenizer", about))
        trained = min(sum(chars), C.TOKENIZER_CHARS)  # documents are capped: a little less
        print(f"tokenizer training    {trained / seconds / 1e6:6.1f} M characters/s, all cores")
        tokenizer = prepare.Tokenizer.load(folder / "tokenizer")

        encode = tokenizer.encoding.encode_ordinary_batch
        seconds = timed(lambda: encode(texts[0], num_threads=1))
        print(f"tiktoken alone        {chars[0] / seconds / 1e6:6.1f} M characters/s, one core")
        outs = [folder / "rows" / f"{k}.u16" for k in range(len(shards))]
        seconds = timed(lambda: prepare.build_rows(shards[0], outs[0], tokenizer))
        print(f"text to rows          {chars[0] / seconds / 1e6:6.1f} M characters/s, one core")
        jobs = zip(shards, outs, [tokenizer] * len(shards), strict=True)
        with ThreadPoolExecutor() as pool:
            seconds = timed(lambda: [*pool.map(lambda job: prepare.build_rows(*job), jobs)])
        print(f"text to rows          {sum(chars) / seconds / 1e6:6.1f} M characters/s, all cores")

        batch_size = 64 if not C.SMOKE else 8
        batches = prepare.load_batches(prepare.Rows(outs), batch_size, torch.device("cpu"))
        next(batches)
        n = 200
        seconds = timed(lambda: [next(batches) for _ in range(n)])
        rate = n * batch_size * C.MAX_SEQ_LEN / seconds / 1e6
        print(f"rows to batches (CPU) {rate:6.1f} M tokens/s, one core")


if __name__ == "__main__":
    main()
