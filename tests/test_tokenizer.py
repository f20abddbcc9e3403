"""Tokenizer: any text comes back, bytes are counted from raw bytes, trained on the right text."""

import base64
import collections
import hashlib
import itertools
import json
import random
import re
import shutil
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import regex
import rustbpe
import tiktoken

import constants as C
from conftest import SPECIAL_LOOKING, make_documents, write_shard
from harness.files import describe
from harness.tokenizer import Tokenizer, ensure_tokenizer

PATTERN = C.SPLIT_PATTERN  # as test_constants has it; tests may change that of the rules


def random_texts(seed: int, count: int) -> list[str]:
    """Return texts of code points from all planes, without surrogates; some of them empty."""
    rng = random.Random(seed)
    ranges = [(0, 0x20), (0x20, 0x7F), (0x20, 0x7F), (0x80, 0x250), (0x370, 0x1000)]
    ranges += [(0x2000, 0x2070), (0x3040, 0xA000), (0xE000, 0x10000), (0x1F300, 0x1FB00)]
    ranges += [(0x10000, 0x110000)]
    texts = []
    for _ in range(count):
        mixed = rng.choices(ranges, k=rng.randint(1, 3))
        n = rng.randint(0, 40)
        texts.append("".join(chr(rng.randrange(*rng.choice(mixed))) for _ in range(n)))
    return texts


def ranks_by_hand(folder: Path) -> dict[bytes, int]:
    """Read ranks.tiktoken as described: one line per token, base64, blank, rank."""
    lines = (folder / "ranks.tiktoken").read_text("ascii").split("\n")
    assert lines.pop() == ""
    pairs = [re.fullmatch(r"([A-Za-z0-9+/]+=*) (\d+)", line).groups() for line in lines]
    return {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}


def train(folder: Path, *documents: list[str]) -> Tokenizer:
    """Write a shard for each list of documents and return their tokenizer."""
    shards = {}
    for k, texts in enumerate(documents):
        path = write_shard(folder / C.SHARD_NAME.format(k), texts)
        shards[path] = describe(path)
    return ensure_tokenizer(folder / "tokenizer", shards)


@pytest.fixture(scope="module")
def folder(corpus, tiny_tokenizer, tmp_path_factory) -> Path:
    """The folder of `tiny_tokenizer`, trained once more. Copy it before you damage it."""
    place = tmp_path_factory.mktemp("tokenizer")
    assert train(place, corpus).sha256 == tiny_tokenizer.sha256
    return place / "tokenizer"


@pytest.fixture(scope="module")
def ranks(folder) -> dict[bytes, int]:
    return ranks_by_hand(folder)


# ---- Text to ids and back -----------------------------------------------------------------------
def test_any_text_comes_back(tiny_tokenizer, corpus):
    texts = random_texts(seed=1, count=4000)
    assert "" in texts and any("\0" in text for text in texts)
    for text in corpus + texts:
        ids = tiny_tokenizer.encode(text)
        assert tiny_tokenizer.encoding.decode(ids[1:].tolist()) == text


def test_bos_is_first_and_nothing_special_follows(tiny_tokenizer, corpus):
    for text in corpus + random_texts(seed=2, count=1000):
        ids = tiny_tokenizer.encode(text)
        assert ids.dtype == np.uint16
        assert ids[0] == tiny_tokenizer.bos_id == C.BOS_ID == C.VOCAB_SIZE - 4
        assert (ids[1:] < tiny_tokenizer.bos_id).all()
    assert tiny_tokenizer.encode("").tolist() == [C.BOS_ID]


@pytest.mark.parametrize("text", [*C.SPECIAL_TOKENS, *SPECIAL_LOOKING])
def test_special_strings_in_text_stay_text(tiny_tokenizer, text):
    ids = tiny_tokenizer.encode(text)
    assert len(ids) > 2
    assert (ids[1:] < tiny_tokenizer.bos_id).all()
    assert tiny_tokenizer.encoding.decode(ids[1:].tolist()) == text


