"""Documents: in order, in batches of one row group; one rule keeps validation text apart."""

import errno
import random
import re
import resource
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import child
import constants as C
from conftest import make_documents, write_shard
from harness.documents import read_documents


def flat(batches) -> list[str]:
    return [document for batch in batches for document in batch]


# ---- Reading ------------------------------------------------------------------------------------
def test_documents_come_in_order_and_unchanged(corpus, tmp_path):
    path = write_shard(tmp_path / "shard_00000.parquet", corpus, row_group_size=77)
    assert flat(read_documents(path)) == corpus


def test_batches_hold_128_documents_and_never_span_row_groups(tmp_path):
    path = write_shard(tmp_path / "shard_00000.parquet", ["x"] * 700, row_group_size=300)
    sizes = [len(batch) for batch in read_documents(path)]
    assert sizes == [128, 128, 44] + [128, 128, 44] + [100]


@pytest.mark.parametrize("group", [1, 100, 127, 128, 129, 256, 1000])
def test_every_row_group_starts_a_batch(tmp_path, group):
    path = write_shard(
        tmp_path / "shard_00000.parquet", ["x"] * 600, row_group_size=group
    )
    sizes = [len(batch) for batch in read_documents(path)]
    starts = {sum(sizes[:k]) for k in range(len(sizes))}
    assert starts >= set(range(0, 600, group))
    assert sum(sizes) == 600 and max(sizes) <= 128


def test_other_columns_are_not_read(tmp_path):
    path = tmp_path / "shard_00000.parquet"
    pq.write_table(pa.table({"id": [1, 2], "text": ["a", "b"], "url": ["u", "v"]}), path)
    assert flat(read_documents(path)) == ["a", "b"]


def test_shard_without_documents_gives_no_batch(tmp_path):
    path = write_shard(tmp_path / "shard_00000.parquet", [])
    assert flat(read_documents(path)) == []


def damage(kind: str, tmp_path) -> bytes:
    good = write_shard(tmp_path / "good.parquet", make_documents(0, 50)).read_bytes()
    third, other = len(good) // 3, pa.BufferOutputStream()
    pq.write_table(pa.table({"content": ["a", "b"]}), other)
    return {
        "column of another name": other.getvalue().to_pybytes(),
        "page of a web server": b"<!doctype html><title>404</title>" * 20,
        "empty": b"",
        "cut short": good[:-100],
        "overwritten": good[:third] + bytes(400) + good[third + 400 :],
    }[kind]


@pytest.mark.parametrize(
    "kind",
    [
        "column of another name",
        "page of a web server",
        "empty",
        "cut short",
        "overwritten",
    ],
)
def test_damaged_shard_is_an_error_that_names_it_and_says_what_to_do(tmp_path, kind):
    path = tmp_path / "shard_00003.parquet"
    path.write_bytes(damage(kind, tmp_path))
    with pytest.raises(ValueError, match=re.escape(str(path))) as error:
        flat(read_documents(path))
    message = str(error.value)
    assert "`text`" in message and "replace it or take it out of its folder" in message
    assert "and run" in message and "uv run prepare.py" in message


def varint(n: int) -> bytes:
    """Return a whole number as thrift's compact protocol writes it."""
    n, out = 2 * n, b""
    while n > 127:
        out, n = out + bytes([n & 127 | 128]), n >> 7
    return out + bytes([n])


def relabel(body: bytes, footer: dict[int, int], pages: dict[int, int]) -> bytes:
    """Return a parquet file whose footer, or first page header, says other numbers."""
    size = int.from_bytes(body[-8:-4], "little")
    data, end = body[: -8 - size], body[-8 - size : -8]
    for true, lie in pages.items():
        at = data.index(varint(true), 4, 40)
        data = data[:at] + varint(lie) + data[at + len(varint(true)) :]
    for true, lie in footer.items():
        assert varint(true) in end
        end = end.replace(varint(true), varint(lie))
    return data + end + len(end).to_bytes(4, "little") + b"PAR1"


