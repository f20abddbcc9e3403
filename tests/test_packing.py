"""Packing: the rows equal those of a slow, literal reading of the protocol, id for id."""

import base64
import itertools
import json
import random
import struct

import numpy as np
import pyarrow.parquet as pq
import pytest
import tiktoken

import constants as C
from conftest import make_documents, write_shard
from harness.documents import read_documents
from harness.packing import build_rows, pack_rows, row_name
from literal import pack_by_lengths

BOS = 1020


def pack_literally(
    batches, capacity: int, buffer_docs: int, n_rows: float = float("inf")
):
    """The protocol in plain lists and full scans: batches of documents in, rows out."""
    batches, buffer, rows, row = iter(batches), [], [], []
    while len(rows) < n_rows:
        while len(buffer) < buffer_docs:
            batch = next(batches, None)
            if batch is None:
                break
            buffer.extend(batch)
        if not buffer:
            break
        space = capacity - len(row)
        fitting = [len(document) for document in buffer if len(document) <= space]
        wanted = max(fitting) if fitting else min(len(document) for document in buffer)
        at = next(k for k, document in enumerate(buffer) if len(document) == wanted)
        row = row + buffer.pop(at)[:space]
        if len(row) == capacity:
            rows.append(row)
            row = []
    return rows


def pack(batches, capacity: int) -> list[list[int]]:
    arrays = [[np.array(document, np.uint16) for document in batch] for batch in batches]
    return [row.tolist() for row in pack_rows(arrays, capacity)]