def encode_literally(text: str, ranks: dict[bytes, int]) -> list[int]:
    """Byte-level BPE word by word as its paper has it: merge the pair of lowest rank, repeat."""
    ids = []
    for piece in regex.findall(PATTERN, text):
        parts = [bytes([byte]) for byte in piece.encode()]
        while True:
            pairs = [(ranks.get(a + b), k) for k, (a, b) in enumerate(pairwise(parts))]
            found = [pair for pair in pairs if pair[0] is not None]
            if not found:
                break
            k = min(found)[1]
            parts[k : k + 2] = [parts[k] + parts[k + 1]]
        ids += [ranks[part] for part in parts]
    return ids


def test_ids_equal_those_of_a_literal_bpe(tiny_tokenizer, ranks, corpus):
    for text in corpus[:150] + random_texts(seed=3, count=300):
        assert tiny_tokenizer.encode(text)[1:].tolist() == encode_literally(text, ranks)


# ---- Byte lengths -------------------------------------------------------------------------------
def test_every_token_has_the_length_of_its_raw_bytes(tiny_tokenizer, ranks):
    expected = [None] * C.VOCAB_SIZE
    for token, rank in ranks.items():
        expected[rank] = len(token)
    expected[C.BOS_ID :] = [0, 0, 0, 0]
    assert tiny_tokenizer.token_bytes.tolist() == expected
    lone = [ranks[bytes([byte])] for byte in range(0x80, 0x100)]
    assert tiny_tokenizer.token_bytes[lone].tolist() == [1] * 128


def test_token_lengths_sum_to_the_bytes_of_the_text(tiny_tokenizer, corpus):
    for text in corpus + random_texts(seed=4, count=2000):
        ids = tiny_tokenizer.encode(text)
        assert tiny_tokenizer.token_bytes[ids].sum() == len(text.encode())


# ---- The files ----------------------------------------------------------------------------------
def test_files_are_text_that_can_be_read_by_hand(folder, ranks):
    assert sorted(path.name for path in folder.iterdir()) == [
        "ranks.tiktoken",
        "tokenizer.json",
    ]
    about = json.loads((folder / "tokenizer.json").read_text("ascii"))
    assert about["pattern"] == PATTERN
    assert about["special_tokens"] == [f"<|reserved_{i}|>" for i in range(4)]
    body = (folder / "ranks.tiktoken").read_bytes()
    assert about["ranks_sha256"] == hashlib.sha256(body).hexdigest()
    assert list(ranks.values()) == list(range(C.VOCAB_SIZE - 4))
    assert {bytes([byte]) for byte in range(256)} <= set(ranks)


def test_loaded_tokenizer_is_the_one_that_was_trained(tiny_tokenizer, folder, corpus):
    loaded = Tokenizer.load(folder)
    assert (loaded.n_vocab, loaded.bos_id) == (C.VOCAB_SIZE, C.BOS_ID)
    assert all((loaded.encode(t) == tiny_tokenizer.encode(t)).all() for t in corpus)


DAMAGES = {
    "ranks missing": lambda folder: (folder / "ranks.tiktoken").unlink(),
    "ranks cut short": lambda folder: cut(folder / "ranks.tiktoken"),
    "two ranks swapped": lambda folder: swap_first_ranks(folder / "ranks.tiktoken"),
    "description missing": lambda folder: (folder / "tokenizer.json").unlink(),
    "description cut short": lambda folder: cut(folder / "tokenizer.json"),
    "description is binary": lambda folder: (folder / "tokenizer.json").write_bytes(
        b"\x80\xff"
    ),
    "description is empty": lambda folder: (folder / "tokenizer.json").write_text("{}"),
    "description is a list": lambda folder: (folder / "tokenizer.json").write_text("[1]"),
}


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def swap_first_ranks(path: Path) -> None:
    first, second, rest = path.read_bytes().split(b"\n", 2)
    swapped = [first.split()[0] + b" 1", second.split()[0] + b" 0", rest]
    path.write_bytes(b"\n".join(swapped))


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_tokenizer_is_an_error_that_names_its_folder(folder, tmp_path, damage):
    copy = shutil.copytree(folder, tmp_path / "tokenizer")
    DAMAGES[damage](copy)
    with pytest.raises(
        (FileNotFoundError, ValueError), match=re.escape(str(copy))
    ) as error:
        Tokenizer.load(copy)
    assert "uv run prepare.py" in str(error.value)


