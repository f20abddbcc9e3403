"""Time the training step of train.py on random ids, for any setting of its knobs.

Usage: python benchmarks/step.py [--steps 40] [--profile] [SHAPE] [KNOB=VALUE ...]
Example: python benchmarks/step.py reference DEVICE_BATCH_SIZE=64 ATTENTION='"flex"'

SHAPE is reference or best, that of the reference's default or of its best published
configuration, with the n-grams, key offset and gates of train.py, which those have not.

Prints tokens/s, MFU, peak memory and the median step; with --profile also the GPU time of
one step by kind of kernel, from torch's profiler. Needs a CUDA GPU and no prepared data.
"""

import argparse
import ast
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import constants  # first: it sets what torch reads

# isort: split
import torch

import train
from harness.attention import choose_attention
from harness.peaks import peak_flops
from harness.warmup import plan_batch

SHAPES = {
    "reference": ["DEPTH=8", "N_EMBD=512", 'WINDOW_PATTERN="SSSL"', "SHORT_WINDOW=1024"]
    + ["HEAD_DIM=128", "TOTAL_BATCH_SIZE=524288", "DEVICE_BATCH_SIZE=128"],
    "best": ["DEPTH=9", "N_EMBD=640", 'WINDOW_PATTERN="SSSSL"', "SHORT_WINDOW=256"]
    + ["HEAD_DIM=128", "TOTAL_BATCH_SIZE=262144", "DEVICE_BATCH_SIZE=128"],
}
PROFILED = 5  # steps
KINDS = [  # kind, parts of kernel names; the first match counts
    ("elementwise", ("triton_", "total_kernel")),  # the first: what torch.compile writes
    ("tables", ("embedding", "row_rmsprop", "sort", "indexselect")),
    ("attention", ("flash", "fmha", "flex", "fa3")),
    ("matmuls", ("gemm", "cutlass", "nvjet", "cublas", "bmm", "matmul_kernel")),
    ("casts to fp8", ("cast_both",)),
    ("rotation", ("rotate",)),
    ("loss", ("cross_entropy", "softmax", "nll")),
    ("copies", ("memcpy", "memset")),
    ("elementwise", ("elementwise", "vectorized", "reduce")),
]


def set_knob(text: str) -> None:
    """Set a knob of train.py by NAME=VALUE, a literal or a power such as 2**16.

    AttributeError if there is no such knob.
    """
    name, _, value = text.partition("=")
    if not hasattr(train, name):
        raise AttributeError(f"train.py has no knob {name}")
    base, _, exponent = value.partition("**")
    if exponent:
        setattr(train, name, int(base) ** int(exponent))
    else:
        setattr(train, name, ast.literal_eval(value))


def kind_of(kernel: str) -> str:
    """Return the kind of a kernel by its name, "other" if none fits."""
    for kind, parts in KINDS:
        if any(part in kernel.lower() for part in parts):
            return kind
    return "other"


def kernel_times(profile: torch.profiler.profile) -> dict[str, float]:
    """Return kind of kernel -> seconds on the GPU."""
    times = dict.fromkeys([kind for kind, _ in KINDS] + ["other"], 0.0)
    for event in profile.key_averages():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            times[kind_of(event.key)] += event.self_device_time_total / 1e6
    return times


def main() -> None:
    """Time the step, and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("knobs", nargs="*", metavar="reference | best | KNOB=VALUE")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args()
    try:
        for name in args.knobs:
            for knob in SHAPES.get(name, [name]):
                set_knob(knob)
    except AttributeError as error:
        parser.error(str(error))
    if not torch.cuda.is_available():
        sys.exit("benchmarks/step.py needs a CUDA GPU")

    device = torch.device("cuda")
    T = constants.MAX_SEQ_LEN
    config = train.build_config()
    B, accum = plan_batch(train.TOTAL_BATCH_SIZE, train.DEVICE_BATCH_SIZE)
    name, attend = choose_attention(train.ATTENTION, device)
    model = train.build_model(config, attend, device)
    optimizers = train.build_optimizers(model)
    # Ids as uneven as a text's, by Zipf's law: one that comes often slows the gradient of
    # an embedding.
    weights = 1 / torch.arange(1.0, config.vocab_size + 1, device=device)
    ids = weights.multinomial(accum * 2 * B * T, replacement=True)
    batches = ids.view(accum, 2, B, T)

    def step() -> None:
        train.set_schedules(optimizers, 0.5)
        train.train_step(model, optimizers, batches, accum)

    start = time.perf_counter()
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    compile_seconds = time.perf_counter() - start
    events = [torch.cuda.Event(enable_timing=True) for _ in range(args.steps + 1)]
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    torch.cuda.synchronize()
    times = [a.elapsed_time(b) / 1e3 for a, b in zip(events, events[1:], strict=False)]
    seconds = statistics.median(times)
    tok_per_sec = accum * B * T / seconds
    card = torch.cuda.get_device_name()
    mfu = tok_per_sec * model.flops_per_token() / peak_flops(card)
    knobs = " ".join(args.knobs) or "default knobs"
    slowest = f"slowest {1e3 * max(times):.1f}, n={args.steps}"
    memory = torch.cuda.max_memory_allocated() / 2**30
    print(
        f"{card}, torch {torch.__version__}, {name}, {knobs}: "
        f"{tok_per_sec / 1e6:.3f} M tok/s, {100 * mfu:.1f} % MFU, "
        f"{1e3 * seconds:.1f} ms per step ({slowest}), "
        f"{memory:.1f} GiB, first steps {compile_seconds:.0f} s"
    )
    if args.profile:
        for _ in range(5):  # at the clock speed of a busy GPU, not of a rested one
            step()
        activities = [torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            for _ in range(PROFILED):
                step()
            torch.cuda.synchronize()
        parts = {kind: part / PROFILED for kind, part in kernel_times(profile).items()}
        for kind, part in sorted(parts.items(), key=lambda item: -item[1]):
            print(f"  {kind:20s} {1e3 * part:7.1f} ms")
        print(f"  {'idle':20s} {1e3 * max(0.0, seconds - sum(parts.values())):7.1f} ms")
        print(profile.key_averages().table(sort_by="self_cuda_time_total", row_limit=60))


if __name__ == "__main__":
    main()
