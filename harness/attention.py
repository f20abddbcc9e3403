"""Attention: the kernels there are, and the choice between them. Not edited.

FlashAttention-3 where it runs, FlexAttention on every other GPU, a masked softmax on a
CPU. All take causal windows of any size. train.py may pass its model a function of its
own instead.
"""

import functools
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

import constants as C
from harness import gpu
from harness.files import PREPARE, atomic_write, content_key, data_dir
from harness.output import clean

# Seconds that fetching the kernel may take: in preparation, and in the start of a run.
PREPARE_SECONDS = 600
RUN_SECONDS = 60

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


# What fetches a kernel, in a process of its own: the package has no limit on the time, and
# says "set trust_remote_code" of every failure to ask about trust. Prints the build's file.
FETCH = """
import sys
try:
    from kernels import get_kernel

    print("\\n" + get_kernel(sys.argv[1], version=int(sys.argv[2])).__file__)
except Exception as error:
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__
    sys.exit(f"{type(error).__name__}: {error}")
"""


def fetch_build(seconds: float) -> Path:
    """Fetch FlashAttention-3 from the hub and return the folder of its build.

    ConnectionError if that fails or takes over `seconds`.
    """
    # Here, for a run rarely fetches, and this loads all of `requests`.
    from harness import download

    limit = f"for {seconds:.0f} s at most"
    print(f"attention: fetching {C.FLASH_ATTENTION_REPO} {limit}", flush=True)
    if not download.hub_constants.HF_HUB_OFFLINE:
        # A hub that cannot be reached is known in seconds, each address in its turn.
        session = download.open_session(1)
        endpoint = download.hub_endpoint()
        try:
            session.head(endpoint, timeout=(3, 10), allow_redirects=False)
        except download.NETWORK_ERRORS as error:
            raise ConnectionError(download.tell(error)) from error
    arguments = [C.FLASH_ATTENTION_REPO, str(C.FLASH_ATTENTION_VERSION)]
    process = subprocess.Popen(
        [sys.executable, "-c", FETCH, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    end = time.monotonic() + seconds
    with process:
        try:
            while True:
                left = end - time.monotonic()
                try:
                    out, said = process.communicate(timeout=max(min(left, 10), 0))
                    break
                except subprocess.TimeoutExpired:
                    if end - time.monotonic() <= 0:
                        text = f"the hub did not deliver it within {seconds:.0f} s"
                        raise ConnectionError(text) from None
                    print("attention: still fetching", flush=True)
        finally:
            process.kill()  # does nothing to one that has ended
    if process.returncode:
        said = clean(said.strip().rpartition("\n")[2])
        raise ConnectionError(said or f"exit status {process.returncode}")
    return Path(out.strip().rpartition("\n")[2]).parent


def load_build(build: Path) -> Callable[..., torch.Tensor]:
    """Return `flash_attn_func` of a build that was fetched; asks nobody."""
    # Here, for the import takes a second.
    from kernels import get_local_kernel

    if not build.is_dir():
        raise FileNotFoundError(f"{build} is gone")
    try:
        module = get_local_kernel(build)
        return getattr(module, "flash_attn_interface", module).flash_attn_func
    except Exception:
        # What did load of it has the names of the next build's modules.
        for name, module in list(sys.modules.items()):
            if str(build) in str(getattr(module, "__file__", "")):
                del sys.modules[name]
        raise


def pin_of_build() -> Path:
    """Return the file that says where the build fetched for this torch and machine is."""
    machine = platform.system(), platform.machine(), gpu.compute_capability()
    key = content_key(torch.__version__, *machine)
    # Beside the data: what lies in its folder, a run may not open.
    return data_dir().parent / f"flash_attention.{key}.txt"


def load_flash_attention(seconds: float = PREPARE_SECONDS) -> Callable[..., torch.Tensor]:
    """Return FlashAttention-3's `flash_attn_func(q, k, v, causal=, window_size=)`.

    All are (B, T, H, D) in bf16; RuntimeError says why it cannot be had. It is fetched if
    no build is here that loads, which takes `seconds` at most. Source: arXiv:2407.08608.
    """
    capability = gpu.compute_capability()
    if capability[0] != 8 and capability != (9, 0):
        need = "a GPU of compute capability 8.x or 9.0"
        raise RuntimeError(f"FlashAttention-3 needs {need}")
    pin = pin_of_build()
    stale = ""
    # Whatever goes wrong in five libraries: a fetch may help, else FlexAttention serves.
    try:
        if pin.is_file():
            return load_build(Path(pin.read_text("utf-8")))
    except Exception as error:
        stale = f"; the build fetched before does not load: {clean(str(error))}"
        print(f"attention: fa3 is fetched again{stale}", flush=True)
    try:
        build = fetch_build(seconds)
        flash_attn_func = load_build(build)
    except Exception as error:
        reason = f"{type(error).__name__}: {clean(str(error))}"
        text = f"{C.FLASH_ATTENTION_REPO} could not be loaded ({reason}{stale})"
        raise RuntimeError(text) from error
    # Not in a cache that is read-only.
    with suppress(OSError), atomic_write(pin) as out:
        out.write(str(build).encode())
    return flash_attn_func


def build_flash_attention() -> Attention:
    """Return FlashAttention-3; RuntimeError if it cannot be had here."""
    flash_attn_func = load_flash_attention(RUN_SECONDS)

    def attend(q, k, v, window, scale):
        options = {"softmax_scale": scale, "causal": True, "window_size": (window - 1, 0)}
        y = flash_attn_func(q, k, v, **options)
        if isinstance(y, tuple):  # of builds that return the log-sum-exp as well
            return y[0]
        return y

    return attend


def choose_attention(name: str, device: torch.device) -> tuple[str, Attention]:
    """Return name and function of the attention in use; print it, and why it is that.

    name: auto (fa3 where it runs, else flex), fa3, flex or masked, which a CPU has alone.
    ValueError for another name; RuntimeError for fa3 on a GPU where it cannot be had.
    """
    if name not in ("auto", "fa3", "flex", "masked"):
        raise ValueError(f"ATTENTION is {name!r}; it must be auto, fa3, flex or masked")
    if C.DRY_RUN:
        return "masked", masked_attention
    why = "as set by ATTENTION"
    if device.type != "cuda" and name != "masked":
        why = "no GPU" if name == "auto" else f"no GPU for {name}"
        name = "masked"
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
            if "could not be loaded" in why:
                why += f"; `{PREPARE}` fetches it"
    print(f"attention: {name} ({why})")
    if name == "masked":
        return name, masked_attention
    return name, build_flex_attention(device)