def random_batches(seed: int, capacity: int, count: int = 400) -> list[list[list[int]]]:
    """Return documents of random ids: of 1 id, of few lengths (ties), exactly fitting, too long."""
    rng = random.Random(seed)
    common = [1, 2, capacity // 3, capacity // 2, capacity - 1, capacity, capacity + 1]
    documents = []
    for _ in range(count):
        drawn = [
            rng.choice(common),
            rng.randint(1, capacity),
            rng.randint(1, 4 * capacity),
        ]
        documents.append(
            [BOS, *(rng.randrange(BOS) for _ in range(rng.choice(drawn) - 1))]
        )
    batches = []
    while documents:
        n = rng.randint(1, 30)
        batches.append(documents[:n])
        documents = documents[n:]
    return batches


# ---- By hand ------------------------------------------------------------------------------------
def test_five_documents_worked_by_hand(monkeypatch):
    monkeypatch.setattr(C, "PACK_BUFFER_DOCS", 3)
    a, b, c = [0, 1, 2, 3], [0, 4], [0, 5, 6, 7, 8, 9, 10]
    d, e = [0, 11, 12], [0, 13, 14, 15]
    assert pack([[a], [b], [c], [d], [e]], 6) == [
        [
            0,
            1,
            2,
            3,
            0,
            4,
        ],  # of a, b, c the longest that fits 6 is a; of b, c, d in 2 it is b
        [
            0,
            13,
            14,
            15,
            0,
            11,
        ],  # of c, d, e the longest that fits 6 is e; none fits 2: d is cut
        [0, 5, 6, 7, 8, 9],  # c alone is left, and it is longer than a row
    ]


def test_of_equal_documents_that_fit_the_earliest_is_placed():
    assert pack([[[0, 1, 1], [0, 2, 2], [0, 3, 3], [0, 4, 4]]], 6) == [
        [0, 1, 1, 0, 2, 2],
        [0, 3, 3, 0, 4, 4],
    ]


def test_of_equal_documents_that_are_cropped_the_earliest_is_taken():
    documents = [[0, 1, 1], [0, 2, 2, 2], [0, 3, 3, 3], [0, 4, 4]]
    # Longest first: 2 and 3 in rows of 4; then 1, and one place that nothing fits: 4 is cropped.
    assert pack([documents], 4) == [[0, 2, 2, 2], [0, 3, 3, 3], [0, 1, 1, 0]]
    documents = [[0, 1, 1, 1, 1], [0, 2, 2, 2, 2], [0, 3, 3, 3, 3]]
    assert pack([documents], 4) == [[0, 1, 1, 1], [0, 2, 2, 2], [0, 3, 3, 3]]


def test_buffer_is_refilled_before_every_placement(monkeypatch):
    monkeypatch.setattr(C, "PACK_BUFFER_DOCS", 2)
    # The document of 3 ids arrives when the first is gone, in time to fill the row with no crop.
    batches = [[[0, 1, 1], [0, 2, 2, 2, 2]], [[0, 3, 3]]]
    assert pack(batches, 6)[0] == [0, 2, 2, 2, 2, 0]
    batches = [[[0, 1, 1], [0, 2, 2, 2, 2, 2, 2]], [[0, 3, 3]]]
    assert pack(batches, 6)[0] == [0, 1, 1, 0, 3, 3]


def test_a_whole_batch_enters_a_buffer_that_lacks_one_document(monkeypatch):
    monkeypatch.setattr(C, "PACK_BUFFER_DOCS", 2)
    batches = [[[0, 1]], [[0, 2], [0, 3, 3], [0, 4, 4, 4]]]
    assert pack(batches, 4)[0] == [0, 4, 4, 4]


def test_empty_documents_are_a_bos_each():
    assert pack([[[0]] * 7], 3) == [[0, 0, 0], [0, 0, 0]]


def test_document_longer_than_a_row_is_cropped_to_it_once():
    assert pack([[[0, *range(1, 100)]]], 5) == [[0, 1, 2, 3, 4]]


def test_rest_that_fills_no_row_is_dropped():
    assert pack([[[0, 1, 1], [0, 2]]], 6) == []
    assert pack([], 6) == [] == pack([[]], 6)


# ---- Against the literal protocol ---------------------------------------------------------------
@pytest.mark.parametrize("buffer_docs", [1, 2, 7, 100, 1000])
@pytest.mark.parametrize("seed", range(6))
def test_rows_equal_the_literal_protocol(monkeypatch, seed, buffer_docs):
    monkeypatch.setattr(C, "PACK_BUFFER_DOCS", buffer_docs)
    capacity = [2, 7, 16, 33, 64, 129][seed]
    batches = random_batches(seed, capacity)
    rows = pack(batches, capacity)
    assert len(rows) > 40
    assert rows == pack_literally(batches, capacity, buffer_docs)


@pytest.mark.parametrize(
    "count, longest, capacity", [(200_000, 24, 8193), (20_000, 6000, 2049)]
)
def test_rows_of_very_many_short_documents_and_of_long_ones(count, longest, capacity):
    lengths = np.random.default_rng(0).integers(
        1, longest, count
    )  # 1 is an empty document
    firsts = np.arange(count) % 65521  # the first id tells which document it is
    documents = (
        np.full(n, first, np.uint16) for n, first in zip(lengths, firsts, strict=True)
    )
    batches = iter(lambda: [*itertools.islice(documents, 128)], [])
    rows = [row.copy() for row in pack_rows(batches, capacity)]
    parts = np.split(lengths, range(128, count, 128))
    expected = pack_by_lengths(parts, capacity, 1000)
    assert len(rows) == len(expected) > 250
    for row, parts in zip(rows, expected, strict=True):
        assert np.array_equal(
            row, np.repeat([firsts[k] for k, _ in parts], [n for _, n in parts])
        )


def test_every_row_opens_with_bos_and_is_full():
    for seed in range(5):
        rows = pack(random_batches(seed, 40), 40)
        assert {len(row) for row in rows} == {40}
        assert {row[0] for row in rows} == {BOS}


def test_every_placed_id_is_of_a_prefix_of_a_document_used_once():
    rng = random.Random(3)
    documents = [
        [BOS, *([k] * rng.randint(1, 60))] for k in range(300)
    ]  # ids tell the document
    rows = pack([documents[:150], documents[150:]], 32)
    assert len(rows) > 200
    used = set()
    for row in rows:
        starts = [k for k, token in enumerate(row) if token == BOS] + [len(row)]
        for start, end in itertools.pairwise(starts):
            if end - start > 1:
                document = documents[row[start + 1]]
                assert row[start:end] == document[: end - start]
                assert row[start + 1] not in used
                used.add(row[start + 1])
                assert end - start == len(document) or end == len(
                    row
                )  # cropped at the end only
    assert len(used) > 200


# ---- The row files ------------------------------------------------------------------------------
def batches_by_hand(folder, name: str) -> list[list[list[int]]]:
    """Read and tokenize a prepared shard with Arrow and tiktoken alone."""
    about = json.loads((folder / "tokenizer" / "tokenizer.json").read_text())
    lines = (folder / "tokenizer" / "ranks.tiktoken").read_bytes().splitlines()
    ranks = {base64.b64decode(line.split()[0]): k for k, line in enumerate(lines)}
    bpe = tiktoken.Encoding(
        "by hand", pat_str=about["pattern"], mergeable_ranks=ranks, special_tokens={}
    )
    batches, shard = [], pq.ParquetFile(folder / "shards" / name)
    for group in range(shard.num_row_groups):
        texts = shard.read_row_group(group)["text"].to_pylist()
        for start in range(0, len(texts), 128):
            documents = [
                [len(ranks), *bpe.encode_ordinary(t)] for t in texts[start : start + 128]
            ]
            batches.append(documents)
    return batches


def read_rows(path) -> list[list[int]]:
    """Read a row file as its format is described: uint16, little endian, rows of T + 1."""
    body, width = path.read_bytes(), C.MAX_SEQ_LEN + 1
    ids = struct.unpack(f"<{len(body) // 2}H", body)
    assert len(ids) % width == 0
    return [list(ids[start : start + width]) for start in range(0, len(ids), width)]


def row_file(folder, number: int):
    (path,) = (folder / "rows").glob(
        C.SHARD_NAME.format(number).replace(".parquet", ".*.u16")
    )
    return path


def test_validation_rows_equal_the_literal_protocol(prepared):
    n_rows = C.EVAL_TOKENS // C.MAX_SEQ_LEN
    batches = batches_by_hand(prepared, C.SHARD_NAME.format(C.VAL_SHARD))
    rows = read_rows(row_file(prepared, C.VAL_SHARD))
    assert len(rows) == n_rows == 256
    assert rows == pack_literally(
        itertools.cycle(batches), C.MAX_SEQ_LEN + 1, 1000, n_rows
    )


def test_training_rows_equal_the_literal_protocol_over_the_whole_shard(prepared):
    batches = batches_by_hand(prepared, C.SHARD_NAME.format(1))
    rows = read_rows(row_file(prepared, 1))
    assert rows == pack_literally(batches, C.MAX_SEQ_LEN + 1, 1000)


def test_validation_shard_starts_over_when_it_runs_out(tiny_tokenizer, tmp_path):
    texts = make_documents(seed=20, count=150)
    shard = write_shard(tmp_path / "shard_06542.parquet", texts, row_group_size=60)
    documents = [tiny_tokenizer.encode(text).tolist() for text in texts]
    one_pass = [documents[:60], documents[60:120], documents[120:]]
    n_rows = 3 * sum(map(len, documents)) // (C.MAX_SEQ_LEN + 1)
    build_rows(shard, tmp_path / "rows.u16", tiny_tokenizer, n_rows)
    rows = read_rows(tmp_path / "rows.u16")
    assert len(rows) == n_rows
    assert rows == pack_literally(
        itertools.cycle(one_pass), C.MAX_SEQ_LEN + 1, 1000, n_rows
    )


def test_more_validation_rows_begin_with_the_same_ones(tiny_tokenizer, tmp_path):
    shard = write_shard(
        tmp_path / "shard_06542.parquet", make_documents(seed=21, count=300)
    )
    for n_rows in (3, 10):
        build_rows(shard, tmp_path / f"{n_rows}.u16", tiny_tokenizer, n_rows)
    few, many = (tmp_path / "3.u16").read_bytes(), (tmp_path / "10.u16").read_bytes()
    assert len(few) == 3 * 2 * (C.MAX_SEQ_LEN + 1)
    assert many.startswith(few) and len(many) > len(few)


def test_rows_rest_on_the_split_pattern_too(monkeypatch):
    names = []
    for pattern in (C.SPLIT_PATTERN, "x"):
        monkeypatch.setattr(C, "SPLIT_PATTERN", pattern)
        names.append(row_name("shard_00000.parquet", {"sha256": "0"}, "1"))
    assert names[0] != names[1]


@pytest.mark.parametrize("n_rows", [None, 5])
def test_shard_without_documents_is_an_error_and_no_endless_search(
    tiny_tokenizer, tmp_path, monkeypatch, n_rows
):
    shard = write_shard(tmp_path / "shard_00004.parquet", [])
    passes, real = [], read_documents

    def counted(path):
        passes.append(path)
        assert len(passes) < 50
        return real(path)

    monkeypatch.setattr("harness.packing.read_documents", counted)
    with pytest.raises(ValueError, match="shard_00004.parquet"):
        build_rows(shard, tmp_path / "out.u16", tiny_tokenizer, n_rows)
    assert not (tmp_path / "out.u16").exists()
