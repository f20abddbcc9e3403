#!/usr/bin/env bash
# pyarrow 26.0.1: reading a dictionary-encoded column in small batches takes time that grows with
# the square of the rows, though each batch is as long as the last. A file whose stored schema says
# dictionary<string> (a categorical of pandas or polars) gives batches that each hold the whole
# dictionary of the row group; `ParquetFile.iter_batches(batch_size=128)` builds it anew for each.
# One would expect small batches to cost less memory and about the same time, as they do for a
# plain string column of the same text. With every document another, which is what text is, the
# dictionary is all of the text.
#
# Output seen (2026-11-30, Python 3.12, Linux x86-64), seconds:
#   10000 documents: plain 0.02, dictionary 0.38 at 128 rows per batch, 0.03 at 65536
#   20000 documents: plain 0.03, dictionary 1.30 at 128 rows per batch, 0.06 at 65536
# Fails if a dictionary in small batches is no longer many times slower than the same text plain.
# Way out: batches as large as a row group, or a schema without the dictionary.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q pyarrow==26.0.1 2>"$folder/pip.log" || {
    cat "$folder/pip.log"
    exit 1
}
"$folder/venv/bin/python" - "$folder" <<'PYTHON'
import sys
import time

import pyarrow as pa
import pyarrow.parquet as pq


def seconds(column, rows):
    path = f"{sys.argv[1]}/text.parquet"
    pq.write_table(pa.table({"text": column}), path, row_group_size=len(column))
    start = time.perf_counter()
    found = sum(len(batch) for batch in pq.ParquetFile(path).iter_batches(rows))
    assert found == len(column)
    return time.perf_counter() - start


print("pyarrow", pa.__version__)
slow = []
for count in (10_000, 20_000):
    plain = pa.array(f"{i:08d}" * 375 for i in range(count))  # 3,000 characters each
    coded = plain.dictionary_encode()
    times = seconds(plain, 128), seconds(coded, 128), seconds(coded, 65_536)
    print(f"{count} documents: plain {times[0]:.2f}, dictionary {times[1]:.2f} at 128 rows "
          f"per batch, {times[2]:.2f} at 65536")
    slow.append(times[1])
    assert times[1] > 5 * times[0] and times[1] > 5 * times[2], "it has changed"
assert slow[1] > 2.5 * slow[0], "it grows with the rows alone now"
PYTHON
