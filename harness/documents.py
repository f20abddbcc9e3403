"""Documents of a shard, and the two kinds of shards that no hub serves.

These are the smoke rules' and one's own. A document is one string of column `text`.
"""

import errno
import os
import random
import re
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

import constants as C
from harness.files import PREPARE, atomic_write, describe
from harness.output import plural

# Of text in PACK_BATCH_DOCS documents; what is larger is a lie or a bomb.
MAX_BATCH_BYTES = 1 << 28
# Rows that pyarrow takes at once of a column with a dictionary: it copies the whole
# dictionary for every batch.
DICTIONARY_BATCH = 512 * C.PACK_BATCH_DOCS
# For a shard that is as it should not be. It may be the user's only copy.
REPLACE = f"replace it or take it out of its folder, and run `{PREPARE}`"
SOUNDS_LIKE_VALIDATION = re.compile(
    "(?<![a-z])(val|valid|validation|test|eval|dev)(?![a-z])", re.IGNORECASE
)
# What pyarrow raises for a file that is not as its format says.
UNREADABLE = (
    pa.ArrowException,
    KeyError,
    OSError,
    ValueError,
    MemoryError,
    OverflowError,
)


def write_smoke_shards(folder: Path, names: list[str]) -> dict[str, dict]:
    """Write shards of the Python installation's own source text, for the smoke rules.

    Returns name -> {"size": bytes, "sha256": hex}.
    """
    library = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(library.glob("*.py")) + sorted(library.glob("[a-ru-z]*/*.py"))
    text = "\n\n\n".join(path.read_text("utf-8", "ignore") for path in files)
    documents = [part for part in text.split("\n\n\n") if part.strip()]
    random.Random(0).shuffle(documents)
    for k, name in enumerate(names):
        table = pa.table({"text": documents[k :: len(names)]})
        with atomic_write(folder / name) as file:
            pq.write_table(table, file, row_group_size=256)
    return {name: describe(folder / name) for name in names}


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what pyarrow raises in the block into an error that names the shard `path`.

    OSError, with its number, where the system or the memory failed: the shard may be
    good. ValueError where the shard is not what it should be.
    """
    try:
        yield
    except MemoryError as error:
        said = f"not enough memory to read it ({error})"
        raise OSError(errno.ENOMEM, said, str(path)) from error
    except UNREADABLE as error:
        number = getattr(error, "errno", None)
        if isinstance(error, OSError) and number:
            raise OSError(number, os.strerror(number), str(path)) from error
        problem = f"{path} holds no good column `text` ({error})"
        raise ValueError(f"{problem}; {REPLACE}") from error


def find_text(shard: pq.ParquetFile) -> tuple[int, bool]:
    """Return the index of the column `text`, and whether it is read as a dictionary.

    ValueError if it is not one of strings.
    """
    names = shard.schema_arrow.names
    if names.count("text") != 1:
        columns = ", ".join(names)[:100] or "none"
        raise ValueError(f"it has the columns {columns}")
    kind = shard.schema_arrow.field("text").type
    is_dictionary = pa.types.is_dictionary(kind)  # a categorical, elsewhere
    values = kind.value_type if is_dictionary else kind
    if values not in (pa.string(), pa.large_string(), pa.string_view()):
        raise ValueError(f"it is of type {kind}, not string")
    # Parquet counts the leaves of nested columns too.
    leaves = map(shard.schema.column, range(len(shard.schema)))
    return [leaf.path for leaf in leaves].index("text"), is_dictionary


def count_bytes(texts: pa.Array) -> int:
    """Return the bytes of text in an array, as many as it will take when it is decoded."""
    if pa.types.is_dictionary(texts.type):
        values = texts.dictionary
        if values.type == pa.string_view():  # which binary_length does not take
            values = values.cast(pa.large_string())
        return pc.sum(pc.binary_length(values).take(texts.indices)).as_py() or 0
    if texts.type == pa.string_view():  # many may show the same bytes
        views = np.frombuffer(texts.buffers()[1], np.int32).reshape(-1, 4)
        return int(views[texts.offset :][: len(texts), 0].clip(0).sum(dtype=np.int64))
    return texts.nbytes


def to_documents(texts: pa.Array) -> list[str]:
    """Return the documents of an array; one that is null or not UTF-8 is empty."""
    size = count_bytes(texts)
    if size > MAX_BATCH_BYTES:
        raise ValueError(f"{size:,} bytes in {plural(len(texts), 'document')}")
    if pa.types.is_dictionary(texts.type):
        texts = texts.dictionary_decode()
    try:
        documents = texts.to_pylist()
    except UnicodeDecodeError:  # pyarrow writes and reads any bytes as strings
        documents = []
        for raw in texts.cast(pa.large_string()).cast(pa.large_binary()).to_pylist():
            text = (raw or b"").decode("utf-8", "replace")
            documents.append(text if text.encode() == raw else "")
    return [text or "" for text in documents] if texts.null_count else documents


def read_documents(path: Path) -> Iterator[list[str]]:
    """Yield a shard's documents in order, in lists of up to PACK_BATCH_DOCS.

    A list is of one row group. Never holds more of the file than that (of a column with a
    dictionary, also the dictionary), whatever the file says of its sizes. A document that
    is null, or not UTF-8, is given as an empty one. ValueError for a file that is not
    parquet, is damaged, or has no column `text` of strings; OSError where the system or
    the memory failed.
    """
    with (
        reading(path),
        pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as shard,
    ):
        stated = shard.metadata.num_rows
        found = 0
        place, is_dictionary = find_text(shard)
        for group in range(shard.num_row_groups):
            column = shard.metadata.row_group(group).column(place)
            limit = MAX_BATCH_BYTES * max(1, column.num_values / C.PACK_BATCH_DOCS)
            if column.total_uncompressed_size > limit:
                size = f"{column.total_uncompressed_size:,} bytes"
                count = plural(column.num_values, "document")
                raise ValueError(f"{size} in {count}")
            batches = shard.iter_batches(
                DICTIONARY_BATCH if is_dictionary else C.PACK_BATCH_DOCS,
                row_groups=[group],
                columns=["text"],
                use_threads=False,
            )
            for batch in batches:
                found += batch.num_rows
                for start in range(0, batch.num_rows, C.PACK_BATCH_DOCS):
                    yield to_documents(batch.column(0).slice(start, C.PACK_BATCH_DOCS))
        if found != stated:
            raise ValueError(f"it says {plural(stated, 'document')} and holds {found:,}")


def count_rows(path: Path) -> int:
    """Return the number of documents that a shard says it holds; errors as above."""
    with reading(path):
        return pq.read_metadata(path).num_rows


def name_few(names: list[str]) -> str:
    """Return the first names of a list, and how many there are where these are not all."""
    more = f", ... ({len(names)} in all)" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def find_shards(source: Path) -> list[str]:
    """Return the paths of the parquet files below a folder, from there, in order.

    What begins with a dot or an underscore is no data to Spark, pyarrow and systems that
    keep notes beside files (`._x.parquet`, `_delta_log/`); a line says what is left out.
    """
    if not source.exists():
        raise ValueError(f"there is no folder {source}")
    if not source.is_dir():
        raise ValueError(f"{source} is a file; give the folder that it is in")

    def complain(error: OSError) -> None:
        raise error

    found, seen = [], set()
    for place, folders, files in os.walk(source, onerror=complain, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:  # a link that leads round in a circle
            folders.clear()
            continue
        seen.add(real)
        for name in files:
            if name.lower().endswith(".parquet"):
                found.append((Path(place) / name).relative_to(source))
    found.sort(key=lambda path: path.parts)
    hidden, names = [], []
    for path in found:
        if not (source / path).exists():
            problem = f"{source / path} is a link that leads nowhere"
            raise ValueError(f"{problem}; {REPLACE}")
        if not (source / path).is_file():  # a pipe would never end
            continue
        is_hidden = any(part[0] in "._" for part in path.parts)
        (hidden if is_hidden else names).append(path.as_posix())
    if hidden:
        what = "hidden (. or _ begins a name)"
        print(f"shards: left out, {what}: {name_few(hidden)}", flush=True)
    return names


def list_source(source: Path, num_shards: int | None) -> list[str]:
    """Return the names of the user's shards to be used, the validation shard last.

    As in the data set, the last file by name is for validation and the others are for
    training, `num_shards` of them (None: all). A name is a path from `source`. Shards
    without a document are left out, as Spark writes some. ValueError for too few, or for
    one that cannot be used.
    """
    names, empty = [], []
    for name in find_shards(source):
        full = any(any(texts) for texts in read_documents(source / name))
        (names if full else empty).append(name)
    if empty:
        print(f"shards: left out, no document: {name_few(empty)}", flush=True)
    if len(names) < 2:
        what = "*.parquet" + (" with documents" if empty else "")
        advice = "give two or more, the last by name is for validation"
        raise ValueError(f"{source} holds {plural(len(names), 'file')} {what}; {advice}")
    if num_shards is not None and num_shards >= len(names):
        count = f"{plural(len(names) - 1, 'training shard')}, not {num_shards}"
        raise ValueError(f"{source} holds {count}")
    *train, val = names
    train = train[:num_shards]
    print(
        f"shards: {val} is for validation, the last of {len(names)} by name", flush=True
    )
    odd = [name for name in train if SOUNDS_LIKE_VALIDATION.search(name)]
    if odd:
        print(f"shards: for training in spite of the name: {name_few(odd)}", flush=True)
    return [*train, val]
