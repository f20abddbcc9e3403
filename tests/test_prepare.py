"""Bad input: one clear sentence, last of all, and an exit status that is not 0."""

import hashlib
import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import constants as C
import prepare
import train
from harness import download, gpu
from harness.data import load_manifest
from harness.files import PREPARE, data_dir
from harness.run import Run


def sentence(main, *args) -> str:
    """Return what `main` ends the process with: a sentence, which Python prints, and status 1."""
    with pytest.raises(SystemExit) as caught:
        main(*args)
    assert isinstance(caught.value.code, str), "the exit status would be 0"
    assert "\n" not in caught.value.code and len(caught.value.code) < 800
    return caught.value.code


@pytest.fixture
def full(monkeypatch):
    """Act under the full rules as far as errors go."""
    monkeypatch.setattr(C, "SMOKE", False)
    monkeypatch.setattr(train, "SMOKE", False)


@pytest.fixture
def cache(prepared, tmp_path, monkeypatch) -> Path:
    """A copy of what was prepared, where train.py looks for it."""
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(tmp_path))
    return Path(shutil.copytree(prepared, tmp_path / "smoke"))


# ---- The machine --------------------------------------------------------------------------------
def test_a_full_run_without_a_gpu_names_the_command_that_needs_none(tmp_path):
    env = os.environ | {"AUTORESEARCH_SMOKE": "0", "CUDA_VISIBLE_DEVICES": ""}
    env["AUTORESEARCH_CACHE"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, train.__file__],
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert "no CUDA GPU" in line and "AUTORESEARCH_SMOKE=1 uv run train.py" in line
    assert list(tmp_path.iterdir()) == []  # it does not download first


@pytest.mark.parametrize(
    "smoke, capability, training, expected",
    [
        (True, (9, 0), True, "cpu"),
        (True, None, True, "cpu"),
        (False, (8, 0), True, "cuda"),
        (False, (12, 0), False, "cuda"),
        (
            False,
            None,
            True,
            "no CUDA GPU is available, and a full run needs one; AUTORESEARCH_SM",
        ),
        (False, None, False, "cpu"),
        (
            False,
            (7, 5),
            True,
            r"^Tesla T4 has compute capability 7.5, .* needs 8.0 .*; AUTORES",
        ),
        (False, (7, 5), False, "cpu"),
    ],
)
def test_the_device_is_chosen_by_what_is_there(
    monkeypatch, smoke, capability, training, expected
):
    monkeypatch.setattr(C, "SMOKE", smoke)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    if " " in expected:
        with pytest.raises(ValueError, match=expected):
            gpu.choose_device(training)
    else:
        assert gpu.choose_device(training).type == expected


def test_no_data_and_no_network(full, monkeypatch, tmp_path):
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(download, "RETRY_SECONDS", (0, 0))
    assert C.DATASET in sentence(prepare.main, [])
    # The same through train.py, which prepares first.
    monkeypatch.setattr(gpu, "choose_device", lambda: torch.device("cuda"))
    assert C.DATASET in sentence(train.main)
    assert not (data_dir() / "manifest.json").exists()


