"""Attention against its definition, written out; the kernels against each other; who is chosen."""

import math
import os
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch
from torch.nn.attention import flex_attention

from harness import attention, download

CPU = torch.device("cpu")
ROOT = Path(attention.__file__).parent.parent


def qkv(B: int, T: int, H: int, D: int, dtype=torch.float32, device=CPU):
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(B, T, H, D, generator=generator) for _ in range(3)]
    return [t.to(device, dtype).requires_grad_() for t in drawn]


def by_hand(q, k, v, window: int, scale: float) -> list:
    """Attention in Python's floats, one number after the other."""
    B, T, H, D = q.shape
    q, k, v = q.tolist(), k.tolist(), v.tolist()
    out = [[[[0.0] * D for _ in range(H)] for _ in range(T)] for _ in range(B)]
    for b in range(B):
        for h in range(H):
            for t in range(T):
                seen = range(max(0, t - window + 1), t + 1)
                query = q[b][t][h]
                scores = [sum(x * y for x, y in zip(query, k[b][s][h])) for s in seen]  # noqa: B905 (speed)
                weights = [math.exp(score * scale) for score in scores]
                for s, weight in zip(seen, weights, strict=True):
                    for d in range(D):
                        out[b][t][h][d] += weight / sum(weights) * v[b][s][h][d]
    return out


@pytest.mark.parametrize("scale", [6**-0.5, 1.7])
@pytest.mark.parametrize("window", [1, 3, 7, 50])
def test_masked_attention_is_the_definition(window, scale):
    q, k, v = qkv(2, 7, 4, 6)
    expected = torch.tensor(by_hand(q, k, v, window, scale))
    assert torch.allclose(
        attention.masked_attention(q, k, v, window, scale), expected, atol=1e-5
    )


def test_a_window_of_one_token_returns_its_value():
    q, k, v = qkv(1, 5, 2, 4)
    assert torch.allclose(attention.masked_attention(q, k, v, 1, 0.5), v, atol=1e-6)


@pytest.mark.filterwarnings("ignore")  # that FlexAttention is not compiled here
def test_flex_attention_agrees_with_the_definition():
    T = 160  # more than one block of 128
    attend = attention.build_flex_attention(CPU)
    q, k, v = (t.detach() for t in qkv(1, T, 4, 16))  # on a CPU, forward only
    for window in (1, 40, 128, T):
        y = attend(q, k, v, window, 0.3)
        assert y.shape == (1, T, 4, 16)
        assert torch.allclose(
            y, attention.masked_attention(q, k, v, window, 0.3), atol=1e-5
        )


@pytest.mark.filterwarnings("ignore")
def test_flex_attention_makes_a_block_mask_for_each_window_it_meets(monkeypatch):
    made, create = [], flex_attention.create_block_mask

    def counted(visible, B, H, rows, columns, device):
        made.append((rows, columns))
        return create(visible, B, H, rows, columns, device=device)

    monkeypatch.setattr(flex_attention, "create_block_mask", counted)
    attend = attention.build_flex_attention(CPU)
    # A window that grows from step to step, twice, and a row of another length.
    for T, window in [(160, 8), (160, 16), (160, 160), (160, 8), (160, 16), (32, 8)]:
        q, k, v = (t.detach() for t in qkv(1, T, 2, 16))
        expected = attention.masked_attention(q, k, v, window, 0.3)
        assert torch.allclose(attend(q, k, v, window, 0.3), expected, atol=1e-5)
    assert made == [(160, 160)] * 3 + [(32, 32)]


# ---- Choice -------------------------------------------------------------------------------------
@pytest.fixture
def flex(monkeypatch):
    """Stands in for FlexAttention, whose block masks would be built on a GPU."""
    built = object()
    monkeypatch.setattr(attention, "build_flex_attention", lambda device: built)
    return built


GPU = types.SimpleNamespace(type="cuda")


def test_without_flash_attention_a_gpu_falls_back_to_flex_and_says_why(
    monkeypatch, capsys, flex
):
    def load(seconds):
        raise RuntimeError("the hub could not be reached")

    monkeypatch.setattr(attention, "load_flash_attention", load)
    assert attention.choose_attention("auto", GPU) == ("flex", flex)
    line = capsys.readouterr().out.splitlines()[-1]
    assert (
        "flex" in line and "fallback" in line and "the hub could not be reached" in line
    )


def test_flash_attention_asked_for_by_name_never_falls_back(monkeypatch):
    def load(seconds):
        raise RuntimeError("no build for this GPU")

    monkeypatch.setattr(attention, "load_flash_attention", load)
    with pytest.raises(RuntimeError, match="no build for this GPU"):
        attention.choose_attention("fa3", GPU)


