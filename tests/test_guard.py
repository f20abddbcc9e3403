"""What is refused outside the clock. Against whole runs: tests/test_cheats.py."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

import constants as C
import forks
from harness.guard import MAX_EARLY_PASSES, Guard

ROOT = Path(C.__file__).parent
BEFORE = torch.autograd.backward, torch.autograd.grad


@pytest.fixture
def guard():
    guard = Guard()
    guard.start()
    yield guard
    guard.evaluated()
    assert (torch.autograd.backward, torch.autograd.grad) == BEFORE


def train(passes: int = 1) -> torch.Tensor:
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    for _ in range(passes):
        weight.sum().backward()
        optimizer.step()
    return weight


def test_passes_before_the_clock_are_counted_and_those_of_the_warm_up_are_not(guard):
    train(MAX_EARLY_PASSES - 2)
    torch.func.grad(torch.sum)(torch.ones(2))
    with guard.warm_up():
        train(200)
    train()
    assert guard.passes == MAX_EARLY_PASSES
    guard.clock_starts()
    train(200)  # while the clock runs
    assert guard.passes == MAX_EARLY_PASSES


def test_passes_after_a_warm_up_that_failed_are_counted(guard):
    with pytest.raises(ValueError), guard.warm_up():
        raise ValueError
    train(3)
    assert guard.passes == 3


def test_more_than_a_few_passes_before_the_clock_are_an_error(guard):
    train(MAX_EARLY_PASSES + 1)
    with pytest.raises(RuntimeError, match="65 backward passes before the clock starts"):
        guard.clock_starts()


def test_compiling_after_the_clock_is_no_training(guard):
    # As the evaluation compiles for a batch of another size, with gradients on.
    weight = torch.ones(2, requires_grad=True)
    torch._dynamo.reset()
    function = torch.compile(lambda x: (x * weight).sin(), backend="aot_eager")
    guard.clock_starts()
    guard.clock_ended()
    y = function(torch.ones(3, 2))
    assert y.requires_grad
    with pytest.raises(RuntimeError, match="a backward pass after training has ended"):
        y.sum().backward()


REFUSED = {
    "backward": lambda: torch.ones(2, requires_grad=True).sum().backward(),
    "autograd.backward": lambda: torch.autograd.backward(
        torch.ones(2, requires_grad=True).sum()
    ),
    "autograd.grad": lambda: torch.autograd.grad(
        (x := torch.ones(2, requires_grad=True)).sum(), x
    ),
    "func.grad": lambda: torch.func.grad(torch.sum)(torch.ones(2)),
    "step": lambda: torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))]).step(),
}


@pytest.mark.parametrize("what", REFUSED)
def test_training_after_the_clock_is_refused_until_there_is_a_result(guard, what):
    guard.clock_starts()
    REFUSED[what]()
    guard.clock_ended()
    with pytest.raises(RuntimeError, match="after training has ended; the run is void"):
        REFUSED[what]()
    guard.evaluated()
    REFUSED[what]()


def test_a_guard_that_was_not_started_does_nothing():
    guard = Guard()
    guard.clock_ended()
    assert (torch.autograd.backward, torch.autograd.grad) == BEFORE
    train()


def test_other_hooks_of_optimizers_stay(guard):
    told = []
    handle = register_optimizer_step_pre_hook(lambda *_: told.append(1))
    guard.clock_starts()
    train()
    handle.remove()
    assert told == [1]


# ---- Files --------------------------------------------------------------------------------------
def in_a_process(tmp_path: Path, code: str, prefix: str = "checkout/.venv") -> str:
    """Return what `code` prints, in a process that refuses to open files; folders as named."""
    folders = ("cache/data/rows", "cache/compiled", "checkout", "elsewhere")
    for name in (*folders, "checkout/.venv/lib"):
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
        for kind in ("npy", "u16", "json"):
            (tmp_path / name / f"a.{kind}").write_bytes(b"x")
    (tmp_path / "elsewhere" / "link.json").symlink_to(tmp_path / "cache/data/rows/a.json")
    opened = (
        f"import os, sys\nsys.prefix = '{prefix}'\n"
        "from pathlib import Path\nfrom harness.guard import refuse_to_open\n"
        "refuse_to_open(Path('cache/data'), Path('checkout'))\n"
        "def t(*args):\n"
        "    try: open(*args).close(); print('open', args[0])\n"
        "    except RuntimeError as error: print('refused', args[0])\n"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = forks.run("-c", opened + code, env=env, folder=tmp_path)
    done.check_returncode()
    return done.stdout


def test_which_files_are_refused(tmp_path):
    code = """
for name in ("cache/data/rows", "cache/compiled", "checkout", "elsewhere"):
    for kind in ("npy", "u16", "json"): t(f"{name}/a.{kind}")
