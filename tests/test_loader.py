"""Rows to batches, and the rules of a run: batches only while the clock runs, losses that count."""

import itertools
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import constants as C
from harness import gpu
from harness.loader import Batch, Rows, load_batches

ROOT = Path(C.__file__).parent
CPU = torch.device("cpu")
T = 5


@pytest.fixture
def rows(tmp_path, monkeypatch) -> Rows:
    """Seven rows in three files; row r holds r * 10, r * 10 + 1, ..."""
    monkeypatch.setattr(C, "MAX_SEQ_LEN", T)
    everything = 10 * np.arange(7)[:, None] + np.arange(T + 1)
    paths = []
    for k, part in enumerate(np.split(everything, [3, 4])):
        paths.append(tmp_path / f"{k}.u16")
        paths[-1].write_bytes(part.astype("<u2").tobytes())
    return Rows(paths)


def row_numbers(batch: Batch) -> list[int]:
    return (batch[0][:, 0] // 10).tolist()


# ---- Rows and batches ---------------------------------------------------------------------------
def test_rows_of_several_files_are_one_array(rows):
    assert len(rows) == 7
    assert [int(row[0]) for row in rows] == [0, 10, 20, 30, 40, 50, 60]
    with pytest.raises(IndexError):
        rows[7]


def test_y_is_x_shifted_by_one(rows):
    for x, y in itertools.islice(load_batches(rows, 2, CPU), 9):
        assert x.shape == y.shape == (2, T) and x.dtype == y.dtype == torch.int64
        assert torch.equal(x[:, 1:], y[:, :-1]) and torch.equal(y[:, -1], x[:, 0] + T)


def test_the_largest_ids_survive_the_way_to_the_device(tmp_path, monkeypatch):
    monkeypatch.setattr(C, "MAX_SEQ_LEN", T)
    path = tmp_path / "rows.u16"
    path.write_bytes(
        np.arange(8186, 8192, dtype="<u2").tobytes()
    )  # as large as ids here can be
    x, y = next(load_batches(Rows([path]), 1, CPU))
    assert y[0].tolist() == [8187, 8188, 8189, 8190, 8191]


def order(epoch: int) -> list[int]:
    """Return the order of seven rows that the rules fix for an epoch; 1 is the first."""
    return np.random.default_rng(epoch).permutation(7).tolist()


def test_the_order_of_the_first_epoch_is_fixed_by_the_rules(rows):
    batches = itertools.islice(load_batches(rows, 2, CPU), 3)
    assert [n for batch in batches for n in row_numbers(batch)] == order(1)[:6]


def test_epochs_are_other_permutations_and_the_same_every_time(rows):
    orders = []
    for batch_size in (1, 7):  # whatever the batch size
        batches = load_batches(rows, batch_size, CPU)
        read = [
            n for b in itertools.islice(batches, 21 // batch_size) for n in row_numbers(b)
        ]
        orders.append([read[0:7], read[7:14], read[14:21]])
    assert orders[0] == orders[1] == [order(1), order(2), order(3)]
    first, second, third = orders[0]
    assert sorted(first) == sorted(second) == sorted(third) == list(range(7))
    assert first != second != third != first and first != list(range(7))


def test_a_batch_straddles_the_end_of_an_epoch(rows):
    batches = [row_numbers(b) for b in itertools.islice(load_batches(rows, 4, CPU), 7)]
    read = [n for batch in batches for n in batch]
    assert read == [*order(1), *order(2), *order(3), *order(4)]


def test_batches_in_hand_do_not_change_when_the_next_is_read(rows):
    batches = load_batches(rows, 2, CPU)
    x, y = next(batches)
    before = x.clone(), y.clone()
    for _ in range(5):
        next(batches)
    assert torch.equal(x, before[0]) and torch.equal(y, before[1])


def test_batches_do_not_depend_on_torchs_default_device(rows):
    with torch.device("meta"):  # as torch.set_default_device in an edit
        x, _ = next(load_batches(rows, 2, CPU))
    assert row_numbers((x, x)) == order(1)[:2]


@pytest.mark.gpu
def test_the_gpu_gets_the_rows_that_the_cpu_gets(rows):
    on_gpu = load_batches(rows, 2, torch.device("cuda"))
    on_cpu = load_batches(rows, 2, CPU)
    for (x, y), (x_cpu, y_cpu) in itertools.islice(zip(on_gpu, on_cpu, strict=True), 200):
        busy = torch.randn(1000, 1000, device="cuda")
        for _ in range(5):  # the device lags behind the copies
            busy = busy @ busy / 1000
        assert torch.equal(x.cpu(), x_cpu) and torch.equal(y.cpu(), y_cpu)


# ---- Waiting for batches -------------------------------------------------------------------------
class SlowRows:
    """Two rows, each of which takes 20 ms to read."""

    def __len__(self):
        return 2

    def __getitem__(self, index):
        time.sleep(0.02)
        return np.zeros(C.MAX_SEQ_LEN + 1, "<u2")


def waits(device: torch.device, work=lambda: None) -> list[float]:
    """Return how long the device waited for each of five batches with `work` between them."""
    batches, marks = load_batches(SlowRows(), 2, device), []
    for _ in range(5):
        start, _, end = gpu.mark(device), next(batches), gpu.mark(device)
        marks.append((start, end))
        work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return [gpu.seconds_between(*both) for both in marks]


def test_the_wait_for_a_slow_disk_is_counted():
    assert all(0.04 <= wait < 0.5 for wait in waits(CPU))


@pytest.mark.gpu
def test_an_idle_gpu_waits_for_a_slow_disk_and_a_busy_one_does_not():
    assert all(0.04 <= wait < 0.5 for wait in waits(torch.device("cuda"))[1:])
    busy = waits(
        torch.device("cuda"), lambda: torch.cuda._sleep(400_000_000)
    )  # 0.2 s at 2 GHz
    assert max(busy[1:]) < 0.004


READ_BATCHES = """import sys, time
from pathlib import Path
import numpy as np
import torch
import constants as C
from harness.loader import Rows, load_batches
path = Path(sys.argv[1])
np.zeros((100, C.MAX_SEQ_LEN + 1), "<u2").tofile(path)
batches = load_batches(Rows([path]), 64, torch.device("cuda"))
for step in range(55):
    next(batches)
    time.sleep(0.02)
    if step == 4:
        before = time.process_time() - time.thread_time()
print(time.process_time() - time.thread_time() - before)
"""


@pytest.mark.gpu
def test_no_threads_spin_beside_the_one_that_reads_batches(tmp_path):
    ours = ("AUTORESEARCH_SMOKE", "OMP_", "GOMP_")  # with these no thread of a test spins
    env = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
    command = [sys.executable, "-c", READ_BATCHES, str(tmp_path / "rows.u16")]
    done = subprocess.run(command, env=env, cwd=ROOT, stdout=subprocess.PIPE, check=True)
    seconds = float(done.stdout)  # of other threads; torch's copies take several
    assert seconds < 0.2