def lie(kind: str, path) -> None:
    """Write a parquet file that says what is not so, or one that is a bomb."""
    plain = {"compression": "zstd", "use_dictionary": False, "write_statistics": False}
    plain |= {"store_schema": False}
    if kind == "one document of 300 megabytes":
        return pq.write_table(pa.table({"text": ["x" * 300_000_000]}), path, **plain)
    if kind == "a dictionary of a terabyte":
        indices = pa.array([0] * 400_000, pa.int32())
        texts = pa.DictionaryArray.from_arrays(indices, pa.array(["x" * 2_500_000]))
        return pq.write_table(pa.table({"text": texts}), path, store_schema=False)
    documents = [random.Random(k).randbytes(40).hex() for k in range(1237)]
    pq.write_table(pa.table({"text": documents}), path, **plain)
    column = pq.read_metadata(path).row_group(0).column(0)
    packed, page = (
        column.total_compressed_size,
        1237 * 84,
    )  # a page: lengths of 4 bytes, texts
    # Two levels' bytes are before them; their number is what makes the page header fit.
    page += next(n for n in range(64) if varint(page + n) in path.read_bytes()[4:40])
    footer, pages = {
        "far more rows": ({1237: 2**60}, {}),
        "a row more": ({1237: 1238}, {}),
        "a page of two gigabytes": ({packed: packed + 2}, {page: 2**31 - 1}),
        "a page that is smaller": ({}, {page: page - 9999}),
        "a page that is larger": ({}, {page: page + 9999}),
        "a column of a petabyte": ({packed: 2**50}, {}),
    }[kind]
    path.write_bytes(relabel(path.read_bytes(), footer, pages))


@pytest.mark.parametrize(
    "kind",
    [
        "far more rows",
        "a row more",
        "a page of two gigabytes",
        "a page that is smaller",
        "a page that is larger",
        "a column of a petabyte",
        "one document of 300 megabytes",
        "a dictionary of a terabyte",
    ],
)
def test_parquet_that_lies_about_sizes_is_an_error_and_takes_no_memory(tmp_path, kind):
    lie(kind, path := tmp_path / "shard_00001.parquet")
    assert path.stat().st_size < 2_000_000
    out = child.context().SimpleQueue()
    process = child.context().Process(target=child.read_and_weigh, args=(path, out))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    said, megabytes, has_conftest = out.get()
    assert str(path) in said and ("replace it or" in said or "memory" in said), said
    assert megabytes < (1500 if "dictionary" in kind else 200)
    assert (
        not has_conftest
    )  # which makes a folder that such a process would leave in /tmp


@pytest.mark.parametrize(
    "values, what",
    [
        ([1, 2], "it is of type int64, not string"),
        ([b"a"], "it is of type binary, not string"),
        ([["a"]], "it is of type list<"),
        ([None, None], "it is of type null|it is of type int32"),
    ],
)
def test_column_of_another_type_is_named(tmp_path, values, what):
    pq.write_table(pa.table({"text": values}), path := tmp_path / "shard_00001.parquet")
    with pytest.raises(ValueError, match=f"{re.escape(str(path))} holds .*{what}"):
        flat(read_documents(path))


def test_columns_that_are_there_in_place_of_text_are_named(tmp_path):
    table = pa.table({"content": ["a"], "nested": [{"text": "b"}]})
    pq.write_table(table, path := tmp_path / "shard_00001.parquet")
    with pytest.raises(ValueError, match="it has the columns content, nested"):
        flat(read_documents(path))


def test_nested_column_before_text_does_not_matter(tmp_path):
    table = pa.table({"meta": [{"text": 1, "b": [2]}], "text": ["a"]})
    pq.write_table(table, path := tmp_path / "shard_00001.parquet")
    assert flat(read_documents(path)) == ["a"]