t("elsewhere/link.json"); t(b"checkout/a.npy"); t(Path("checkout/a.npy"))
t("checkout/a.npy", "r+"); t("checkout/a.npy", "a"); t("checkout/a.npy", "w")
t("checkout/b.npy", "xb"); t("cache/data/b.json", "w")
t("checkout/.venv/lib/a.npy"); t("checkout/.venv/lib/a.json")
open = lambda path: os.fdopen(os.open(path, os.O_RDONLY))
t("checkout/a.npy"); t(Path("checkout/a.u16")); t(Path("checkout/a.json"))
"""
    lines = in_a_process(tmp_path, code).splitlines()
    assert lines == [
        *(f"refused cache/data/rows/a.{kind}" for kind in ("npy", "u16", "json")),
        *("refused cache/compiled/a.npy", "refused cache/compiled/a.u16"),
        "open cache/compiled/a.json",
        *("refused checkout/a.npy", "refused checkout/a.u16", "open checkout/a.json"),
        *(f"open elsewhere/a.{kind}" for kind in ("npy", "u16", "json")),
        "refused elsewhere/link.json",
        *("refused b'checkout/a.npy'", "refused checkout/a.npy"),
        *("refused checkout/a.npy", "open checkout/a.npy", "open checkout/a.npy"),
        *("open checkout/b.npy", "refused cache/data/b.json"),
        *("open checkout/.venv/lib/a.npy", "open checkout/.venv/lib/a.json"),
        *("refused checkout/a.npy", "refused checkout/a.u16", "open checkout/a.json"),
    ]


def test_weights_are_refused_in_a_checkout_below_the_folder_of_python(tmp_path):
    """As in /usr/src, where Python is in /usr."""
    code = "t('checkout/a.npy'); t('elsewhere/a.npy')"
    lines = in_a_process(tmp_path, code, prefix=".").splitlines()
    assert lines == ["refused checkout/a.npy", "open elsewhere/a.npy"]


def test_the_look_at_files_costs_next_to_nothing(tmp_path):
    code = """
import sys, time
def seconds(n, act):
    start = time.process_time()
    for _ in range(n): act()
    return (time.process_time() - start) / n
print(seconds(20000, lambda: sys.audit("other", 1)), seconds(2000, lambda: t("checkout/a.json")))
"""
    last = in_a_process(tmp_path, code).splitlines()[-1]
    other, opened = map(float, last.split())
    assert other < 10e-6 and opened < 1e-3  # 0.7 and 46 microseconds


# ---- The end ------------------------------------------------------------------------------------
ENDS = """
import threading, time, types
from harness.guard import demand_result
{}
run = types.SimpleNamespace(printed=True)
demand_result(run)
threading.Thread(target=time.sleep, args=(600,)).start()
print("the end")
"""
POOL = """
from concurrent.futures import ThreadPoolExecutor
ThreadPoolExecutor(1).submit(time.sleep, 600)
"""
CHILD = """
import multiprocessing
multiprocessing.get_context("fork").Process(target=print, args=("a child",)).start()
time.sleep(1)
"""
NOTHING = "the end\ntrain.py: the run ended without a result\n"


def run_to_the_end(code: str, fresh: bool = False) -> tuple[int, str, str]:
    start = time.monotonic()
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    if fresh:
        command = [sys.executable, "-c", code]
        done = subprocess.run(
            command, env=env, timeout=60, capture_output=True, text=True
        )
    else:
        done = forks.run("-c", code, env=env, seconds=60)
    assert time.monotonic() - start < 60
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("more", ["", POOL])
def test_a_process_with_a_result_ends_with_its_main_thread(more):
    assert run_to_the_end(ENDS.format(more), fresh=True)[:2] == (0, "the end\n")


def test_a_process_without_a_result_has_status_1_whatever_it_was_to_end_with():
    code = ENDS.replace("printed=True", "printed=False").format("")
    assert run_to_the_end(code)[:2] == (1, NOTHING)
    assert run_to_the_end(code + "import sys\nsys.exit(0)")[:2] == (1, NOTHING)


def test_an_error_is_printed_and_ends_it_at_once():
    code = ENDS.replace("printed=True", "printed=False").format("")
    status, out, err = run_to_the_end(code + "raise ValueError('7 is odd')")
    assert (status, out) == (1, NOTHING) and err.endswith("ValueError: 7 is odd\n")
    status, _, err = run_to_the_end(ENDS.format("") + "raise ValueError('late')")
    assert status == 1 and "late" in err  # though there is a result


def test_the_end_of_a_child_is_not_that_of_the_process():
    code = ENDS.replace("printed=True", "printed=False").format("") + CHILD
    out = run_to_the_end(code)[1]
    assert out.count("a child") == 1 and out.count("without a result") == 1
