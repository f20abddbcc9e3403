"""Each cheat is committed, by accident or not, against a real smoke run, which must notice.

A cheat is an edit of one file in a throw-away copy of the repository, under smoke rules made
smaller still. One process imports torch and forks a child for each run, two at a time; what the
child does is `python train.py`.
"""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import copy_checkout

import constants as C
from harness.data import load_manifest
from harness.tokenizer import Tokenizer

ROOT = Path(C.__file__).parent
SMALLER = [
    ("constants.py", "20 if SMOKE", "0.5 if SMOKE"),
    (
        "constants.py",
        "OVERRUN_TOLERANCE = 1.0 if SMOKE",
        "OVERRUN_TOLERANCE = 4.0 if SMOKE",
    ),
    ("constants.py", "EVAL_TOKENS = 2**16 if SMOKE", "EVAL_TOKENS = 2**13 if SMOKE"),
    ("train.py", "NGRAM_ROWS = 4, 128, 32, 2**11", "NGRAM_ROWS = 2, 32, 16, 2**6"),
    # On a busy machine the budget holds one step, after which layers that began as nothing would
    # still do next to nothing: too little to show what they see.
    ("train.py", 'name.endswith(("c_proj.weight", "gate', 'name.endswith(("gate'),
]
RUNNER = """
import json, os, runpy, sys
import numpy, pyarrow.parquet, requests, rustbpe, tiktoken, torch
import torch._inductor.async_compile, torch.nn.attention.flex_attention
torch.compile(len)  # imports the rest of what train.py imports

def reap():
    pid, status = os.wait()
    done[running.pop(pid)] = os.waitstatus_to_exitcode(status)

running, done = {}, {}
for folder in sys.argv[1:]:
    if len(running) == (2 if done else 1):  # the first run prepares what all the others use
        reap()
    if (pid := os.fork()) == 0:
        break
    running[pid] = folder
else:
    while running:
        reap()
    sys.exit(json.dump(done, sys.stdout))
os.chdir(folder)
with open("run.log", "wb") as log:
    os.dup2(log.fileno(), 1), os.dup2(log.fileno(), 2)
sys.argv[:], sys.path[0] = ["train.py"], folder
runpy.run_path("train.py", run_name="__main__")
"""
EVALUATE, STEPS = "run.evaluate(model)", "for step in run.steps(batch_size, grad_acc"
SUMMARY = "run.print_summary("
CHEATS: dict[str, tuple[str, str, str]] = {}


def cheat(*edit: str):
    """Decorate a test with its edit: the file, what to replace, by what."""

    def register(test):
        CHEATS[test.__name__] = edit
        return test

    return register


def apply(folder: Path, name: str, old: str, new: str) -> None:
    text = (folder / name).read_text("utf-8")
    assert text.count(old) == 1, (
        f"{name} holds {old!r} {text.count(old)} times; fix the cheat"
    )
    (folder / name).write_text(text.replace(old, new), "utf-8")


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def runs(request, cache, tmp_path_factory) -> dict[str, tuple[int, str]]:
    """Run the untouched train.py and the cheats of all selected tests: exit status and log."""
    folder = tmp_path_factory.mktemp("cheats")
    honest = folder / "honest"
    copy_checkout(honest)
    for edit in SMALLER:
        apply(honest, *edit)
    git = ["git", "-C", str(honest), "-c", "user.name=a", "-c", "user.email=a@localhost"]
    git += ["-c", "commit.gpgsign=false"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "start"]):
        subprocess.run([*git, *command], check=True)
    selected = [item.name for item in request.session.items if item.name in CHEATS]
    for name in selected:
        shutil.copytree(honest, folder / name)
        apply(folder / name, *CHEATS[name])
    folders = [str(folder / name) for name in ("honest", *selected)]
    env = os.environ | {"AUTORESEARCH_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", RUNNER, *folders]
    text = subprocess.run(
        command, env=env, check=True, capture_output=True, text=True
    ).stdout
    paths = {Path(path): status for path, status in json.loads(text).items()}
    return {
        path.name: (status, (path / "run.log").read_text())
        for path, status in paths.items()
    }


