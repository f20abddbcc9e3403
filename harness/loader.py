"""Packed rows, memory-mapped, as batches on the device."""

import itertools
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch

import constants as C

Batch = tuple[torch.Tensor, torch.Tensor]  # x, y: ids (B, T)


class Once:
    """The batches of a step. A second pass over them is an error, where a generator's is empty."""

    def __init__(self, batches: Iterable[Batch]):
        self._batches, self._over = iter(batches), False

    def __iter__(self) -> Iterator[Batch]:
        if self._over:
            advice = "for a second pass keep them: batches = list(batches)"
            raise RuntimeError(f"the batches of a step are handed out once; {advice}")
        return self

    def __next__(self) -> Batch:
        try:
            return next(self._batches)
        except StopIteration:
            self._over = True
            raise


class Rows:
    """The rows of several files as one read-only array of ids, memory-mapped.

    reads: how many rows were handed out; there is no way around it.
    """

    def __init__(self, paths: list[Path]):
        maps = (np.memmap(path, "<u2", "r") for path in paths if path.stat().st_size)
        self._files = [np.asarray(ids).reshape(-1, C.MAX_SEQ_LEN + 1) for ids in maps]
        self._ends = [*itertools.accumulate(map(len, self._files))]
        self.reads = 0

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> np.ndarray:
        self.reads += 1
        k = bisect_right(self._ends, index)
        # Negative, so counted from the file's end.
        return self._files[k][index - self._ends[k]]

    def read_all(self) -> np.ndarray:
        """Return all rows as one array (R, T + 1), int16, which holds every id."""
        rows = np.concatenate(self._files).view(np.int16)
        self.reads += len(rows)
        return rows


def load_batches(rows: Rows, batch_size: int, device: torch.device) -> Iterator[Batch]:
    """Yield batches x, y of shape (B, T), int64, on the device, y being x shifted by one.

    Each epoch, the first too, is a permutation of its own that the rules fix: as they
    lie, the last rows of a shard are crops of long documents, one after another. On a
    GPU, one batch is copied on its own stream while another is used; the events that
    guard both are torch's allocators'.
    """
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    epochs = itertools.count(1)
    orders = (np.random.default_rng(n).permutation(len(rows)) for n in epochs)
    order = itertools.chain.from_iterable(orders)

    def read() -> torch.Tensor:
        shape, pinned = (batch_size, C.MAX_SEQ_LEN + 1), stream is not None
        # int16 holds every id, and torch has few operations for uint16.
        ids = torch.empty(shape, dtype=torch.int16, device="cpu", pin_memory=pinned)
        # Filled by numpy: a copy of torch's, as pin_memory() is, wakes a thread per core, and
        # each spins for milliseconds after it, beside the one that launches the GPU's kernels.
        batch = [rows[i] for i in itertools.islice(order, batch_size)]
        np.stack(batch, out=ids.numpy().view(np.uint16))
        if stream is None:
            return ids
        with torch.cuda.stream(stream):
            return ids.to(device, non_blocking=True)

    def hand_out(ids: torch.Tensor) -> Iterator[Batch]:
        while True:
            if stream is not None:
                torch.cuda.current_stream().wait_stream(stream)
                ids.record_stream(torch.cuda.current_stream())
            batch = ids.long()
            ids = read()
            yield batch[:, :-1].contiguous(), batch[:, 1:].contiguous()

    return hand_out(read())  # the first read is done when the clock starts
