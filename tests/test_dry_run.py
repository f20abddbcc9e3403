"""The full rules beside a smoke run: what fails at full size alone stops the smoke run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import constants as C
import forks
from conftest import copy_checkout, ends_with_its_parent
from harness import dry_run, run

SCRIPT = """import constants as C
import torch
from harness.run import open_run

TOTAL, DEVICE = 2**17, 64


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.wte = torch.nn.Embedding(C.VOCAB_SIZE, 8)
        self.wpe = torch.nn.Parameter(torch.zeros({positions}, 8))

    def forward(self, idx):
        return (self.wte(idx) + self.wpe) @ self.wte.weight.T


def train_step(model, optimizers, batches, micro_steps):
    for x, y in batches:
        loss = model(x).square().mean()
        loss.backward()
        {line}
    for optimizer in optimizers:
        optimizer.step()
    return loss


run = open_run()
model = Model()
optimizers = [torch.optim.AdamW(model.parameters(), fused=True)]
run.warm_up(model, optimizers, train_step, total_batch_size={total}, device_batch_size=64)
print("the clock would start")
"""


def run_dry(tmp_path: Path, **parts: str) -> subprocess.CompletedProcess:
    """Run a script as the dry run does."""
    parts = {"positions": "C.MAX_SEQ_LEN", "line": "pass", "total": "2**17"} | parts
    folder = copy_checkout(tmp_path / "checkout")
    (folder / "train.py").write_text(SCRIPT.format(**parts), "utf-8")
    env = os.environ | {"AUTORESEARCH_SMOKE": "0", "AUTORESEARCH_DRY_RUN": "1"}
    env["AUTORESEARCH_CACHE"] = str(tmp_path / "cache")
    done = forks.run(folder / "train.py", env=env)
    assert not (tmp_path / "cache").exists()  # no data is prepared, nothing is written
    return done


def test_a_model_that_works_at_full_size_ends_well_before_the_clock(tmp_path):
    done = run_dry(tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    # 8192 x 8 and 2048 x 8 numbers.
    size = "0.1 M parameters, 1 micro-step of up to 64 rows per step"
    assert done.stdout == f"also checked under the full rules: {size}\n"


def test_a_length_that_only_the_smoke_rules_have_is_an_error(tmp_path):
    done = run_dry(tmp_path, positions="256")
    assert done.returncode == 1 and "256" in done.stderr.splitlines()[-1]


def test_a_batch_that_only_the_smoke_rules_could_make_is_an_error(tmp_path):
    done = run_dry(tmp_path, total="3 * 2**16")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(
        "ValueError: TOTAL_BATCH_SIZE (196608 "
    )


def test_what_shapes_cannot_tell_is_left_to_the_real_run(tmp_path):
    done = run_dry(tmp_path, line="print(loss.item())")
    assert done.returncode == 0, done.stderr
    assert "the full model's step was not tried" in done.stdout


def test_a_model_can_be_copied_and_change_its_dtype(tmp_path):
    line = "import copy; average = copy.deepcopy(model).to(torch.bfloat16)"
    line += "; assert isinstance(average.wpe, torch.nn.Parameter)"
    line += "; assert average.wpe.dtype == torch.bfloat16 != model.wpe.dtype; average(x)"
    done = run_dry(tmp_path, line=line)
    assert done.returncode == 0, done.stderr


COMPILES = """import harness.ops
        def own(t):
            return {}
        harness.ops.compiled(own)(model(x))"""


@pytest.mark.parametrize("code", ["t * 2 if t.abs().max() > 1 else t", "print(t) or t"])
def test_what_a_gpu_could_not_compile_whole_is_refused(tmp_path, code):
    done = run_dry(tmp_path, line=COMPILES.format(code))
    assert done.returncode == 1, done.stdout
    last = done.stderr.splitlines()[-1]
    assert last.startswith("RuntimeError: @compiled own cannot be compiled on a GPU: ")


@pytest.mark.parametrize(
    "code", ["t * 2 if t.ndim > 1 else t", "torch.where(t > 0, t, 0)"]
)
def test_what_a_gpu_compiles_whole_is_not(tmp_path, code):
    done = run_dry(tmp_path, line=COMPILES.format(code))
    assert (done.returncode, done.stderr) == (0, "") and "not tried" not in done.stdout


def test_what_a_gpu_compiles_for_each_of_many_layers_is_not_refused(tmp_path):
    """A number of each layer's own is compiled in: as many graphs as layers."""
    line = COMPILES.format("t * layer.scale").replace("own(t):", "own(t, layer):")
    line = line.partition("\n        harness.ops.compiled")[0]
    line += "\n        for i in range(20):"
    line += "\n            layer = torch.nn.Identity(); layer.scale = 1 / (i + 1)"
    line += "\n            harness.ops.compiled(own)(model(x), layer)"
    done = run_dry(tmp_path, line=line)
    assert (done.returncode, done.stderr) == (0, "") and "not tried" not in done.stdout


