"""Documents of a shard, and the two kinds of shards that no hub serves: smoke's and one's own."""

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


def write_smoke_shards(folder: Path, names: list[str]) -> dict[str, dict]:
    """Write shards of the Python installation's own source text, for the smoke rules."""
    library = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(library.glob("*.py")) + sorted(library.glob("[a-ru-z]*/*.py"))
    text = "\n\n\n".join(path.read_text("utf-8", "ignore") for path in files)
    documents = [part for part in text.split("\n\n\n") if part.strip()]
    random.Random(0).shuffle(documents)
    for k, name in enumerate(names):
        with atomic_write(folder / name) as file:
            pq.write_table(
                pa.table({"text": documents[k :: len(names)]}), file, row_group_size=256
            )
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
        raise ValueError(
            f"{source} holds {len(names) - 1} training shards, not {num_shards}"
        )
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
                raise ValueError(
                    f"it has the columns {', '.join(schema.names)[:100] or 'none'}"
                )
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
                    C.PACK_BATCH_DOCS,
                    row_groups=[group],
                    columns=["text"],
                    use_threads=False,
                ):
                    if batch.nbytes > MAX_BATCH_BYTES:
                        raise ValueError(
                            f"{batch.num_rows} documents are {batch.nbytes:,} bytes"
                        )
                    if batch.column(0).null_count:
                        raise ValueError(f"{batch.column(0).null_count} nulls")
                    rows += batch.num_rows
                    yield batch.column(0).to_pylist()
            if rows != shard.metadata.num_rows:
                raise ValueError(
                    f"it says {shard.metadata.num_rows} rows and holds {rows}"
                )
    except (
        pa.ArrowException,
        KeyError,
        OSError,
        ValueError,
        MemoryError,
        OverflowError,
    ) as error:
        text = (
            f"{path} holds no good column `text` ({error}); delete it and run {PREPARE}"
        )
        raise ValueError(text) from error
