"""Other people's machines: WSL2, one memory for CPU and GPU, users without name or home."""

import builtins
import getpass
import io
import os
import platform
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

import constants as C
from conftest import sentence
from harness import gpu, health, machine
from harness.files import data_dir

ROOT = Path(C.__file__).parent
GPU, GIB = torch.device("cuda"), 1 << 30
# No user has this number; with it, a user name space has neither name nor home.
NAMELESS = ["unshare", "--user", "--map-user=54321"]


def on(monkeypatch, system: str = "6.8.0-48-generic", dxg: bool = False) -> None:
    """Let this be a machine with that kernel, with or without Windows' door to its GPU."""
    exists = os.path.exists
    monkeypatch.setattr(platform, "release", lambda: system)
    monkeypatch.setattr(
        os.path, "exists", lambda p: dxg if p == "/dev/dxg" else exists(p)
    )


# ---- WSL2 ---------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "system, dxg, wsl",
    [
        ("6.8.0-48-generic", False, False),
        ("5.15.167.4-microsoft-standard-WSL2", True, True),
        ("4.4.0-19041-Microsoft", False, True),
        ("6.6.87-own-kernel", True, True),  # or a container with its GPU
    ],
)
def test_the_first_allocation_under_wsl2_does_not_fail_on_growing_segments(
    monkeypatch, system, dxg, wsl
):
    on(monkeypatch, system, dxg)
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    machine.set_environment(False)
    assert ("PYTORCH_CUDA_ALLOC_CONF" not in os.environ) == wsl == machine.is_wsl()
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    machine.set_environment(False)  # the user may know better
    assert os.environ["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"


# ---- Triton -------------------------------------------------------------------------------------
def test_kernels_round_alike_when_tritons_default_changes(monkeypatch):
    monkeypatch.delenv("TRITON_DEFAULT_FP_FUSION", raising=False)
    machine.set_environment(False)
    assert os.environ["TRITON_DEFAULT_FP_FUSION"] == "1"
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "0")
    machine.set_environment(False)  # the user may know better
    assert os.environ["TRITON_DEFAULT_FP_FUSION"] == "0"


# ---- Memory that is not the GPU's alone ---------------------------------------------------------
@pytest.mark.parametrize(
    "integrated, dxg, pids, word",
    [
        (False, False, [], "shared"),
        (True, False, [], "unknown"),
        (False, True, [], "unknown"),
        (
            False,
            True,
            [os.getpid() + 1],
            "unknown",
        ),  # of Windows, or of another name space
        (True, False, [os.getpid()], "alone"),
        (True, False, [os.getpid(), os.getpid() + 1], "shared"),
    ],
)
def test_wsl2_and_unified_memory_do_not_void_every_run(
    monkeypatch, integrated, dxg, pids, word
):
    on(monkeypatch, dxg=dxg)
    about = types.SimpleNamespace(is_integrated=integrated, uuid="u")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: about)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (64 * GIB, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    monkeypatch.setattr(health, "list_gpu_processes", lambda device: pids)

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(torch, "Generator", lambda device: torch.default_generator)
    monkeypatch.setattr(torch, "randn", full)
    found = health.measure_health(GPU)
    assert found.company == word
    _, warnings = health.judge_health(found, found)
    assert len(warnings) == (word == "shared")


def test_cached_files_in_unified_memory_do_not_halve_the_batch(monkeypatch):
    for name, value in {"get_per_process_memory_fraction": 1.0}.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    for name in ("memory_reserved", "memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda device: 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 * GIB, 120 * GIB))
    monkeypatch.setattr(gpu, "available_memory", lambda: 100 * GIB)
    for integrated, free in ((True, 100), (False, 3)):
        about = types.SimpleNamespace(is_integrated=integrated)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda d, a=about: a)
        assert gpu.free_memory(GPU) == free * GIB


@pytest.mark.parametrize(
    "text, expected",
    [
        ("MemTotal: 9 kB\nMemAvailable:  12 kB\n", 12288),
        ("MemTotal: 9 kB\n", 0),
        ("?", 0),
    ],
)
def test_available_memory_is_what_the_system_says_or_nothing(monkeypatch, text, expected):
    monkeypatch.setattr(builtins, "open", lambda path: io.StringIO(text))
    assert machine.available_memory() == expected


# ---- Busy cores ---------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "said, busy",
    [
        ("7800000000 100000000 9", False),
        ("16100000000 35500000000 9", True),
        ("0 0 1", False),
        ("", False),
        (None, False),  # a system without it
    ],
)
def test_a_late_start_on_a_busy_machine_is_not_told_to_compile_less(
    monkeypatch, said, busy
):
    def schedstat(path):
        if said is None:
            raise FileNotFoundError(path)
        return io.StringIO(said)

    monkeypatch.setattr(builtins, "open", schedstat)
    advice = machine.advise_late_start(63.6)
    assert ("compile less" in advice) != busy
    assert busy == advice.startswith(
        "the machine is busy: other processes had the cores for 36 s"
    )


