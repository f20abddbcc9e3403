"""What a run prints: step lines, and the summary that tools and agents read."""

import contextlib
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import copy_checkout

import constants as C
import train
from harness.data import load_manifest
from harness.run import Run, Step

HARNESS = Path(C.__file__).parent / "harness"
FIRST_NINE = (
    "val_bpb training_seconds total_seconds peak_vram_mb mfu_percent total_tokens_M"
)
FIRST_NINE = f"{FIRST_NINE} num_steps num_params_M depth".split()
STEP_LINE = re.compile(
    r"step \d{5} \(\d+\.\d%\) \| loss: \d+\.\d{4} \| lrm: \d\.\d\d \| dt: \d+ms \| "
    r"tok/sec: [\d,]+ \| epoch: \d+ \| remaining: \d+s"
)


@pytest.fixture(scope="module")
def summary(prepared) -> str:
    """The summary of a run whose model knows nothing, with 8 steps of a pretended second."""
    patch, seconds = pytest.MonkeyPatch(), iter(range(100))
    patch.setattr(C, "TIME_BUDGET", 8.0)
    run = Run(prepared, torch.device("cpu"))
    patch.undo()
    time = 0.0
    run.clock.now = lambda: time
    for step in run.steps(2, 3):
        assert len(list(step.batches)) == 3
        step.loss, time = 1.0, float(next(seconds) + 1)
    run.evaluate(lambda idx: torch.zeros(*idx.shape, C.VOCAB_SIZE))
    lines = []
    patch.setattr("builtins.print", lambda *args, **kwargs: lines.append(*args))
    run.print_summary(
        num_params=1_234_567, depth=3, flops_per_token=1e9, attention="masked"
    )
    patch.undo()
    (text,) = lines
    return text


def parse(summary: str) -> dict[str, str]:
    return dict(line.split(": ", 1) for line in summary.splitlines()[1:])


def test_the_summary_has_its_keys_in_order_the_familys_nine_first(summary):
    keys = [line.split(":")[0] for line in summary.splitlines()]
    assert keys == [line.split(":")[0] for line in C.SUMMARY.splitlines()]
    assert keys[:10] == ["---", *FIRST_NINE] and keys[10:12] == ["tok_per_sec", "tflops"]
    ours = {
        "tok_per_sec",
        "startup_seconds",
        "import_seconds",
        "open_seconds",
        "compile_seconds",
    }
    ours |= {"data_wait_percent", "eval_seconds", "epochs", "attention", "gpu", "seed"}
    assert ours | {"commit", "rules"} <= set(keys) and len(set(keys)) == len(keys)


def test_every_line_of_the_summary_is_a_key_and_a_value(summary):
    first, *lines = summary.splitlines()
    assert first == "---"
    assert all(re.fullmatch(r"[a-zA-Z_]+: \S.*", line) for line in lines)
    assert "\r" not in summary and summary.count("val_bpb:") == 1


