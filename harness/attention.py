"""Attention: the kernels there are, and the choice between them. Not edited.

FlashAttention-3 where it runs, FlexAttention on every other GPU, a masked softmax on a
CPU. All take causal windows of any size. train.py may pass its model a function of its
own instead.
"""

import functools
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

import constants as C
from harness import gpu
from harness.files import atomic_write, data_dir

# q, k and v (B, T, H, D), window in tokens, itself included, scale of q k -> (B, T, H, D)
Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int, float], torch.Tensor]


def masked_attention(q, k, v, window: int, scale: float) -> torch.Tensor:
    """Attend by the definition: softmax over a (T, T) mask.

    Shapes as of Attention. For CPUs, and the oracle in tests.
    """
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, H, T, D)
    at = torch.arange(q.size(2), device=q.device)
    distance = at[:, None] - at[None, :]  # of a key behind its query
    scores = q @ k.transpose(2, 3) * scale  # (B, H, T, T)
    scores = scores.masked_fill((distance < 0) | (distance >= window), -torch.inf)
    return (scores.softmax(dim=3) @ v).transpose(1, 2)


def build_flex_attention(device: torch.device) -> Attention:
    """Return FlexAttention, compiled on a GPU, with one block mask per window."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    flex = flex_attention
    if device.type == "cuda":
        flex = torch.compile(flex, dynamic=False, fullgraph=True)

    @functools.cache
    def block_mask(window: int, T: int):
        def visible(b, h, query, key):
            return (query >= key) & (query - key < window)

        return create_block_mask(visible, None, None, T, T, device=device)

    def attend(q, k, v, window, scale):
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, H, T, D)
        mask = block_mask(window, q.size(2))
        return flex(q, k, v, block_mask=mask, scale=scale).transpose(1, 2)

    return attend


def load_flash_attention() -> Callable[..., torch.Tensor]:
    """Return FlashAttention-3's `flash_attn_func(q, k, v, causal=, window_size=)`.

    All are (B, T, H, D) in bf16; RuntimeError says why it cannot be had. Source:
    arXiv:2407.08608.
    """
    capability = gpu.compute_capability()
    if capability[0] != 8 and capability != (9, 0):
        need = "a GPU of compute capability 8.x or 9.0"
        raise RuntimeError(f"FlashAttention-3 needs {need}")
    # Where the build lies that prepare.py fetched.
    pin = data_dir() / "flash_attention.txt"
    try:
        # Here, for the import takes a second.
        from kernels import get_kernel, get_local_kernel

        build = Path(pin.read_text("utf-8")) if pin.is_file() else pin
        if build.is_dir():
            module = get_local_kernel(build)  # asks nobody
        else:
            module = get_kernel(C.FLASH_ATTENTION_REPO, version=C.FLASH_ATTENTION_VERSION)
            if file := getattr(module, "__file__", None):
                # Not in a cache that is read-only.
                with suppress(OSError), atomic_write(pin) as out:
                    out.write(str(Path(file).parent).encode())
        return getattr(module, "flash_attn_interface", module).flash_attn_func
    # Whatever goes wrong in five libraries: FlexAttention serves then.
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        text = f"{C.FLASH_ATTENTION_REPO} could not be loaded ({reason})"
        raise RuntimeError(text.splitlines()[0]) from error


def build_flash_attention() -> Attention:
    """Return FlashAttention-3; RuntimeError if it cannot be had here."""
    flash_attn_func = load_flash_attention()

    def attend(q, k, v, window, scale):
        options = {"softmax_scale": scale, "causal": True, "window_size": (window - 1, 0)}
        y = flash_attn_func(q, k, v, **options)
        if isinstance(y, tuple):  # of builds that return the log-sum-exp as well
            return y[0]
        return y

    return attend


def choose_attention(name: str, device: torch.device) -> tuple[str, Attention]:
    """Return name and function of the attention in use; print it, and why it is that.

    name: auto (fa3 where it runs, else flex, on a CPU masked), fa3, flex or masked.
    ValueError for another name; RuntimeError for fa3 where it cannot be had.
    """
    if name not in ("auto", "fa3", "flex", "masked"):
        raise ValueError(f"ATTENTION is {name!r}; it must be auto, fa3, flex or masked")
    if C.DRY_RUN:
        return "masked", masked_attention
    why = "as set by ATTENTION"
    if device.type != "cuda" and name == "auto":
        name = "masked"
        why = "no GPU"
    if name in ("auto", "fa3"):
        try:
            attend = build_flash_attention()
            print("attention: fa3")
            return "fa3", attend
        except RuntimeError as error:
            if name == "fa3":
                raise
            name = "flex"
            why = f"fallback: {error}"
    print(f"attention: {name} ({why})")
    if name == "masked":
        return name, masked_attention
    return name, build_flex_attention(device)
