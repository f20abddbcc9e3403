"""Each cheat is committed, by accident or not, against a real smoke run, which must notice.

A cheat is an edit of one file in a throw-away copy of the repository, where minimal_train.py stands
as train.py; the rules are smaller still than those of smoke: see runs.py.
"""

import math
import re
import shutil
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest

import constants as C
from conftest import copy_checkout
from harness.manifest import load_manifest
from harness.tokenizer import Tokenizer
from loop.ledger import read_run
from runs import (
    NO_DRY_RUN,
    SHARED,
    SMALLER,
    Edit,
    Result,
    apply,
    run_all,
    stopped,
    values,
)

EVALUATE, STEPS = "run.evaluate(model)", "for step in run.steps():"
SUMMARY, TRAINS = "run.print_summary(", "step.loss = train_step("
CHEATS: dict[str, list[Edit]] = {}


def cheat(name: str, *texts: str):
    """Decorate a test with its edit of file `name`: what to replace, by what, and so on."""

    def register(test):
        pairs = zip(texts[::2], texts[1::2], strict=True)
        CHEATS[test.__name__] = [(name, old, new) for old, new in pairs]
        return test

    return register


@pytest.fixture(scope="module")
def runs(request, tmp_path_factory) -> dict[str, Result]:
    """Run the honest script and the cheats of all selected tests: exit status and log."""
    folder = tmp_path_factory.mktemp("cheats")
    honest = copy_checkout(folder / "honest")
    shutil.copy(Path(__file__).with_name("minimal_train.py"), honest / "train.py")
    apply(honest, [*SMALLER, NO_DRY_RUN])
    git = ["git", "-C", str(honest), "-c", "user.name=a", "-c", "user.email=a@localhost"]
    git += ["-c", "commit.gpgsign=false"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "start"]):
        subprocess.run([*git, *command], check=True)
    selected = [item.name for item in request.session.items if item.name in CHEATS]
    for name in selected:
        shutil.copytree(honest, folder / name)
        apply(folder / name, CHEATS[name])
    return run_all([folder / name for name in ("honest", *selected)])


@pytest.fixture
def result(runs, request) -> Result:
    return runs[request.node.name]


def shows(result: Result, honest: Result) -> None:
    """Assert that the run's `rules:` is not the honest run's, so that it is void."""
    mine, other = values(result[1]), values(honest[1])
    assert (result[0], honest[0]) == (0, 0), result[1]
    assert mine["rules"].startswith("smoke-") and mine["rules"] != other["rules"]


def test_an_honest_run_has_a_result(runs):
    """What follows is refused for the cheat alone."""
    status, log = runs["honest"]
    assert status == 0 and len(re.findall("^val_bpb:", log, re.MULTILINE)) == 1, log
    assert 0 < float(values(log)["val_bpb"]) < 6 and "without a result" not in log
    assert "warning:" not in log and not values(log)["commit"].endswith("+dirty")


# ---- The model ----------------------------------------------------------------------------------
LEAK = "evaluation refused: the model sees the future"


@cheat("train.py", "is_causal=self.causal", "is_causal=False")
def test_a_mask_that_sees_the_future(result):
    """Gain: every position reads the tokens that it is to predict; val_bpb falls towards 0."""
    stopped(result, LEAK)
    assert "\nstep " not in result[1]  # before the clock


@cheat("train.py", EVALUATE, f"model.causal = False\n    {EVALUATE}")
def test_a_mask_that_sees_the_future_in_the_evaluation_alone(result):
    """Gain: the same, and the warm-up has seen an honest model."""
    stopped(result, LEAK)
    assert "\nstep " in result[1]


KEYS = "self.query(x), self.key(x)"


@cheat("train.py", KEYS, "self.query(x), F.pad(self.key(x)[:, 1:], (0, 0, 0, 1))")
def test_keys_taken_from_the_token_behind(result):
    """Gain: a key tells what follows its token, so the last query finds what it is to predict."""
    stopped(result, LEAK)


@cheat("train.py", EVALUATE, "run.evaluate(lambda idx: model(idx.roll(-1, 1)))")
def test_targets_shifted_by_one(result):
    """Gain: the target is the last input; copying it costs no bits."""
    stopped(result, LEAK)


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
    """Gain: the same, a little at a time; over four batches it adds up."""
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
        result, r"evaluation refused: .*\(4, 64, 512\) .*, not logits \(4, 64, 1024\)"
    )


@cheat("train.py", EVALUATE, "run.evaluate(lambda idx: model(idx).mean() / 9)")
def test_a_returned_loss_instead_of_logits(result):
    """Gain: the model names its own loss, over whatever it likes."""
    stopped(
        result, r"evaluation refused: model\(idx\) gave \(\) torch.float32, not logits"
    )