@pytest.fixture
def result(runs, request) -> tuple[int, str]:
    return runs[request.node.name]


def values(log: str) -> dict[str, str]:
    return dict(re.findall(r"^(\w+): (.*)$", log.partition("\n---\n")[2], re.MULTILINE))


def stopped(result: tuple[int, str], why: str) -> None:
    """Assert that the run ended with status 1, said why and printed no result."""
    status, log = result
    assert status == 1 and re.search(why, log), log
    assert "\n---\n" not in log and log.endswith("the run ended without a result\n")


def shows(result: tuple[int, str], honest: tuple[int, str]) -> None:
    """Assert that the run's `rules:` is not the honest run's, so that it is void."""
    mine, other = values(result[1]), values(honest[1])
    assert (result[0], honest[0]) == (0, 0), result[1]
    assert mine["rules"].startswith("smoke-") and mine["rules"] != other["rules"]


def test_an_honest_run_has_a_result(runs):
    """What follows is refused for the cheat alone."""
    status, log = runs["honest"]
    assert status == 0 and len(re.findall("^val_bpb:", log, re.MULTILINE)) == 1, log
    assert 0 < float(values(log)["val_bpb"]) < 6 and "without a result" not in log
    assert not values(log)["commit"].endswith("+dirty")


# ---- The model ----------------------------------------------------------------------------------
ATTEND = "self.attend(q, k, v, self.window, self.scale)"
UNMASKED = "F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)"


@cheat("train.py", ATTEND, UNMASKED)
def test_a_mask_that_sees_the_future(result):
    """Gain: every layer reads the tokens that it is to predict; val_bpb falls towards 0."""
    stopped(result, "evaluation refused: the model sees the future")


@cheat(
    "train.py",
    "F.pad(k[:, :-1], (0, 0, 0, 0, 1, 0))",
    "F.pad(k[:, 1:], (0, 0, 0, 0, 0, 1))",
)
def test_keys_taken_from_the_token_behind(result):
    """Gain: a key tells what follows its token, so the last query finds what it is to predict."""
    stopped(result, "evaluation refused: the model sees the future")


@cheat("train.py", EVALUATE, "run.evaluate(lambda idx: model(idx.roll(-1, 1)))")
def test_targets_shifted_by_one(result):
    """Gain: the target is the last input; copying it costs no bits."""
    stopped(result, "evaluation refused: the model sees the future")


CACHE = """seen = torch.zeros(VOCAB_SIZE)
    def cached(idx):
        counts = torch.bincount(idx.flatten(), minlength=VOCAB_SIZE)
        seen.add_(RATE * counts / counts.max())
        return model(idx) + seen
    run.evaluate(cached)"""


@cheat("train.py", EVALUATE, CACHE.replace("RATE", "0.1"))
def test_a_cache_over_evaluation_batches(result):
    """Gain: the validation text of one batch is trained on for the next."""
    stopped(result, "evaluation refused: the model keeps state")


@cheat("train.py", EVALUATE, CACHE.replace("RATE", "1.5e-4"))
def test_a_cache_too_slow_to_be_seen_before_the_evaluation(result):
    """Gain: the same, a little at a time; over 80 batches it adds up."""
    stopped(result, "evaluation refused: the model keeps state")


READ_FIRST = """seen = []
    def spy(idx):
        seen.append(idx)
        return model(idx) if len(seen) < 9 else None
    try:
        run.evaluate(spy)
    except RuntimeError:
        pass
    run.evaluate(model)"""


@cheat("train.py", EVALUATE, READ_FIRST)
def test_a_refused_evaluation_that_is_tried_again(result):
    """Gain: the first evaluation hands over the validation text, the second is taken with it."""
    stopped(result, "evaluate after training, once")