def test_the_numbers_of_the_summary_are_those_of_the_run(summary, prepared):
    values = parse(summary)
    tokens = 8 * 3 * 2 * C.MAX_SEQ_LEN
    assert values["num_steps"] == "8" and values["depth"] == "3"
    assert values["training_seconds"] == "8.0" and values["num_params_M"] == "1.2"
    assert values["tok_per_sec"] == str(tokens // 8)
    assert (
        values["tflops"] == f"{tokens / 8 * 1e9 / 1e12:.2f}" == "1.54"
    )  # 1e9 FLOPs a token
    assert values["total_tokens_M"] == f"{tokens / 1e6:.1f}"
    manifest = load_manifest(prepared)["rows"]
    sizes = [about["size"] for about in manifest.values() if about["split"] == "train"]
    there = sum(sizes) // 2 // (C.MAX_SEQ_LEN + 1)
    assert values["epochs"] == f"{8 * 3 * 2 / there:.2f}"
    assert values["attention"] == "masked" and values["seed"] == str(C.SEED)
    assert float(values["eval_seconds"]) >= 0 and float(values["startup_seconds"]) > 0
    assert float(values["total_seconds"]) >= float(values["startup_seconds"])
    parts = sum(
        float(values[f"{part}_seconds"]) for part in ("import", "open", "compile")
    )
    assert parts == pytest.approx(
        float(values["startup_seconds"]), abs=0.2
    )  # four roundings
    assert 0 < float(values["data_wait_percent"]) < 100  # of pretended seconds


def test_the_bits_per_byte_of_the_summary_are_those_of_a_guess(summary, prepared):
    run = Run(prepared, torch.device("cpu"))
    targets = np.concatenate([row[1:] for row in run.val_rows])
    assert len(targets) == C.EVAL_TOKENS
    text = targets[targets < C.BOS_ID]
    nbytes = sum(
        len(run.tokenizer.encoding.decode_single_token_bytes(int(i))) for i in text
    )
    expected = math.log2(C.VOCAB_SIZE) * len(text) / nbytes
    assert float(parse(summary)["val_bpb"]) == pytest.approx(expected, abs=2e-6)


def test_a_run_without_a_gpu_says_so(summary):
    values = parse(summary)
    assert values["gpu"] == "none (cpu)" and values["peak_vram_mb"] == "0.0"
    assert values["mfu_percent"] == "nan"


FIXED = [
    "constants.py",
    "prepare.py",
    *(f"harness/{p.name}" for p in HARNESS.glob("*.py")),
]


@pytest.fixture
def checkout(tmp_path, monkeypatch) -> Path:
    """A copy of the files that are not edited, which a run takes for its own."""
    monkeypatch.setattr("harness.run.ROOT", tmp_path / "checkout")
    return copy_checkout(tmp_path / "checkout")


def rules_of(folder: Path) -> str:
    return Run(folder, torch.device("cpu")).rules


@pytest.mark.parametrize("name", sorted(FIXED))
def test_a_changed_byte_of_any_fixed_file_changes_the_rules(prepared, checkout, name):
    before, path = rules_of(prepared), checkout / name
    body = bytearray(path.read_bytes())
    body[len(body) // 2] ^= 1
    path.write_bytes(body)
    assert rules_of(prepared) != before


def test_a_fixed_file_that_is_added_or_gone_changes_the_rules(prepared, checkout):
    before = rules_of(prepared)
    (checkout / "harness" / "more.py").write_text("")
    more = rules_of(prepared)
    (checkout / "harness" / "more.py").unlink()
    assert rules_of(prepared) == before
    (checkout / "harness" / "peaks.py").unlink()
    assert len({before, more, rules_of(prepared)}) == 3


def test_what_is_edited_and_what_is_compiled_is_no_rule(prepared, checkout):
    before = rules_of(prepared)
    assert re.fullmatch("smoke-[0-9a-f]{8}", before)
    with pytest.MonkeyPatch.context() as patch:  # wherever the checkout lies
        patch.setattr("harness.run.ROOT", HARNESS.parent)
        assert rules_of(prepared) == before
    (checkout / "train.py").write_text("")
    (checkout / "harness" / "__pycache__").mkdir()
    (checkout / "harness" / "__pycache__" / "run.cpython-312.pyc").write_bytes(b"x")
    assert rules_of(prepared) == before


def test_a_constant_that_is_changed_in_memory_shows_in_the_rules_and_the_seed_does_not(
    prepared, monkeypatch
):
    before = rules_of(prepared)
    monkeypatch.setattr(C, "SEED", C.SEED + 1)
    assert rules_of(prepared) == before
    monkeypatch.setattr(C, "TIME_BUDGET", C.TIME_BUDGET + 1)
    assert rules_of(prepared) != before


def test_the_commit_is_a_short_hash_or_none(summary):
    assert re.fullmatch(r"[0-9a-f]{7,}(\+dirty)?|none", parse(summary)["commit"])


# ---- Step lines ---------------------------------------------------------------------------------
def a_step(number: int) -> Step:
    step = Step(number, 0.4321, 1)
    step.loss, step.lrm, step.tokens, step.seconds = 3.14159, 0.875, 524_288, 0.315
    return step


def test_a_step_line_has_the_fields_of_the_family():
    line = train.step_line(a_step(412), 5.0)
    assert STEP_LINE.fullmatch(line)
    assert line.startswith("step 00412 (43.2%) | loss: 3.1416 | lrm: 0.8")
    assert "| dt: 315ms | tok/sec: 1,664,406 | epoch: 1 |" in line


def test_the_time_that_remains_is_never_negative():
    assert train.step_line(a_step(1), C.TIME_BUDGET + 1.0).endswith("remaining: 0s")
    assert train.step_line(a_step(1), C.TIME_BUDGET - 2.0).endswith("remaining: 2s")


def test_the_log_has_whole_lines_and_the_first_step(prepared, capsys):
    run = Run(prepared, torch.device("cpu"))
    run.finished.extend(map(a_step, range(100)))
    train.report(run)
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert not run.finished and out.endswith("\n") and "\r" not in out
    assert lines[0].startswith("step 00000 ") and all(map(STEP_LINE.fullmatch, lines))


def test_a_run_is_evaluated_once_so_that_nothing_is_selected_on_validation_text(
    prepared, monkeypatch
):
    monkeypatch.setattr(C, "TIME_BUDGET", 1.0)
    for model in (
        lambda idx: torch.zeros(*idx.shape, C.VOCAB_SIZE),
        lambda idx: "refused",
    ):
        run = Run(prepared, torch.device("cpu"))
        for step in run.steps(2, 1):
            step.loss = float(len(list(step.batches)))
        with contextlib.suppress(
            RuntimeError
        ):  # a refused model has seen the text as well
            run.evaluate(model)
        with pytest.raises(RuntimeError, match="evaluate after training, once"):
            run.evaluate(lambda idx: torch.zeros(*idx.shape, C.VOCAB_SIZE))
