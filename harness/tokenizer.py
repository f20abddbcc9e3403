"""The byte-level BPE: trained once, kept as text."""

import base64
import hashlib
import itertools
import json
import os
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import rustbpe
import tiktoken

import constants as C
from harness.files import PREPARE, atomic_write, content_key
from harness.jobs import Progress, metric, run_jobs

CHARS_PER_TOKEN = 5  # of English text, about: for the advice to give more
PIECE_CHARS = 100_000  # of a document that tiktoken cannot take in one


def fast_pattern(pattern: str) -> str:
    """Return a split pattern that cuts as C.SPLIT_PATTERN does, and is searched quicker.

    Only the look-ahead needs tiktoken's backtracking engine: what stands before it
    becomes one group for the automaton, 1.3 times the characters per second. The
    possessive marks can go: after `[^\\r\\n\\p{L}\\p{N}]?+` comes `\\p{L}+`, which does
    not match what the former gives back, and after `[^\\s\\p{L}\\p{N}]++` comes
    `[\\r\\n]*`, which matches always.
    """
    head, ahead, tail = pattern.partition(r"|\s+(?!\S)")
    return f"(?:{head.replace('?+', '?').replace('++', '+')}){ahead}{tail}"


class Tokenizer:
    """Byte-level BPE over tiktoken. Special strings in a text are text, never special.

    ranks: bytes of each token -> its id; the special tokens' ids follow, BOS first.
    token_bytes: length in bytes of each id, (V,), int64, 0 for special tokens.
    """

    def __init__(self, ranks: dict[bytes, int], pattern: str, special_tokens: list[str]):
        special = {name: len(ranks) + i for i, name in enumerate(special_tokens)}
        self.encoding = tiktoken.Encoding(
            "autoresearch",
            pat_str=fast_pattern(pattern),
            mergeable_ranks=ranks,
            special_tokens=special,
        )
        self.bos_id = len(ranks)
        self.n_vocab = len(ranks) + len(special)
        # Of raw bytes, never of decoded text: a lone piece of a character would become
        # U+FFFD and count as three.
        lengths = [len(token) for token in sorted(ranks, key=ranks.__getitem__)]
        self.token_bytes = np.array(lengths + [0] * len(special), np.int64)

    def encode(self, text: str) -> np.ndarray:
        """Return BOS and the ids of `text`, uint16."""
        try:
            found = self.encoding.encode_to_numpy(text, disallowed_special=())
        except ValueError:  # its search gives up on a million blanks in a row
            starts = range(0, len(text), PIECE_CHARS)
            pieces = [text[start : start + PIECE_CHARS] for start in starts]
            found = np.concatenate(
                [self.encoding.encode_to_numpy(p, disallowed_special=()) for p in pieces]
            )
        ids = np.empty(len(found) + 1, np.uint16)
        ids[0] = self.bos_id
        ids[1:] = found
        return ids

    @classmethod
    def load(cls, folder: Path) -> "Tokenizer":
        """Return what `ensure_tokenizer` wrote; ValueError says what is wrong with it."""
        try:
            about = json.loads((folder / "tokenizer.json").read_text("utf-8"))
            body = (folder / "ranks.tiktoken").read_bytes()
            sha256 = hashlib.sha256(body).hexdigest()
            made = [sha256, about["pattern"], *about["special_tokens"]]
            if made != [about["ranks_sha256"], C.SPLIT_PATTERN, *C.SPECIAL_TOKENS]:
                raise ValueError("its files are not of one making, or of other rules")
            pairs = (line.split() for line in body.splitlines())
            ranks = {base64.b64decode(token): int(rank) for token, rank in pairs}
            tokenizer = cls(ranks, about["pattern"], about["special_tokens"])
            tokenizer.key = about["key"]
            tokenizer.sha256 = sha256
            return tokenizer
        except (OSError, ValueError, KeyError, TypeError) as error:
            problem = f"the tokenizer in {folder} is missing or damaged ({error})"
            raise ValueError(f"{problem}; run `{PREPARE}`") from error


def ensure_tokenizer(folder: Path, shards: dict[Path, dict]) -> Tokenizer:
    """Return the tokenizer in `folder`, retrained first if it is not of these shards.

    shards: path -> what `describe` returns. ValueError if they hold too little text.
    """
    # Here, for a run, which trains no tokenizer, has no need of pyarrow.
    from harness.documents import name_few, read_documents

    shards = dict(itertools.islice(shards.items(), C.TOKENIZER_SHARDS))
    rules = (C.SPLIT_PATTERN, C.SPECIAL_TOKENS, C.VOCAB_SIZE, C.TOKENIZER_CHARS)
    hashes = [about["sha256"] for about in shards.values()]
    key = content_key(*rules, C.TOKENIZER_DOC_CHARS, hashes)
    try:
        tokenizer = Tokenizer.load(folder)
        if tokenizer.key == key:
            return tokenizer
        print("tokenizer: of other shards or rules, it is retrained", flush=True)
    except ValueError as error:
        if folder.exists():
            print(str(error).replace(f"run `{PREPARE}`", "it is retrained"), flush=True)
    progress = Progress("tokenizer", " characters", C.TOKENIZER_CHARS)
    chars = 0

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

    bpe = rustbpe.Tokenizer()
    n_ranks = C.VOCAB_SIZE - len(C.SPECIAL_TOKENS)
    train = partial(bpe.train_from_iterator, texts(), n_ranks, pattern=C.SPLIT_PATTERN)
    # On a thread, so that Ctrl-C need not wait for the merges.
    run_jobs({"": train}, 1, progress)
    ranks = sorted((rank, bytes(token)) for token, rank in bpe.get_mergeable_ranks())
    if len(ranks) != n_ranks:
        place = Path(os.path.commonpath([path.parent for path in shards]))
        names = name_few([path.relative_to(place).as_posix() for path in shards])
        problem = f"the training text in {place} ({names}) is too short"
        got = f"its {chars:,} characters give {len(ranks):,} of {n_ranks:,} tokens"
        least = metric(float(f"{CHARS_PER_TOKEN * C.EVAL_TOKENS:.0e}"), " characters")
        need = f"validation alone needs {C.EVAL_TOKENS:,} tokens, {least} or more"
        raise ValueError(f"{problem}: {got}; give it more text, and {need}")
    body = b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in ranks)
    sha256 = hashlib.sha256(body).hexdigest()
    about = {
        "pattern": C.SPLIT_PATTERN,
        "special_tokens": C.SPECIAL_TOKENS,
        "key": key,
        "ranks_sha256": sha256,
    }
    with atomic_write(folder / "ranks.tiktoken") as file:
        file.write(body)
    with atomic_write(folder / "tokenizer.json") as file:
        file.write(json.dumps(about, indent=1).encode())
    seconds = time.monotonic() - progress.started_at
    text = f"trained on {chars:,} characters, of {C.TOKENIZER_CHARS:,} wanted"
    print(f"tokenizer: {text}, {seconds:.1f} s", flush=True)
    return Tokenizer.load(folder)
