"""What a run says of its GPU: numbers in, words and warnings out; and the measurement itself."""

import math
import os
import subprocess
import sys
import types

import pytest
import torch

import constants as C
from harness.health import (
    COPY_TOLERANCE,
    MATMUL_TOLERANCE,
    Health,
    judge_company,
    judge_health,
    list_gpu_processes,
    measure_health,
    measure_rate,
)
from harness.peaks import peak_flops
from harness.run import Run

ME, OTHER, GIB = os.getpid(), os.getpid() + 1, 1 << 30
GPU = torch.device("cuda")


# ---- Words and warnings -------------------------------------------------------------------------
def test_a_steady_gpu_that_nobody_shares_is_told_without_a_warning():
    text, warnings = judge_health(
        Health(742.4, 3920.2, "alone"), Health(738.6, 3914.9, "alone")
    )
    assert text == "742/739 TFLOP/s, 3920/3915 GB/s, alone" and warnings == []


def test_a_host_that_is_busy_for_a_moment_does_not_slow_the_copy(monkeypatch):
    """A GPU that waits 2 ms for its next copy, once; seen in 2 of 36 runs beside a busy CPU."""
    now, calls, copy = 0.0, 0, 66e-6

    class Event:
        def __init__(self, enable_timing):
            self.at = None

        def record(self):
            self.at = now

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return 1e3 * (end.at - self.at)

    def work():
        nonlocal now, calls
        calls += 1
        now += copy + (2e-3 if calls == 300 else 0)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    assert measure_rate(work, 1.0, 0.01, windows=5) == pytest.approx(1 / copy, rel=1e-6)
    assert calls > 300
    calls = 0
    assert measure_rate(work, 1.0, 0.05) < (1 - COPY_TOLERANCE) / copy


@pytest.mark.parametrize(
    "tflops, gb_per_sec, what",
    [
        (
            84.0,
            1000.0,
            ["matmul went from 100 to 84 TFLOP/s over the run (-16.0 %)"],
        ),
        (
            116.0,
            1000.0,
            ["matmul went from 100 to 116 TFLOP/s over the run (+16.0 %)"],
        ),
        (100.0, 969.0, ["copy went from 1000 to 969 GB/s over the run (-3.1 %)"]),
        (100.0, 950.0, ["copy went from 1000 to 950 GB/s over the run (-5.0 %)"]),
        (50.0, 500.0, ["(-50.0 %)", "(-50.0 %)"]),
        (86.0, 1029.0, []),
        (89.9, 999.0, []),  # a healthy GPU that began cool
        (math.nan, math.nan, []),
    ],
)
def test_a_change_beyond_that_of_a_healthy_gpu_is_warned_of(tflops, gb_per_sec, what):
    _, warnings = judge_health(
        Health(100, 1000, "alone"), Health(tflops, gb_per_sec, "alone")
    )
    assert len(warnings) == len(what)
    for warning, part in zip(warnings, what, strict=True):
        assert warning.startswith("the GPU's ") and part in warning
        assert "\n" not in warning and "run again" in warning


@pytest.mark.parametrize(
    "before, after, word",
    [
        ("alone", "alone", "alone"),
        ("alone", "shared", "shared"),
        ("shared", "unknown", "shared"),
        ("unknown", "alone", "unknown"),
    ],
)
def test_the_worse_of_both_moments_counts(before, after, word):
    text, warnings = judge_health(Health(1, 1, before), Health(1, 1, after))
    assert text.endswith(f", {word}")
    shared = [True] * (word == "shared")
    assert [w.startswith("another process holds the GPU") for w in warnings] == shared


def test_what_could_not_be_measured_is_nan():
    nothing = Health(math.nan, math.nan, "unknown")
    assert judge_health(nothing, nothing) == (
        "nan/nan TFLOP/s, nan/nan GB/s, unknown",
        [],
    )


# ---- Other processes ----------------------------------------------------------------------------
@pytest.mark.parametrize(
    "pids, foreign, word",
    [
        ([ME], GIB, "alone"),
        ([ME], 60 * GIB, "alone"),  # the driver knows better than a guess by memory
        ([ME, ME], GIB, "alone"),  # nvidia-smi may list a process twice
        ([ME, OTHER], GIB, "shared"),
        ([OTHER], GIB, "alone"),  # a container: this process under its other name
        ([OTHER], 3 * GIB, "shared"),
        ([], GIB, "unknown"),
        ([], 3 * GIB, "shared"),
    ],
)
def test_company_is_judged_by_processes_or_else_by_memory(pids, foreign, word):
    assert judge_company(pids, foreign) == word


def smi(monkeypatch, tmp_path, script: str | None) -> list[int]:
    """Return what is read from an nvidia-smi that is a shell script, or missing."""
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    if script is not None:
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
    properties = types.SimpleNamespace(uuid="12345678-aaaa-bbbb-cccc-1234567890ab")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    return list_gpu_processes(GPU)