# ---- Users without name or home -----------------------------------------------------------------
@pytest.mark.parametrize("error", [KeyError, OSError, ImportError])
def test_a_user_without_a_passwd_entry_gets_a_name_for_torchs_folders(monkeypatch, error):
    def nameless():
        raise error("getpwuid(): uid not found: 54321")

    monkeypatch.setattr(getpass, "getuser", nameless)
    monkeypatch.setenv("USER", "")
    machine.set_environment(False)
    assert os.environ["USER"] == f"uid{os.getuid()}"


@pytest.mark.parametrize("cache", ["cache", "~/cache", None])
def test_without_a_home_libraries_keep_their_files_beside_the_data(
    monkeypatch, tmp_path, cache
):
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as if nobody knew it
    monkeypatch.setenv("HOME", "as it was")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("AUTORESEARCH_CACHE", raising=False)
    if cache:
        monkeypatch.setenv("AUTORESEARCH_CACHE", cache)
    machine.set_environment(False)
    home = str(tmp_path / "cache") if cache == "cache" else "as it was"
    assert os.environ["HOME"] == home


def test_without_home_and_passwd_entry_the_data_folder_is_a_sentence(monkeypatch):
    def unknown(path):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("AUTORESEARCH_CACHE", raising=False)
    monkeypatch.setattr(Path, "expanduser", unknown)
    said = sentence(data_dir)
    assert (
        "no home directory" in said and "set HOME to a folder that can be written" in said
    )


def test_a_container_with_user_and_neither_passwd_entry_nor_home_has_no_traceback(
    tmp_path,
):
    if shutil.which("unshare") is None or subprocess.run([*NAMELESS, "true"]).returncode:
        pytest.skip("needs user name spaces")
    names = {"HOME", "USER", "LOGNAME", "LNAME", "USERNAME", "AUTORESEARCH_CACHE"}
    env = {k: v for k, v in os.environ.items() if k not in names}
    # Before torch is loaded, which asks for the name; then where the data lies.
    code = "import constants, getpass; print(getpass.getuser(), flush=True);"
    code += "from harness.files import data_dir; data_dir()"
    command = [*NAMELESS, sys.executable, "-c", code]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "uid54321\n")
    assert done.stderr.startswith("this user has no home directory")
    assert done.stderr.count("\n") == 1
    # With a folder for the data, the attention kernel and all the like go there too.
    code = (
        "import constants; from huggingface_hub.constants import HF_HUB_CACHE as cache;"
    )
    code += "print(cache)"
    env = {k: v for k, v in env.items() if k not in ("HF_HOME", "XDG_CACHE_HOME")}
    env["AUTORESEARCH_CACHE"] = str(tmp_path)
    command = [*NAMELESS, sys.executable, "-c", code]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == f"{tmp_path}/.cache/huggingface/hub\n"
