"""Documents of a shard, and the two kinds of shards that no hub serves.

These are the smoke rules' and one's own. A document is one string of column `text`.
"""

import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

import constants as C
from harness.files import PREPARE, atomic_write, describe

# Of text in PACK_BATCH_DOCS documents; what is larger is a lie or a bomb.
MAX_BATCH_BYTES = 1 << 28
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


def list_source(source: Path, num_shards: int | None) -> list[str]:
    """Return the names of the user's shards to be used, the validation shard last.

    As in the data set, the last file by name is for validation and the others are for
    training, `num_shards` of them (None: all). ValueError for too few, or for one that
    cannot be used.
    """
    names = sorted(path.name for path in source.glob("*.parquet") if path.is_file())
    if len(names) < 2:
        what = "files *.parquet; give two or more, the last by name is for validation"
        raise ValueError(f"{source} holds {len(names)} {what}")
    if num_shards is not None and num_shards >= len(names):
        count = f"{len(names) - 1} training shards, not {num_shards}"
        raise ValueError(f"{source} holds {count}")
    names = [*names[:-1][:num_shards], names[-1]]
    for name in names:
        if not any(read_documents(source / name)):
            advice = f"delete it and run {PREPARE}"
            raise ValueError(f"{source / name} has no documents; {advice}")
    return names


def find_text(shard: pq.ParquetFile) -> int:
    """Return the index of the column `text`; ValueError if it is not one of strings."""
    names = shard.schema_arrow.names
    if "text" not in names:
        columns = ", ".join(names)[:100] or "none"
        raise ValueError(f"it has the columns {columns}")
    kind = shard.schema_arrow.field("text").type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise ValueError(f"it is of type {kind}, not string")
    # Parquet counts the leaves of nested columns too.
    leaves = map(shard.schema.column, range(len(shard.schema)))
    return [leaf.path for leaf in leaves].index("text")


def read_documents(path: Path) -> Iterator[list[str]]:
    """Yield a shard's documents in order, in lists of up to PACK_BATCH_DOCS.

    A list is of one row group. Never holds more of the file than that, whatever the file
    says of its sizes. ValueError for a file that is not parquet, is damaged, or has no
    column `text` of strings.
    """
    try:
        with pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as shard:
            stated = shard.metadata.num_rows
            found = 0
            place = find_text(shard)
            for group in range(shard.num_row_groups):
                column = shard.metadata.row_group(group).column(place)
                limit = MAX_BATCH_BYTES * max(1, column.num_values / C.PACK_BATCH_DOCS)
                if column.total_uncompressed_size > limit:
                    size = f"{column.total_uncompressed_size:,} bytes"
                    raise ValueError(f"{column.num_values} documents are {size}")
                batches = shard.iter_batches(
                    C.PACK_BATCH_DOCS,
                    row_groups=[group],
                    columns=["text"],
                    use_threads=False,
                )
                for batch in batches:
                    if batch.nbytes > MAX_BATCH_BYTES:
                        size = f"{batch.nbytes:,} bytes"
                        raise ValueError(f"{batch.num_rows} documents are {size}")
                    texts = batch.column(0)
                    if texts.null_count:
                        raise ValueError(f"{texts.null_count} nulls")
                    found += batch.num_rows
                    yield texts.to_pylist()
            if found != stated:
                raise ValueError(f"it says {stated} documents and holds {found}")
    except UNREADABLE as error:
        problem = f"{path} holds no good column `text` ({error})"
        raise ValueError(f"{problem}; delete it and run {PREPARE}") from error