# ---- The environment ----------------------------------------------------------------------------
@pytest.mark.parametrize(
    "name, value",
    [
        ("AUTORESEARCH_SMOKE", "yes"),
        ("AUTORESEARCH_SMOKE", "2"),
        ("AUTORESEARCH_SEED", "abc"),
        ("AUTORESEARCH_SEED", "-1"),
        ("AUTORESEARCH_SEED", "1.5"),
        ("AUTORESEARCH_SEED", "٣"),
        ("AUTORESEARCH_SEED", str(2**31)),
    ],
)
def test_an_unknown_value_in_the_environment_is_named(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(
        ValueError, match=f"{name}='{value}' is not a whole number from 0 to"
    ):
        runpy.run_path(C.__file__)


def test_values_in_the_environment_are_used_and_empty_ones_are_none(monkeypatch):
    monkeypatch.setenv("AUTORESEARCH_SEED", "7")
    monkeypatch.setenv("AUTORESEARCH_SMOKE", "")
    rules = runpy.run_path(C.__file__)
    assert rules["SEED"] == 7 and rules["SMOKE"] is False
    monkeypatch.delenv("AUTORESEARCH_SEED")
    assert runpy.run_path(C.__file__)["SEED"] == 42


def test_an_error_at_import_ends_with_its_sentence_and_a_status():
    env = os.environ | {"AUTORESEARCH_SMOKE": "yes"}
    done = subprocess.run(
        [sys.executable, C.__file__], env=env, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("ValueError: AUTORESEARCH_SMOKE='yes'")


# ---- Knobs --------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "knobs, what",
    [
        ({"N_EMBD": 128, "HEAD_DIM": 48}, r"HEAD_DIM \(48\)"),
        ({"DEPTH": 0}, r"DEPTH \(0\)"),
        ({"WINDOW_PATTERN": "SM"}, r"WINDOW_PATTERN \('SM'\)"),
        ({"SHORT_WINDOW": 10**6}, r"SHORT_WINDOW \(1000000\)"),
        ({"DEVICE_BATCH_SIZE": 0}, r"DEVICE_BATCH_SIZE \(0 rows\)"),
        ({"TOTAL_BATCH_SIZE": -1}, r"TOTAL_BATCH_SIZE \(-1 tokens\)"),
        ({"ATTENTION": "fa9"}, "ATTENTION is 'fa9'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_knob_that_cannot_work_is_named(cache, monkeypatch, knobs, what):
    for name, value in knobs.items():
        monkeypatch.setattr(train, name, value)
    with pytest.raises(SystemExit, match=f"^train.py: .*{what}"):
        train.main()


# ---- Artifacts ----------------------------------------------------------------------------------
def rows_of(cache: Path, split: str) -> Path:
    rows = load_manifest(cache)["rows"]
    return next(
        cache / "rows" / name for name, about in rows.items() if about["split"] == split
    )


def change_a_byte(path: Path) -> Path:
    body = bytearray(path.read_bytes())
    body[len(body) // 2] ^= 1
    path.write_bytes(body)
    return path


def cut_short(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[:-2])
    return path


def remove(path: Path) -> Path:
    path.unlink()
    return path


def garbage(path: Path) -> Path:
    path.write_text("[1, 2", "utf-8")
    return path


DAMAGES = {
    "manifest that is no JSON": lambda cache: garbage(cache / "manifest.json"),
    "tokenizer.json gone": lambda cache: remove(cache / "tokenizer" / "tokenizer.json"),
    "tokenizer.json is no JSON": lambda cache: garbage(
        cache / "tokenizer" / "tokenizer.json"
    ),
    "ranks gone": lambda cache: remove(cache / "tokenizer" / "ranks.tiktoken"),
    "ranks changed": lambda cache: change_a_byte(cache / "tokenizer" / "ranks.tiktoken"),
    "validation rows changed": lambda cache: change_a_byte(rows_of(cache, "val")),
    "validation rows cut short": lambda cache: cut_short(rows_of(cache, "val")),
    "validation rows gone": lambda cache: remove(rows_of(cache, "val")),
    "training rows cut short": lambda cache: cut_short(rows_of(cache, "train")),
    "training rows gone": lambda cache: remove(rows_of(cache, "train")),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_artifact_is_named_with_what_to_do(cache, damage):
    path = damage(cache)
    said = sentence(train.main)
    assert said.startswith("train.py: ") and PREPARE in said
    assert str(path) in said or str(path.parent) in said


@pytest.mark.parametrize(
    "damage", ["ranks changed", "validation rows changed", "ranks gone"]
)
def test_the_advice_of_the_error_repairs_it(cache, damage, capsys):
    before = Run(cache, torch.device("cpu")).rules
    DAMAGES[damage](cache)
    prepare.main([])
    assert Run(cache, torch.device("cpu")).rules == before


def test_data_prepared_under_other_rules_is_refused(cache, monkeypatch):
    monkeypatch.setattr(C, "DATA_RULES", [*C.DATA_RULES[:-1], -1])
    said = sentence(train.main)
    assert "other rules" in said and str(cache) in said and PREPARE in said


def test_a_folder_with_nothing_in_it_is_refused(tmp_path):
    with pytest.raises(
        (FileNotFoundError, ValueError), match="manifest.json.*run .*prepare.py"
    ):
        Run(tmp_path, torch.device("cpu"))


# ---- Arguments ----------------------------------------------------------------------------------
@pytest.mark.parametrize("value", ["0", "9999", "-2", "many"])
def test_a_number_of_shards_that_there_are_not(value, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(tmp_path))
    with pytest.raises(SystemExit) as caught:
        prepare.main(["--num-shards", value])
    assert caught.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "--num-shards" in last and (value == "many" or f"1 to {C.VAL_SHARD}" in last)
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_retrained_under_old_rows_is_refused(cache):
    # What a preparation killed between tokenizer and rows leaves: the byte lengths would be wrong.
    folder = cache / "tokenizer"
    lines = (folder / "ranks.tiktoken").read_bytes().splitlines(keepends=True)
    (a, i), (b, j) = lines[-1].split(), lines[-2].split()
    body = b"".join([*lines[:-2], b"%s %s\n" % (a, j), b"%s %s\n" % (b, i)])
    (folder / "ranks.tiktoken").write_bytes(body)
    about = json.loads((folder / "tokenizer.json").read_text())
    about["ranks_sha256"] = hashlib.sha256(body).hexdigest()
    (folder / "tokenizer.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match="of another tokenizer; run .*prepare.py"):
        Run(cache, torch.device("cpu"))


def test_preparation_that_fails_in_torch_or_threads_does_not_say_prepared(
    monkeypatch, capsys
):
    def fail(*_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(prepare, "prepare", fail)
    with pytest.raises(RuntimeError, match="new thread"):
        prepare.main([])
    assert "prepared" not in capsys.readouterr().out


@pytest.mark.parametrize("entry", [{}, {"split": "val"}, 3, None])
def test_a_manifest_with_half_an_entry_is_a_sentence_not_a_key_error(cache, entry):
    manifest = json.loads((cache / "manifest.json").read_text())
    manifest["rows"][next(iter(manifest["rows"]))] = entry
    (cache / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(
        ValueError, match="manifest.json is missing, damaged or of other rules"
    ):
        Run(cache, torch.device("cpu"))


def test_a_crash_in_the_first_compilation_does_not_hang_in_torchs_exit(
    prepared, tmp_path
):
    # At exit torch waits for its compile workers, for up to 300 s if they are still starting.
    code = "import prepare, torch; run = open_run(torch.device('cpu'));"
    code += (
        "from torch._inductor.async_compile import maybe_warm_pool; maybe_warm_pool();"
    )
    code += "raise ValueError('a mistake')"
    shutil.copytree(prepared, tmp_path / "smoke")
    env = os.environ | {
        "AUTORESEARCH_CACHE": str(tmp_path),
        "PYTHONPATH": str(Path(C.__file__).parent),
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1 and done.stderr.endswith("ValueError: a mistake\n")
    assert done.stdout.endswith("prepare.py: the run ended without a result\n")