def test_a_compiled_function_that_cannot_work_says_so_as_without_compilation(tmp_path):
    done = run_dry(tmp_path, line=COMPILES.format("t + t[..., :3]"))
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and "length 3" in last and "@compiled" not in last


def test_what_of_a_run_is_not_there_without_data_is_no_error(tmp_path):
    assert run_dry(tmp_path, line="run.seed + 1").stderr == ""
    done = run_dry(tmp_path, line="run.tokenizer.token_bytes")
    assert done.returncode == 0, done.stderr
    assert "run.tokenizer is not there without data" in done.stdout


def test_it_does_not_wait_for_the_end_of_python(tmp_path):
    done = run_dry(tmp_path, line="import atexit; atexit.register(print, 'the end')")
    assert (done.returncode, done.stderr) == (0, "")
    assert (
        done.stdout.startswith("also checked under the full rules: ")
        and "the end" not in done.stdout
    )


def test_it_works_beside_the_warm_up_which_does_not_wait_for_it(prepared, monkeypatch):
    calls = []
    monkeypatch.setattr(run, "warm_up", lambda *_: calls.append("warm-up") or (1, 1))
    monkeypatch.setattr(dry_run, "finish", lambda _: calls.append("dry run") or "fine")
    ours = run.Run(prepared, torch.device("cpu"))
    ours.dry_run = object()
    model = torch.nn.Linear(1, 1)
    batch = {"total_batch_size": C.FULL_SEQ_LEN, "device_batch_size": 1}
    ours.warm_up(model, [], None, **batch)
    assert calls == ["warm-up", "dry run"]


PARENT = """
import os, subprocess, sys
os.environ |= {"AUTORESEARCH_SMOKE": "0", "AUTORESEARCH_DRY_RUN": "1"}
subprocess.run([sys.executable, "train.py"])
"""


def test_a_dry_run_that_hangs_ends_with_a_smoke_run_that_failed_before_it(tmp_path):
    folder = copy_checkout(tmp_path / "checkout")
    hangs = "import os, time; open('pid', 'w').write(str(os.getpid())); time.sleep(50)"
    parts = {"positions": "C.MAX_SEQ_LEN", "line": hangs, "total": "2**17"}
    (folder / "train.py").write_text(SCRIPT.format(**parts), "utf-8")
    parent = subprocess.Popen([sys.executable, "-c", PARENT], cwd=folder)
    ends_with_its_parent(parent, folder / "pid")


def finish(code: str) -> str:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return dry_run.finish(subprocess.Popen([sys.executable, "-c", code], **pipes))


def test_the_smoke_run_stops_with_the_last_line_of_a_dry_run_that_failed():
    assert finish("print('a'); print('full rules: fine')") == "full rules: fine"
    with pytest.raises(
        RuntimeError, match="^under the full rules: ValueError: 7 is odd$"
    ):
        finish("raise ValueError('7 is odd')")


def test_the_line_of_train_py_is_named(tmp_path):
    script = tmp_path / "train.py"
    script.write_text("\n\nraise ValueError('7 is odd')\n")
    with pytest.raises(RuntimeError, match=r"7 is odd \(train\.py, line 3\)$"):
        finish(f"import runpy; runpy.run_path({str(script)!r})")


def test_a_dry_run_that_hangs_is_given_up_on(monkeypatch):
    monkeypatch.setattr(dry_run, "SECONDS", 0.5)
    assert "not checked" in finish("import time; time.sleep(60)")


def test_only_the_smoke_run_of_that_script_starts_one(tmp_path):
    assert dry_run.start(tmp_path / "train.py") is None  # this process runs the tests
