"""The packing protocol by full scans: slow, and nothing to get wrong. The benchmark uses it too."""

import numpy as np


def pack_by_lengths(batches: list[np.ndarray], capacity: int, buffer_docs: int):
    """The protocol over lengths alone: rows as lists of (document, ids taken), by full scans."""
    numbers, sizes, source, count = np.empty(0, int), np.empty(0, int), iter(batches), 0
    rows, row, space = [], [], capacity
    while True:
        while len(sizes) < buffer_docs and (batch := next(source, None)) is not None:
            numbers = np.concatenate([numbers, np.arange(count, count + len(batch))])
            sizes, count = np.concatenate([sizes, batch]), count + len(batch)
        if not len(sizes):
            return rows
        fitting = np.where(sizes <= space, sizes, 0)
        k = int(
            fitting.argmax() if fitting.any() else sizes.argmin()
        )  # both take the first
        taken = min(int(sizes[k]), space)
        row.append((int(numbers[k]), taken))
        space -= taken
        numbers, sizes = np.delete(numbers, k), np.delete(sizes, k)
        if space == 0:
            rows.append(row)
            row, space = [], capacity