@pytest.mark.parametrize(
    "script, pids",
    [
        ("echo 123; echo 4567", [123, 4567]),
        (
            'echo "$*" | grep -q -- "--id=GPU-12345678-aaaa-bbbb-cccc-1234567890ab" && echo 7',
            [7],
        ),
        ("", []),
        ("echo '[Not Supported]'; echo N/A", []),
        ("echo No devices were found; exit 6", []),
        (None, []),
    ],
)
def test_processes_are_read_from_nvidia_smi(monkeypatch, tmp_path, script, pids):
    assert smi(monkeypatch, tmp_path, script) == pids


def test_an_nvidia_smi_that_hangs_is_not_waited_for(monkeypatch, tmp_path):
    run = subprocess.run
    monkeypatch.setattr(
        subprocess, "run", lambda *a, **k: run(*a, **k | {"timeout": 0.2})
    )
    assert smi(monkeypatch, tmp_path, "exec sleep 60") == []


# ---- In a run -----------------------------------------------------------------------------------
def test_warnings_come_before_the_summary_and_the_peak_is_that_of_training_or_evaluation(
    prepared, monkeypatch, capsys
):
    monkeypatch.setattr(C, "TIME_BUDGET", 0.1)
    run = Run(prepared, torch.device("cpu"))
    run.batch_size, run.micro_steps = 4, 1  # the warm-up sets them
    for step in run.steps():
        step.loss = len(list(step.batches)) * math.log(C.VOCAB_SIZE)
    run._val_rows._files = [run._val_rows._files[0][:8]]
    run.evaluate(lambda idx: torch.zeros(*idx.shape, C.VOCAB_SIZE))
    assert run.watch.health == []  # nothing is measured on a CPU
    looks = [Health(100, 1000, "alone"), Health(80, 1000, "shared")]
    most = [9 << 20]  # of the warm-up
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(
        torch.cuda, "reset_peak_memory_stats", lambda device: most.append(0)
    )
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA L4")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: most[-1])
    monkeypatch.setattr(
        "harness.health.measure_health", lambda device: looks[len(run.watch.health)]
    )
    run.cuda, run.watch.device = True, GPU
    run.watch.look()
    most[-1] = 5 << 20  # of training
    run.watch.look()
    most[-1] = 3 << 20  # of the evaluation
    capsys.readouterr()
    run.print_summary(1, 1.0, "flex")
    lines = capsys.readouterr().out.splitlines()
    at = lines.index("---")
    assert at == 2 and all(line.startswith("warning: gpu: ") for line in lines[:at])
    assert "gpu_health: 100/80 TFLOP/s, 1000/1000 GB/s, shared" in lines[at:]
    assert "peak_vram_mb: 5.0" in lines[at:] and lines[-1].startswith("rules: ")


# ---- On a GPU -----------------------------------------------------------------------------------
@pytest.mark.gpu
def test_the_measurement_is_steady_short_and_leaves_nothing_behind():
    states = torch.get_rng_state(), torch.cuda.get_rng_state()
    measure_health(GPU)
    held = torch.cuda.memory_allocated()  # a workspace of the library's may stay
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    first = measure_health(GPU)
    end.record()
    end.synchronize()
    second = measure_health(GPU)
    assert torch.cuda.memory_allocated() == held
    assert torch.equal(states[0], torch.get_rng_state())
    assert torch.equal(states[1], torch.cuda.get_rng_state())
    assert second.tflops == pytest.approx(first.tflops, rel=MATMUL_TOLERANCE)
    assert second.gb_per_sec == pytest.approx(first.gb_per_sec, rel=COPY_TOLERANCE)
    assert start.elapsed_time(end) < 6000  # nvidia-smi included, which may take 5 s
    peak = peak_flops(torch.cuda.get_device_name()) / 1e12
    assert math.isnan(peak) or 0.3 * peak < first.tflops < 1.05 * peak


@pytest.mark.gpu
def test_no_memory_for_the_measurement_is_no_error():
    total = torch.cuda.get_device_properties(GPU).total_memory
    torch.cuda.empty_cache()
    limit = torch.cuda.memory_reserved() + 2**28  # two of the three matrices
    torch.cuda.set_per_process_memory_fraction(limit / total)
    try:
        health = measure_health(GPU)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert math.isnan(health.tflops) and math.isnan(health.gb_per_sec)


@pytest.mark.gpu
def test_another_process_on_the_gpu_is_seen():
    code = "import sys, torch; x = torch.empty(3 << 30, dtype=torch.uint8, device='cuda').zero_();"
    code += "torch.cuda.synchronize(); print('up', flush=True); sys.stdin.read()"
    alone = measure_health(GPU).company
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout.readline() == b"up\n"
        shared = measure_health(GPU).company
        process.stdin.close()
    assert (alone, shared) in (("alone", "shared"), ("unknown", "shared"))