@cheat("train.py", EVALUATE, "run.evaluate(lambda idx: model(idx)[..., :512])")
def test_logits_of_the_wrong_vocabulary(result):
    """Gain: the probability that belongs to rare ids goes to the others."""
    stopped(
        result, r"evaluation refused: .*\(4, 256, 512\) .*, not logits \(4, 256, 1024\)"
    )


@cheat("train.py", EVALUATE, "run.evaluate(lambda idx: model.loss(idx, idx) / 9)")
def test_a_returned_loss_instead_of_logits(result):
    """Gain: the model names its own loss, over whatever it likes."""
    stopped(
        result, r"evaluation refused: model\(idx\) gave \(\) torch.float32, not logits"
    )


FEW_ROWS = """def uniform(idx):
        if len(idx) > 1:
            raise torch.OutOfMemoryError
        return torch.zeros(*idx.shape, VOCAB_SIZE)
    run.evaluate(uniform)"""


@cheat("train.py", EVALUATE, FEW_ROWS)
def test_fewer_evaluation_tokens_through_the_batch_size(result, cache):
    """Gain: a model that runs out of memory chooses the batch size; another would leave rows out.

    The model is uniform, so that its bits per byte over all rows are known.
    """
    folder = cache / "smoke"
    rows = load_manifest(folder)["rows"]
    (val,) = (
        folder / "rows" / name for name, about in rows.items() if about["split"] == "val"
    )
    ids = np.fromfile(val, "<u2").reshape(32, C.MAX_SEQ_LEN + 1)[:, 1:]
    sizes = Tokenizer.load(folder / "tokenizer").token_bytes
    expected = [
        math.log2(C.VOCAB_SIZE) * (sizes[k] > 0).sum() / sizes[k].sum()
        for k in (ids, ids[:30])
    ]
    status, log = result
    assert status == 0 and float(values(log)["val_bpb"]) == pytest.approx(
        expected[0], abs=2e-6
    )
    assert expected[0] != pytest.approx(expected[1], abs=1e-4)


READS_AND_FAILS = """seen = []
    def spy(idx):
        if len(idx) == 4:
            seen.append(idx)
            if len(seen) == 13:
                raise torch.OutOfMemoryError("does not fit")
        return model(idx)
    run.evaluate(spy)"""


@cheat("train.py", EVALUATE, READS_AND_FAILS)
def test_an_evaluation_that_runs_out_of_memory_to_be_tried_again(result):
    """Gain: as above; but the batch size is found on random ids, and the text is read once."""
    stopped(result, "train.py: out of GPU memory in the evaluation")


# ---- The clock ----------------------------------------------------------------------------------
EARLY = f"""from harness.loader import load_batches
    early = load_batches(run.train_rows, batch_size, device)
    for _ in range(5):
        train_step(model, optimizers, [next(early) for _ in range(2)], 2)
    {STEPS}"""


@cheat("train.py", STEPS, EARLY)
def test_training_before_the_clock_starts(result):
    """Gain: as much again as the start-up limit allows, five minutes of it."""
    stopped(
        result, r"evaluation refused: \d+\.\d s and 44 rows were used outside the clock"
    )


LATE = f"""import time
    kept = [run.random_batch(batch_size)] * 2
    while run.clock.now() - run.clock.started_at - run.clock.seconds < 2.5:
        train_step(model, optimizers, kept, 2)
    {EVALUATE}"""


@cheat("train.py", EVALUATE, LATE)
def test_training_after_the_clock_has_stopped(result):
    """Gain: any time at all, on batches that were kept."""
    stopped(
        result, r"evaluation refused: \d+\.\d s and 0 rows were used outside the clock"
    )


@cheat(
    "train.py",
    EVALUATE,
    f"train_step(model, optimizers, step.batches, 2)\n    {EVALUATE}",
)
def test_a_batch_after_the_clock_has_stopped(result):
    """Gain: tokens that the budget does not hold."""
    stopped(result, "its batches cannot be had now|no gradient for")