def test_where_flash_attention_runs_it_is_chosen_and_given_the_window(
    monkeypatch, capsys
):
    calls = []

    def flash_attn_func(q, k, v, softmax_scale, causal, window_size):
        calls.append((softmax_scale, causal, window_size))
        return q

    monkeypatch.setattr(
        attention, "load_flash_attention", lambda seconds: flash_attn_func
    )
    name, attend = attention.choose_attention("auto", GPU)
    q, k, v = qkv(1, 8, 2, 4)
    assert name == "fa3" and attend(q, k, v, 5, 0.7) is q
    assert calls == [(0.7, True, (4, 0))]  # itself and four before it
    assert "fa3" in capsys.readouterr().out


def test_a_cpu_uses_the_plain_softmax(capsys):
    assert attention.choose_attention("auto", CPU) == (
        "masked",
        attention.masked_attention,
    )
    assert "attention: masked (no GPU)" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["flex", "fa3"])
def test_an_edit_for_a_gpu_passes_the_check_without_one(name, capsys):
    """FlexAttention has no backward on a CPU, so its check could not be passed anywhere."""
    chosen = attention.choose_attention(name, CPU)
    assert chosen == ("masked", attention.masked_attention)
    assert capsys.readouterr().out == f"attention: masked (no GPU for {name})\n"


def test_flex_can_be_asked_for(flex, capsys):
    assert attention.choose_attention("flex", GPU) == ("flex", flex)
    assert capsys.readouterr().out == "attention: flex (as set by ATTENTION)\n"


def test_the_plain_softmax_can_be_asked_for_anywhere(capsys):
    chosen = attention.choose_attention("masked", GPU)
    assert chosen == ("masked", attention.masked_attention)
    assert "attention: masked (as set by ATTENTION)" in capsys.readouterr().out


def test_a_dry_run_has_no_kernel(monkeypatch):
    monkeypatch.setattr(attention.C, "DRY_RUN", True)
    chosen = ("masked", attention.masked_attention)
    assert attention.choose_attention("fa3", GPU) == chosen
    with pytest.raises(ValueError, match="ATTENTION is 'fa9'"):
        attention.choose_attention("fa9", GPU)


def test_an_unknown_attention_is_refused():
    with pytest.raises(
        ValueError, match="ATTENTION is 'fa9'; it must be auto, fa3, flex or masked"
    ):
        attention.choose_attention("fa9", CPU)


def test_without_a_gpu_flash_attention_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="GPU"):
        attention.load_flash_attention()


# ---- On a GPU -----------------------------------------------------------------------------------
def flash_attention():
    try:
        return attention.build_flash_attention()
    except (
        RuntimeError
    ) as error:  # no network, or a GPU it has no build for: flex serves there
        pytest.skip(str(error))


@pytest.mark.gpu
@pytest.mark.parametrize("heads, D", [(4, 64), (4, 128), (5, 128)])
@pytest.mark.parametrize("name", ["flex", "fa3"])
def test_kernels_agree_with_the_definition_forward_and_backward(name, heads, D):
    device, T = torch.device("cuda"), 512
    windows = [1, 64, 100, T]
    if name == "flex":
        torch._dynamo.reset()  # or the windows of all sizes count as one function's recompilations
        attend = attention.build_flex_attention(device)
    else:
        attend = flash_attention()
    for window in windows:
        exact = qkv(2, T, heads, D, torch.bfloat16, device)
        half = [t.detach().clone().requires_grad_() for t in exact]
        exact = [t.detach().float().requires_grad_() for t in exact]
        weights = torch.randn(2, T, heads, D, device=device)
        scale = 1.3 * D**-0.5
        expected = attention.masked_attention(*exact, window, scale)
        got = attend(*half, window, scale)
        assert got.dtype == torch.bfloat16 and got.shape == expected.shape
        (expected * weights).sum().backward()
        (got.float() * weights).sum().backward()
        pairs = [
            (expected, got),
            *((e.grad, h.grad) for e, h in zip(exact, half, strict=True)),
        ]
        for e, h in pairs:
            error = (e - h.float()).norm() / e.norm().clamp_min(1e-3 * e.numel() ** 0.5)
            assert error < 0.02, (window, float(error))


def write_build(folder, function: str):
    """Write a build of the kernel as the hub has it, and return its folder."""
    build = folder / "build" / "torch-cuda"
    build.mkdir(parents=True)
    (build / "__init__.py").write_text("from . import flash_attn_interface\n")
    (build / "flash_attn_interface.py").write_text(function)
    # One that no other test has loaded.
    metadata = f'{{"name": "flash-attn3", "id": "{folder.parent.name}", "version": 1, '
    metadata += (
        '"license": "BSD-3-Clause", "python-depends": [], "backend": {"type": "cuda"}}'
    )
    (build / "metadata.json").write_text(metadata)
    return build


@pytest.fixture
def hopper(monkeypatch, tmp_path):
    """A GPU that FlashAttention-3 runs on, and a folder where no kernel was fetched yet."""
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))


GOOD = "def flash_attn_func(): return 'fetched'\n"