FEW_ROWS = """def uniform(idx):
        if len(idx) > 3:
            raise torch.OutOfMemoryError
        return torch.zeros(*idx.shape, VOCAB_SIZE)
    run.evaluate(uniform)"""


@cheat(
    *("train.py", "TOTAL_BATCH_SIZE = 2**19", "TOTAL_BATCH_SIZE = 192 * 2048"),
    *("DEVICE_BATCH_SIZE = 128", "DEVICE_BATCH_SIZE = 192"),
    *(EVALUATE, FEW_ROWS),
)
def test_fewer_evaluation_tokens_through_the_batch_size(result):
    """Gain: a model that runs out of memory chooses the batch size; 3 leaves the last row out.

    The model is uniform, so that its bits per byte over all 16 rows are known.
    """
    folder = SHARED / "smoke"
    rows = load_manifest(folder)["rows"]
    (val,) = (
        folder / "rows" / name for name, about in rows.items() if about["split"] == "val"
    )
    ids = np.fromfile(val, "<u2").reshape(16, 65)[:, 1:]
    sizes = Tokenizer.load(folder / "tokenizer").token_bytes
    expected = [
        math.log2(C.VOCAB_SIZE) * (sizes[k] > 0).sum() / sizes[k].sum()
        for k in (ids, ids[:15])
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
OWN_TEXT = f"""import argparse, inspect, typing
    text = "".join(open(m.__file__).read() for m in (argparse, inspect, typing))
    ids = torch.from_numpy(run.tokenizer.encode(text)[: 60 * 15 * 65].astype("int64"))
    for rows in ids.view(60, 15, 65):
        train_step(model, optimizers, [(rows[:, :-1], rows[:, 1:])], 1)
    {STEPS}"""


@cheat("train.py", STEPS, OWN_TEXT)
def test_training_on_text_of_its_own_before_the_clock_starts(result):
    """Gain: a model that has seen text; the first loss shows it."""
    stopped(result, r"the loss of step 0 is [3-6]\.\d+, and a guess has ln 1024 = 6.93")


EARLY = f"""from harness.loader import load_batches
    early = load_batches(run._train_rows, run.batch_size, run.device)
    train_step(model, optimizers, [next(early) for _ in range(2)], 2)
    {STEPS}"""


@cheat("train.py", STEPS, EARLY)
def test_training_rows_read_before_the_clock_starts(result):
    """Gain: a start that the first loss would not show; the rows that were read are counted."""
    stopped(result, "12 rows were read off the clock")
    assert "\nstep " not in result[1]


PRETRAINED = f"""random = ([run.random_batch(run.batch_size)] for _ in range(MANY))
    for batches in random:
        train_step(model, optimizers, batches, 1)
    {STEPS}"""


@cheat("train.py", STEPS, PRETRAINED.replace("MANY", "65"))
def test_training_on_random_ids_before_the_clock_starts(result):
    """Gain: norms, scales and an optimizer's state that the budget did not pay for."""
    stopped(result, "65 backward passes before the clock starts, 64 at most")


@cheat("train.py", STEPS, PRETRAINED.replace("MANY", "9"))
def test_a_few_backward_passes_before_the_clock_are_allowed(result):
    """No cheat: a scale found from gradients."""
    assert result[0] == 0, result[1]


OPENED = "run = open_run()"
LONG_AGO = f"import sys; sys.modules['constants'].STARTED_AT -= 700\n    {OPENED}"


@cheat("train.py", OPENED, LONG_AGO)
def test_training_before_the_run_is_opened(result):
    """Gain: any time at all, on any text; here 700 s are said to have passed."""
    stopped(result, r"start-up took 7\d\d of 600 s, 7\d\d s of it before open_run")


LATE = f"""kept = [run.random_batch(run.batch_size)] * 2
    LATER
    {EVALUATE}"""


@cheat(
    "train.py", EVALUATE, LATE.replace("LATER", "train_step(model, optimizers, kept, 2)")
)
def test_training_after_the_clock_has_stopped(result):
    """Gain: any time at all, on batches that were kept."""
    stopped(result, "a backward pass after training has ended")


ALL_GRADS = "x, y = kept[0]; torch.autograd.grad(model(x).sum(), model.wte.weight)"


@cheat("train.py", EVALUATE, LATE.replace("LATER", ALL_GRADS))
def test_gradients_taken_after_the_clock_has_stopped(result):
    """Gain: the same, without backward()."""
    stopped(result, "a backward pass after training has ended")


@cheat("train.py", EVALUATE, LATE.replace("LATER", "optimizers[0].step()"))
def test_an_optimizer_step_after_the_clock_has_stopped(result):
    """Gain: the same, with gradients that were kept."""
    stopped(result, "an optimizer step after training has ended")


SLOWLY = """while run.clock.now() - run.clock.started_at - run.clock.seconds < 2.5:
        model.lm_head.weight.data *= 1.0"""


@cheat("train.py", EVALUATE, LATE.replace("LATER", SLOWLY))
def test_other_work_after_the_clock_has_stopped(result):
    """Gain: weights that are worked on by hand."""
    stopped(result, r"evaluation refused: \d+\.\d s were used outside the clock")


LAZY = f"""kept, seen = [run.random_batch(run.batch_size)] * 2, []
    def lazy(idx):
        if not seen:
            seen.append(idx)
            LATER
        return model(idx)
    {EVALUATE.replace("model", "lazy")}"""
IN_IT = "with torch.enable_grad(): train_step(model, optimizers, kept, 2)"


@cheat("train.py", EVALUATE, LAZY.replace("LATER", IN_IT))
def test_training_in_the_first_call_of_the_evaluation(result):
    """Gain: a finish (a calibration, a soup) that takes any time."""
    stopped(result, "a backward pass after training has ended")


@cheat("train.py", EVALUATE, LAZY.replace("LATER", "run._train_rows[0]"))
def test_training_rows_read_in_the_evaluation(result):
    """Gain: text to calibrate on, after the rows were counted."""
    stopped(result, "1 rows were read off the clock")


AVERAGED = f"""before = [p.detach().clone() for p in model.parameters()]
    with torch.no_grad():
        for p, q in zip(model.parameters(), before, strict=True):
            p.lerp_(q, 0.5)
    {EVALUATE}"""


@cheat("train.py", EVALUATE, AVERAGED)
def test_weights_averaged_after_training_are_allowed(result):
    """No cheat: an average of snapshots that were kept in training."""
    assert result[0] == 0, result[1]


@cheat(
    *("train.py", TRAINS, f"first = next(step.batches)\n        {TRAINS}"),
    *("step.batches, step.micro_steps)", "[first], 1)"),
    *(EVALUATE, f"train_step(model, optimizers, step.batches, 1)\n    {EVALUATE}"),
)
def test_a_batch_after_the_clock_has_stopped(result):
    """Gain: tokens that the budget does not hold."""
    stopped(result, r"step \d+ is over; its batches cannot be had now")


# ---- Files --------------------------------------------------------------------------------------
READS = "is the harness's to read"


def reads_file(text: str, before: str = "pass") -> tuple[str, str, str]:
    """Return the edit that runs `text`, in which folder is the prepared data's, once opened.

    before: what is run before the run is opened, such as to leave the file of an earlier one.
    """
    names = "import numpy as np; from harness.files import data_dir; folder = data_dir()"
    return "train.py", OPENED, f"{names}\n    {before}\n    {OPENED}\n    {text}"


@cheat(
    *reads_file("np.load('model.npz')['wte']", "np.savez('model.npz', wte=np.ones(3))")
)
def test_a_warm_start_from_the_model_of_an_earlier_run(result):
    """Gain: five minutes of training that another run paid for."""
    stopped(result, f"model.npz {READS}")


@cheat(*reads_file("torch.load('old.pt')", "torch.save({}, 'old.pt')"))
def test_a_warm_start_from_a_checkpoint(result):
    """Gain: the same, from a file of its own."""
    stopped(result, f"old.pt {READS}")


@cheat(*reads_file("[np.fromfile(p, '<u2') for p in folder.glob('rows/*')]"))
def test_rows_read_from_their_files(result):
    """Gain: counts of training text, and of validation text, at start-up."""
    stopped(result, rf"\.u16 {READS}")


@cheat(*reads_file("next(folder.glob('shards/*')).read_bytes()"))
def test_text_read_from_the_shards(result):
    """Gain: the same, before it was tokenized."""
    stopped(result, rf"\.parquet {READS}")


@cheat(*reads_file("(folder / 'manifest.json').open()"))
def test_the_manifest_read_after_the_run_is_opened(result):
    """Gain: it names the row files."""
    stopped(result, f"manifest.json {READS}")


SAVES = """import json, pathlib
    np.save('own.npy', np.arange(3))
    pathlib.Path('own.json').write_text('[1]'); pathlib.Path('own.json').read_text()"""


@cheat(*reads_file(SAVES))
def test_files_of_its_own_are_allowed(result):
    """No cheat: statistics that are written, and text that is read."""
    assert result[0] == 0, result[1]


COUNTED = "counts = np.bincount(run.ROWS.files[0].ravel())"


@cheat(*reads_file(COUNTED.replace("ROWS", "train_rows")))
def test_training_rows_by_the_run_without_being_counted(result):
    """Gain: bigram counts at start-up."""
    stopped(result, "no attribute 'train_rows'")


@cheat(*reads_file(COUNTED.replace("ROWS", "val_rows")))
def test_validation_rows_by_the_run_without_being_counted(result):
    """Gain: the same of the text that is to be predicted."""
    stopped(result, "no attribute 'val_rows'")


@cheat(*reads_file("counts = np.bincount(run._val_rows[3])"))
def test_validation_rows_by_hand_are_counted(result):
    """Gain: the same, a row at a time."""
    stopped(result, "1 rows were read off the clock")


# ---- The rules ----------------------------------------------------------------------------------
# Written as if before the start: the clock of a file's time may be a few ms behind, or not.
OWN_MODULE = """import os, pathlib
pathlib.Path("own.py").write_text("")
os.utime("own.py", (0, 0))
import own
"""


@cheat(
    *("train.py", "import torch\n", f"{OWN_MODULE}import torch\n"),
    *("LR = 0.01", "LR = float(os.environ.get('LR', 0.01))"),
)
def test_a_run_that_its_commit_does_not_repeat(result):
    """Gain: none, but nobody can have the result again: a module, a variable, neither in git."""
    status, log = result
    assert status == 0, log
    before, _, summary = log.partition("\n---\n")
    lines = [line for line in before.splitlines() if line.startswith("warning:")]
    assert lines == [
        "warning: repeat: git does not track own.py; put what was imported into train.py",
        "warning: repeat: train.py reads the environment (LR); make it a knob",
    ]
    assert not C.WARNINGS["repeat"]  # it voids nothing


FEWER = (
    "os.environ['AUTORESEARCH_CACHE'] += '/fewer'; prepare.main(['--num-shards', '2'])"
)


@cheat("train.py", OPENED, f"import os, prepare; {FEWER}\n    {OPENED}")
def test_fewer_training_shards(result, runs):
    """Gain: easier text, or text that is seen twice. It shows in `data:`; see also test_rules."""
    status, log = result
    mine, other = values(log)["data"], values(runs["honest"][1])["data"]
    assert status == 0 and re.fullmatch("[0-9a-f]{8}", other) and mine != other, log


@cheat("constants.py", "0.5 if SMOKE", "1 if SMOKE")
def test_an_edited_constant(result, runs):
    """Gain: twice the training time. It shows: other rules, and a dirty commit."""
    shows(result, runs["honest"])
    assert values(result[1])["commit"].endswith("+dirty")


@cheat(
    "train.py",
    OPENED,
    f"import constants\n    constants.TIME_BUDGET = 1\n    {OPENED}",
)
def test_a_constant_changed_in_memory(result, runs):
    """Gain: the same, with every fixed file as it was."""
    shows(result, runs["honest"])
    assert float(values(result[1])["training_seconds"]) > 0.5


@cheat("harness/evaluation.py", "<= C.LOGIT_TOLERANCE)", "<= math.inf)")
def test_an_edited_harness(result, runs):
    """Gain: whatever the checks refuse. It shows: other rules."""
    shows(result, runs["honest"])


@cheat(
    "train.py",
    OPENED,
    f"{OPENED}\n    torch.manual_seed(7)",
)
def test_a_seed_of_its_own(result):
    """Gain: a lucky seed passes for an idea, and repeats with other seeds are no repeats."""
    stopped(result, "train.py set a seed; it comes from the rules")


# ---- The result ---------------------------------------------------------------------------------
THREAD = (
    "import threading, time; threading.Thread(target=time.sleep, args=(900,)).start()"
)


@cheat("train.py", OPENED, f"{OPENED}\n    {THREAD}")
def test_a_thread_that_never_ends_does_not_keep_the_run(result):
    """Gain: none, but the run would end by a time limit though its result is there."""
    status, log = result
    assert status == 0 and "val_bpb" in values(log), log


@cheat("train.py", STEPS, f"{THREAD}\n    return\n    {STEPS}")
def test_a_thread_that_never_ends_does_not_keep_a_run_without_a_result(result):
    """Gain: none; the status is 1, at once."""
    stopped(result, "batch: ")


@cheat("train.py", EVALUATE, 'print("val_bpb: 0.100000")\n    return')
def test_its_own_val_bpb_line_instead_of_the_summary(result):
    """Gain: any number. The exit status says that it is none."""
    stopped(result, "^val_bpb: 0.100000|\nval_bpb: 0.100000")


@cheat("train.py", EVALUATE, f'print("val_bpb: 0.100000")\n    {EVALUATE}')
def test_its_own_val_bpb_line_before_the_summary(result):
    """Gain: a reader that takes the first line. The loop wants exactly one."""
    assert len(re.findall("^val_bpb:", result[1], re.MULTILINE)) == 2
    assert not read_run(f"{result[1]}\nexit status 0\n", {}, {}).ok


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
        raise SystemExit(0)"""


@cheat("train.py", EVALUATE, CATCH)
def test_the_error_caught_and_exit_status_0(result):
    """Gain: a script that asks for the exit status alone takes a refused run for a good one."""
    stopped(result, LEAK)


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
