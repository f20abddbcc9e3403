"""benchmarks/verdict.py simulates program.md's rule, and that rule keeps what it promises."""

import importlib.util
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

import constants as C

ROOT = Path(C.__file__).parent
spec = importlib.util.spec_from_file_location(
    "verdict", ROOT / "benchmarks" / "verdict.py"
)
verdict = sys.modules["verdict"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(verdict)


@pytest.fixture(scope="module")
def program() -> str:
    return (ROOT / "program.md").read_text("utf-8")


def test_the_simulated_rule_has_the_factors_of_program_md(program):
    table = program.partition("\n## Verdict\n")[2]
    stated = {float(n) for n in re.findall(r"([\d.]+) x noise", table)}
    assert stated == {verdict.CLEAR, verdict.REPEAT, verdict.CONFIRM}


@pytest.mark.parametrize(
    "gain, keep, runs",
    [
        (3.1, True, 0),
        (2.9, True, 2),
        (1.6, True, 2),
        (1.4, False, 2),
        (0.9, False, 0),
        (-2, False, 0),
    ],
)
def test_the_rule_repeats_within_the_noise_only(gain, keep, runs):
    night = verdict.Night(random.Random(0), sd=0.0)
    night.best_true = 0.0
    night.commits = [[1.0, 1.0, 2.0, 2.0, 1.5]]
    night.commits[0] = [x * (1 / verdict.noise(night.commits)) for x in night.commits[0]]
    assert verdict.noise(night.commits) == pytest.approx(1.0)
    best, new = [0.0], [-float(gain)]
    assert verdict.RULES["program.md"][0](night, best, new, -float(gain)) is keep
    assert (len(best) + len(new) - 2, night.runs) == (runs, runs)


def test_the_noise_of_the_simulation_is_what_program_mds_command_prints(
    program, tmp_path
):
    (block,) = re.findall(r"```sh\n(awk .*?)```", program, re.DOTALL)
    commits = [[0.4418, 0.4425, 0.4413], [0.4391], [0.4379, 0.4383], [0.4355, 0.4356]]
    lines = [
        "commit\tval_bpb\tmemory_gb\tstatus\tdescription",
        "c9\t0.000000\t0.0\tcrash\tx",
    ]
    lines += [
        f"c{k}\t{v:.6f}\t1.0\tkeep\tx" for k, runs in enumerate(commits) for v in runs
    ]
    (tmp_path / "results.tsv").write_text("\n".join(lines) + "\n")
    command = {"cwd": tmp_path, "check": True, "capture_output": True, "text": True}
    printed = subprocess.run(["sh", "-c", block], **command).stdout
    assert f"noise {verdict.noise(commits):.6f}\n" in printed
    assert "c0 mean 0.441867 runs 3\n" in printed and "c9" not in printed


def test_false_keeps_are_cut_five_fold_for_at_most_30_percent_more_runs():
    args = {"sd": 0.0007, "nights": 60, "ideas": 80, "seed": 2}
    plain, ours = (
        verdict.simulate(name, **args) for name in ("keep if lower", "program.md")
    )
    assert plain["false"] > 5 * ours["false"]
    assert ours["runs"] < 1.3 * plain["runs"]
    assert ours["gain"] > 0.7 * plain["gain"]