# ---- What others write --------------------------------------------------------------------------
def test_nothing_says_that_a_shard_is_to_be_deleted():
    for path in (Path(C.__file__).parent / "harness").glob("*.py"):
        assert path.name == "download.py" or "delete it" not in path.read_text(), path


def as_dictionary(documents: list, values: pa.DataType, indices=None) -> pa.Array:
    array = pa.array(documents).dictionary_encode()
    return pa.DictionaryArray.from_arrays(
        array.indices.cast(indices or pa.int32()), array.dictionary.cast(values)
    )


TEXT = {
    "string": lambda texts: pa.array(texts, pa.string()),
    "large_string": lambda texts: pa.array(texts, pa.large_string()),
    "string_view": lambda texts: pa.array(texts, pa.string_view()),
    "pandas categorical": lambda texts: as_dictionary(texts, pa.string(), pa.int16()),
    "polars Categorical": lambda texts: as_dictionary(
        texts, pa.large_string(), pa.uint32()
    ),
}


@pytest.mark.parametrize("kind", TEXT)
def test_any_column_of_text_is_read_a_null_as_an_empty_document(corpus, tmp_path, kind):
    texts = [*corpus[:400], None, *corpus[400:], "y" * 3000, None]
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": TEXT[kind](texts)}), path, row_group_size=300)
    stored = pq.read_schema(path).field("text").type  # pyarrow forgets large dictionaries
    assert stored.id == TEXT[kind](texts).type.id
    batches = list(read_documents(path))
    assert flat(batches) == [text or "" for text in texts]
    sizes = [128, 128, 44] * 2 + [len(texts) - 600] * (len(texts) > 600)
    assert [len(batch) for batch in batches] == sizes


@pytest.mark.parametrize("kind", ["pandas categorical", "string_view"])
def test_text_that_repeats_a_long_document_without_end_is_an_error(tmp_path, kind):
    texts = ["x" * 3_000_000, *[f"{k}" for k in range(5)]] + ["x" * 3_000_000] * 127
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": TEXT[kind](texts)}), path, compression="zstd")
    with pytest.raises(ValueError, match=r"369,[\d,]+ bytes in 128 documents"):
        flat(read_documents(path))


def test_document_that_is_not_utf8_is_an_empty_one_and_the_others_stay(tmp_path):
    raw = [b"good", b"\xff\xfe", None, "é".encode(), b"cut \xc3", b"\xef\xbf\xbd"]
    texts = pa.array(raw, pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": texts}), path := tmp_path / "a.parquet")
    assert flat(read_documents(path)) == ["good", "", "", "é", "", "\ufffd"]


# ---- Errors of the system -----------------------------------------------------------------------
def test_too_many_open_files_is_not_called_a_bad_column(tmp_path):
    path = write_shard(tmp_path / "a.parquet", ["x"])
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        with pytest.raises(OSError, match=re.escape(str(path))) as error:
            flat(read_documents(path))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert error.value.errno == errno.EMFILE and "`text`" not in str(error.value)


@pytest.mark.parametrize(
    "raised, number",
    [
        (OSError(errno.EACCES, "Failed to open local file"), errno.EACCES),
        (OSError(errno.EIO, "Error reading bytes"), errno.EIO),
        (pa.ArrowMemoryError("malloc of size 64 failed"), errno.ENOMEM),
        (MemoryError(), errno.ENOMEM),
    ],
)
def test_error_of_the_system_is_not_called_a_bad_column(
    tmp_path, monkeypatch, raised, number
):
    def fail(*_, **__):
        raise raised

    monkeypatch.setattr(pq, "ParquetFile", fail)
    with pytest.raises(OSError, match=re.escape(str(tmp_path / "a.parquet"))) as error:
        flat(read_documents(tmp_path / "a.parquet"))
    assert error.value.errno == number and "`text`" not in str(error.value)