@pytest.mark.parametrize("damage", DAMAGES)
def test_preparing_again_repairs_a_damaged_tokenizer(
    folder, corpus, tiny_tokenizer, tmp_path, damage
):
    copy = shutil.copytree(folder, tmp_path / "tokenizer")
    before = {path.name: path.read_bytes() for path in copy.iterdir()}
    DAMAGES[damage](copy)
    shard = write_shard(tmp_path / "shard_00000.parquet", corpus)
    again = ensure_tokenizer(copy, {shard: describe(shard)})
    assert again.sha256 == tiny_tokenizer.sha256
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == before


# ---- Training -----------------------------------------------------------------------------------
@pytest.fixture
def trained_on(monkeypatch) -> list[list[str]]:
    """The texts that each training was given, in a list that grows."""
    seen, real = [], rustbpe.Tokenizer

    class Spy:
        def __init__(self):
            self.real = real()
            self.get_mergeable_ranks = self.real.get_mergeable_ranks

        def train_from_iterator(self, texts, *args, **kwargs):
            seen.append(list(texts))
            return self.real.train_from_iterator(iter(seen[-1]), *args, **kwargs)

    monkeypatch.setattr("harness.tokenizer.rustbpe", SimpleNamespace(Tokenizer=Spy))
    return seen


def test_first_merges_are_the_most_frequent_pairs(ranks, corpus):
    words = collections.Counter()
    for text in corpus:
        words.update(regex.findall(PATTERN, text[: C.TOKENIZER_DOC_CHARS]))
    words = [([bytes([b]) for b in word.encode()], n) for word, n in words.items()]
    learned = sorted(ranks, key=ranks.get)[256:286]
    for token in learned:
        pairs = collections.Counter()
        for parts, n in words:
            for pair in pairwise(parts):
                pairs[pair] += n
        best = max(pairs.values())
        merged = [
            pair for pair, n in pairs.items() if n == best and pair[0] + pair[1] == token
        ]
        assert merged, f"{token} is not a most frequent pair"
        for parts, _ in words:
            k = 0
            while k + 1 < len(parts):
                if (parts[k], parts[k + 1]) == merged[0]:
                    parts[k : k + 2] = [token]
                k += 1


def test_trained_on_training_shards_in_order_each_document_capped(
    tmp_path, trained_on, corpus
):
    long = "".join(make_documents(seed=5, count=1500))
    assert len(long) > 2 * C.TOKENIZER_DOC_CHARS
    other = make_documents(seed=6, count=50)
    train(tmp_path, [*corpus, long], other)
    capped = [text[:10_000] for text in [*corpus, long, *other]]
    assert trained_on == [capped]


def test_text_beyond_the_cap_of_a_document_is_not_learned(tmp_path, corpus):
    head = "".join(make_documents(seed=5, count=1500))[: C.TOKENIZER_DOC_CHARS]
    tails = ["", "zqzqzq " * 3000]
    keys = [
        train(tmp_path / str(k), [*corpus, head + t]).sha256 for k, t in enumerate(tails)
    ]
    assert keys[0] == keys[1]
    assert train(tmp_path / "2", [*corpus, tails[1]]).sha256 != keys[0]


def test_training_stops_at_its_number_of_characters(
    tmp_path, trained_on, corpus, monkeypatch
):
    limit = 40_000
    monkeypatch.setattr(C, "TOKENIZER_CHARS", limit)
    train(tmp_path, corpus, corpus)
    (texts,) = trained_on
    capped = [text[:10_000] for text in corpus]
    assert texts == capped[: len(texts)]
    total = sum(map(len, texts))
    assert total - len(texts[-1]) < limit <= total
    assert limit < sum(map(len, capped))


def test_tokenizer_is_kept_while_its_shards_stay(tmp_path, trained_on, corpus):
    first = train(tmp_path, corpus)
    files = sorted((tmp_path / "tokenizer").iterdir())
    before = [(path.stat().st_mtime_ns, path.stat().st_ino) for path in files]
    second = train(tmp_path, corpus)
    assert [(path.stat().st_mtime_ns, path.stat().st_ino) for path in files] == before
    assert len(trained_on) == 1
    assert first.sha256 == second.sha256