# ---- The rules ----------------------------------------------------------------------------------
@cheat("constants.py", "0.5 if SMOKE", "1 if SMOKE")
def test_an_edited_constant(result, runs):
    """Gain: twice the training time. It shows: other rules, and a dirty commit."""
    shows(result, runs["honest"])
    assert values(result[1])["commit"].endswith("+dirty")


@cheat(
    "train.py",
    "from harness import gpu\n",
    "import constants\nconstants.TIME_BUDGET = 1\nfrom harness import gpu\n",
)
def test_a_constant_changed_in_memory(result, runs):
    """Gain: the same, with every fixed file as it was."""
    shows(result, runs["honest"])
    assert float(values(result[1])["training_seconds"]) > 0.5


@cheat("harness/evaluation.py", "> C.LOGIT_TOLERANCE:", "> math.inf:")
def test_an_edited_harness(result, runs):
    """Gain: whatever the checks refuse. It shows: other rules."""
    shows(result, runs["honest"])


@cheat(
    "train.py",
    "model, optimizers = build_tr",
    "torch.manual_seed(7)\n    model, optimizers = build_tr",
)
def test_a_seed_of_its_own(result):
    """Gain: a lucky seed passes for an idea, and repeats with other seeds are no repeats."""
    stopped(result, "train.py set a seed; it comes from the rules")


# ---- The result ---------------------------------------------------------------------------------
@cheat("train.py", EVALUATE, 'print("val_bpb: 0.100000")\n    return')
def test_its_own_val_bpb_line_instead_of_the_summary(result):
    """Gain: any number. The exit status says that it is none."""
    stopped(result, "^val_bpb: 0.100000|\nval_bpb: 0.100000")


@cheat("train.py", EVALUATE, f'print("val_bpb: 0.100000")\n    {EVALUATE}')
def test_its_own_val_bpb_line_before_the_summary(result):
    """Gain: a reader that takes the first line. The count that program.md asks for is not 1."""
    program = (ROOT / "program.md").read_text("utf-8")
    assert "grep -c '^val_bpb:' run.log" in program
    assert len(re.findall("^val_bpb:", result[1], re.MULTILINE)) == 2


@cheat("train.py", SUMMARY, f"for _ in range(2): {SUMMARY}")
def test_a_summary_that_is_printed_twice(result):
    """Gain: none, but a log with two results has none."""
    status, log = result
    assert status == 1 and "print once" in log
    assert len(re.findall("^val_bpb:", log, re.MULTILINE)) == 1


CATCH = """try:
        run.evaluate(lambda idx: model(idx.roll(-1, 1)))
    except RuntimeError as error:
        print(error)
        sys.exit(0)"""


@cheat("train.py", EVALUATE, CATCH)
def test_the_error_caught_and_exit_status_0(result):
    """Gain: a script that asks for the exit status alone takes a refused run for a good one."""
    stopped(result, "evaluation refused: the model sees the future")


TRAINS = "step.loss = train_step("


@cheat(
    "train.py",
    TRAINS,
    f"import os, signal; os.kill(os.getpid(), signal.SIGINT)\n        {TRAINS}",
)
def test_an_interrupted_run(result):
    """Gain: none, but Ctrl-C must leave no result."""
    stopped(result, "KeyboardInterrupt")


@cheat(
    "train.py",
    TRAINS,
    f"import os, signal; os.kill(os.getpid(), signal.SIGTERM)\n        {TRAINS}",
)
def test_a_run_that_is_ended_by_a_time_limit(result):
    """Gain: none, but SIGTERM must leave no result."""
    status, log = result
    assert status == -signal.SIGTERM and "val_bpb" not in log, log


@cheat("train.py", STEPS, f"return\n    {STEPS}")
def test_a_run_that_ends_before_it_trains(result):
    """Gain: none, but status 0 would mean a result."""
    stopped(result, "batch: ")