def test_a_kernel_that_was_fetched_is_loaded_again_without_the_hub(
    monkeypatch, tmp_path, hopper
):
    # The real package, on a build laid out as the hub's; LOCAL_KERNELS plays the download.
    build = write_build(tmp_path / "repository", GOOD)
    monkeypatch.setenv(
        "LOCAL_KERNELS", f"kernels-community/flash-attn3={build.parent.parent}"
    )
    assert attention.load_flash_attention()() == "fetched"
    monkeypatch.delenv("LOCAL_KERNELS")
    monkeypatch.setattr(attention, "fetch_build", None)  # is not called
    assert attention.load_flash_attention()() == "fetched"


IN_A_RUN = """
import os, sys
from pathlib import Path
import torch
torch.cuda.is_available = lambda: True
torch.cuda.get_device_capability = lambda *_: (9, 0)
from harness import attention
from harness.files import data_dir
from harness.guard import refuse_to_open
refuse_to_open(data_dir(), Path.cwd())
print(attention.load_flash_attention()())
del os.environ["LOCAL_KERNELS"]
attention.fetch_build = None  # is not called
print(attention.load_flash_attention()())
"""


def test_a_run_keeps_and_loads_the_kernel_though_it_may_not_open_prepared_files(
    tmp_path,
):
    """Else every run on a Hopper falls back to FlexAttention."""
    build = write_build(tmp_path / "repository", GOOD)
    variables = {
        "AUTORESEARCH_CACHE": str(tmp_path / "cache"),
        "LOCAL_KERNELS": f"kernels-community/flash-attn3={build.parent.parent}",
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", IN_A_RUN],
        cwd=ROOT,
        env=os.environ | variables,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert done.returncode == 0
    assert done.stdout.splitlines()[-2:] == ["fetched", "fetched"]


@pytest.mark.parametrize("fault", ["gone", "broken"])
def test_a_build_that_no_longer_loads_is_fetched_again(
    monkeypatch, tmp_path, hopper, capsys, fault
):
    old = write_build(tmp_path / "old", "flash_attn_func = None\n")
    error = "raise ImportError('undefined symbol: _ZN3c10')\n"
    (old / "__init__.py").write_text("from . import flash_attn_interface\n" + error)
    new = write_build(tmp_path / "new", GOOD)
    place = old if fault == "broken" else tmp_path / "pruned"
    pin = attention.pin_of_build()
    pin.parent.mkdir(parents=True, exist_ok=True)
    pin.write_text(str(place))
    monkeypatch.setattr(attention, "fetch_build", lambda seconds: new)
    assert attention.load_flash_attention()() == "fetched"
    assert pin.read_text() == str(new)
    said = capsys.readouterr().out
    assert ("pruned is gone" if fault == "gone" else "undefined symbol") in said


def test_a_stale_build_and_no_hub_are_both_named(monkeypatch, tmp_path, hopper):
    pin = attention.pin_of_build()
    pin.parent.mkdir(parents=True, exist_ok=True)
    pin.write_text(str(tmp_path / "pruned"))

    def fail(seconds):
        raise ConnectionError("nobody answers")

    monkeypatch.setattr(attention, "fetch_build", fail)
    with pytest.raises(RuntimeError, match="nobody answers.*pruned is gone"):
        attention.load_flash_attention()


def test_a_build_for_another_torch_processor_or_gpu_is_not_loaded(monkeypatch, hopper):
    pins = [attention.pin_of_build()]
    monkeypatch.setattr(torch, "__version__", "2.99.0+cu999")
    pins.append(attention.pin_of_build())
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    pins.append(attention.pin_of_build())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 6))
    pins.append(attention.pin_of_build())
    assert len(set(pins)) == 4


def test_a_fetch_that_hangs_ends_at_its_limit_and_says_so(monkeypatch, hopper, capsys):
    monkeypatch.setattr(attention, "FETCH", "import time; time.sleep(60)")
    started = time.monotonic()
    with pytest.raises(RuntimeError, match="did not deliver it within 0 s"):
        attention.load_flash_attention(0.3)
    assert time.monotonic() - started < 5
    assert "attention: fetching kernels-community/flash" in capsys.readouterr().out


def test_a_fetch_that_fails_names_the_cause_and_no_address(monkeypatch, hopper):
    fault = "import sys; sys.exit('OSError: no such host: https://a.b/c?signature=d')"
    monkeypatch.setattr(attention, "FETCH", fault)
    with pytest.raises(RuntimeError, match="OSError: no such host: \\.\\.\\.") as error:
        attention.load_flash_attention()
    assert "signature" not in str(error.value)


def test_a_hub_that_cannot_be_reached_is_known_without_the_package(monkeypatch, hopper):
    monkeypatch.setattr(download.hub_constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("subprocess.Popen", None)  # is not called
    with pytest.raises(RuntimeError, match="could not be loaded .*refused"):
        attention.load_flash_attention()