def test_tokenizer_is_trained_again_when_a_shard_changes(tmp_path, trained_on, corpus):
    first = train(tmp_path, corpus)
    second = train(tmp_path, [*corpus, *make_documents(seed=8, count=200)])
    assert len(trained_on) == 2
    assert first.sha256 != second.sha256
    assert Tokenizer.load(tmp_path / "tokenizer").sha256 == second.sha256


@pytest.mark.parametrize(
    "rule, value",
    [("VOCAB_SIZE", 900), ("SPLIT_PATTERN", r"\w+|\W"), ("TOKENIZER_DOC_CHARS", 50)],
)
def test_tokenizer_is_trained_again_when_a_rule_changes(
    tmp_path, trained_on, corpus, monkeypatch, rule, value
):
    first = train(tmp_path, corpus)
    monkeypatch.setattr(C, rule, value)
    second = train(tmp_path, corpus)
    assert len(trained_on) == 2
    assert second.sha256 != first.sha256


def test_shards_after_the_first_few_do_not_matter(
    tmp_path, trained_on, corpus, monkeypatch
):
    monkeypatch.setattr(C, "TOKENIZER_SHARDS", 1)
    first = train(tmp_path, corpus, ["one"])
    assert train(tmp_path, corpus, ["another"], ["and more"]).sha256 == first.sha256
    assert len(trained_on) == 1


def test_too_little_text_is_an_error_with_both_numbers(tmp_path):
    with pytest.raises(ValueError, match=rf"26 characters .*\b{C.VOCAB_SIZE - 4:,}\b"):
        train(tmp_path, ["a few words are not enough"])
    assert not (tmp_path / "tokenizer").exists() or not list(
        (tmp_path / "tokenizer").iterdir()
    )


# ---- The split pattern --------------------------------------------------------------------------
@pytest.mark.parametrize(
    "text, pieces",
    [
        ("1234567 89", ["12", "34", "56", "7", " ", "89"]),
        (
            "I'm they'LL don't we've",
            ["I", "'m", " they", "'LL", " don", "'t", " we", "'ve"],
        ),
        ("Hello, world!", ["Hello", ",", " world", "!"]),
        ("a  b   c", ["a", " ", " b", "  ", " c"]),
        ("x = y;\n\n  z", ["x", " =", " y", ";\n\n", " ", " z"]),
        ("naïve_Größe", ["naïve", "_Größe"]),
        ("価格は500円", ["価格は", "50", "0", "円"]),
        ("a\r\nb \n", ["a", "\r\n", "b", " \n"]),
    ],
)
def test_split_pattern_cuts_as_the_protocol_does(text, pieces):
    assert regex.findall(C.SPLIT_PATTERN, text) == pieces


def test_search_for_the_cuts_is_quicker_and_cuts_the_same(tiny_tokenizer, ranks, corpus):
    plain = tiktoken.Encoding(
        "plain", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={}
    )
    kinds = ["a", "é", "1", " ", "\t", "\n", "\r", "!", "'", "s"]
    short = (
        "".join(text) for n in range(1, 5) for text in itertools.product(kinds, repeat=n)
    )
    rng = random.Random(0)
    long = (
        "".join(rng.choices(kinds + ["ll", "  ", "\u3000"], k=30)) for _ in range(20_000)
    )
    for text in itertools.chain(short, long, random_texts(seed=5, count=3000), corpus):
        assert tiny_tokenizer.encode(text)[1:].tolist() == plain.encode_ordinary(text)
        assert tiny_tokenizer.encoding._pat_str != PATTERN


def test_no_token_crosses_a_cut_of_the_split_pattern(tiny_tokenizer, corpus):
    for text in corpus + random_texts(seed=9, count=500):
        ids = tiny_tokenizer.encode(text)[1:]
        ends = set(np.cumsum(tiny_tokenizer.token_bytes[ids]).tolist())
        pieces = regex.findall(PATTERN, text)
        assert ends >= set(np.cumsum([len(piece.encode()) for piece in pieces]).tolist())


def test_no_token_holds_three_digits(ranks):
    runs = [max(map(len, re.findall(rb"\d+", token)), default=0) for token in ranks]
    assert max(runs) == 2
