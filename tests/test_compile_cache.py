"""The compile cache: an edit is honoured in the next run, and a run after no such edit is warm.

What it is for is tested on a script in processes that share a cache, its hash on small sources.
"""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Collection, Iterator
from pathlib import Path

import pytest
import torch

import forks
from harness import compile_cache
from harness.compile_cache import compile_tag, use_compile_cache

ROOT = Path(compile_cache.__file__).parents[1]


def operator(name: str, body: str = "x * 1", fake: str = "torch.empty_like(x)") -> str:
    """Return the source of an operator `name`."""
    return f"""
@torch.library.custom_op("t::{name}", mutates_args=())
def {name}(x: torch.Tensor) -> torch.Tensor:
    return {body}
{name}.register_fake(lambda x: {fake})
"""


# What each kind defines and what is compiled: it gives 3.0, or 5.0 once each 3.0 in it is edited.
# All by an operator `scale`: plain torch would be compiled as C++, which takes seconds.
HONOURED = {  # by torch itself: no other folder
    "compiled function": ("", "lambda x: scale(x, 3.0)"),
    "global": ("KNOB = 3.0", "lambda x: scale(x, KNOB)"),
    "hook": (
        "def hook(g): return scale(g, 3.0)\n"
        "def hooked(x): y = scale(x, 1.0); y.register_hook(hook); return scale(y, 1.0)",
        "hooked",
    ),
    "Function": (
        """
class Turned(torch.autograd.Function):
    forward = staticmethod(lambda ctx, x: scale(x, 1.0))
    backward = staticmethod(lambda ctx, g: scale(g, 3.0))
""",
        "Turned.apply",
    ),
}
HONOURED["Function in checkpoint"] = (
    HONOURED["Function"][0].replace("Turned", "Again"),
    "again(lambda x: Again.apply(x))",
)
STALE = {
    "backward": (
        operator("a") + "a.register_autograd(lambda ctx, g: scale(g, 3.0))",
        "lambda x: a(x)",
    ),
    "setup_context": (
        operator("b")
        + "def keep_b(ctx, inputs, output): ctx.k = 3.0\n"
        + "b.register_autograd(lambda ctx, g: scale(g, ctx.k), setup_context=keep_b)",
        "lambda x: b(x)",
    ),
    "fake kernel": (
        "def dtype(): return torch.float32 if 3.0 < 4 else torch.float64\n"
        + operator("c", "x.to(dtype()).clone()", "x.to(dtype())")
        + '@torch.library.triton_op("t::by_dtype", mutates_args=())\n'
        + "def by_dtype(x: torch.Tensor) -> torch.Tensor:\n"
        + "    return scale(x, 3 if x.dtype == torch.float32 else 5)",
        "lambda x: by_dtype(c(x.detach()))",
    ),
    "default argument": (
        operator("d", "x * k")
        .replace("r)", "r, k: float = 3.0)")
        .replace("a x", "a x, k=1"),
        "lambda x: d(x.detach())",
    ),
    "mutates_args": (
        """
@torch.library.custom_op("t::e", mutates_args=("x",) if 3.0 > 4 else ())
def e(x: torch.Tensor) -> None:
    x.mul_(5.0)
e.register_fake(lambda x: None)
def written(x): y = scale(x.detach(), 1.0); e(y); return scale(y, 1.0)
""",
        "written",
    ),
    "vmap rule": (
        operator("f") + "f.register_vmap(lambda info, dims, x: (scale(x, 3.0), dims[0]))",
        "lambda x: torch.vmap(f)(x.detach())",
    ),
    "triton_op": (
        '@torch.library.triton_op("t::g", mutates_args=())\n'
        "def g(x: torch.Tensor) -> torch.Tensor: return scale(x, 3.0)",
        "lambda x: g(x.detach())",
    ),
    "constant two names away": (
        "NUMBER = 3.0\n"
        "def number(): return NUMBER\n"
        '@torch.library.triton_op("t::h", mutates_args=())\n'
        "def h(x: torch.Tensor) -> torch.Tensor: return scale(x, number())",
        "lambda x: h(x.detach())",
    ),
    "constant of a local module": (
        "import settings\n"
        '@torch.library.triton_op("t::i", mutates_args=())\n'
        "def i(x: torch.Tensor) -> torch.Tensor: return scale(x, settings.FACTOR)",
        "lambda x: i(x.detach())",
    ),
    "composite": (
        'lib = torch.library.Library("tt", "DEF")\n'
        'lib.define("j(Tensor x) -> Tensor")\n'
        'lib.impl("j", lambda x: scale(x, 3.0), "CompositeImplicitAutograd")',
        "lambda x: torch.ops.tt.j(x)",
    ),
    "allow_in_graph in checkpoint": (
        "@torch.compiler.allow_in_graph\ndef k(x): return scale(x, 3.0)",
        "again(lambda x: k(x))",
    ),
    "allow_in_graph in Function": (
        "@torch.compiler.allow_in_graph\ndef l(g): return scale(g, 3.0)"
        + HONOURED["Function"][0].replace("Turned", "L").replace("scale(g, 3.0)", "l(g)"),
        "L.apply",
    ),
    "allow_in_graph in a hook": (
        "@torch.compiler.allow_in_graph\ndef m(g): return scale(g, 3.0)\n"
        "def hooked_m(x):\n"
        "    y = scale(x, 1.0); y.register_hook(lambda g: m(g)); return scale(y, 1.0)",
        "hooked_m",
    ),
    "py_impl": (
        operator("o")
        + "from torch._C import DispatchKey\n"
        + "torch.ops.t.o.default.py_impl(DispatchKey.CompositeImplicitAutograd)(\n"
        + "    lambda x: scale(x, 3.0))",
        "lambda x: o(x.detach())",
    ),
}
SCRIPT = """
import json, sys
from pathlib import Path
import torch
import torch._functorch.config
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

@torch.library.custom_op("t::scale", mutates_args=())
def scale(x: torch.Tensor, k: float) -> torch.Tensor: return x * k
scale.register_fake(lambda x, k: torch.empty_like(x))
def keep(ctx, inputs, output): ctx.k = inputs[1]
scale.register_autograd(lambda ctx, g: (scale(g, ctx.k), None), setup_context=keep)
def again(function): return lambda x: checkpoint(function, x, use_reentrant=False)

# definitions

def run(name, function):
    torch._dynamo.reset()
    counters.clear()
    x = torch.ones(1, 1, requires_grad=True)
    try:
        y = torch.compile(function)(x)
    except RuntimeError as error:  # of code from before: from torch 2.14 on, it checks dtypes
        return str(error), []
    if y.requires_grad:
        y.backward()
    said = [key.rpartition("_")[2] for key in counters["aot_autograd"] if "_cache_" in key]
    return float(x.grad if y.requires_grad else y), [s for s in said if s in ("hit", "miss")]

folder = sys.argv[1]
if folder:
    from harness.compile_cache import use_compile_cache
    folder = use_compile_cache(Path(__file__), Path(folder)).name
torch._functorch.config.autograd_cache_allow_custom_autograd_functions = True
results = {name: run(name, function) for name, function in FUNCTIONS.items()}
print(json.dumps([folder, results]))
"""


def write_script(folder: Path, edited: Collection[str] = ()) -> Path:
    """Write the script with all kinds to `folder`; those of `edited` with 5.0 for 3.0."""
    folder.mkdir()
    texts, functions = [], []
    for name, (definition, function) in (HONOURED | STALE).items():
        number = "5.0" if name in edited else "3.0"
        texts.append(definition.replace("3.0", number))
        functions.append(f"    {name!r}: {function.replace('3.0', number)},\n")
        if "settings" in definition:
            (folder / "settings.py").write_text(f"FACTOR = {number}\n")
    texts.append("FUNCTIONS = {\n" + "".join(functions) + "}")
    path = folder / "train.py"
    path.write_text(SCRIPT.replace("# definitions", "\n".join(texts)))
    return path


def serve(lanes: list[list]) -> None:
    """Run the jobs of each lane in turn, the lanes at once: a script, TORCHINDUCTOR_CACHE_DIR and
    arguments.

    Each in a process forked from this one, which imports and compiles first: that takes longer
    than a job does.
    """
    # No C++ is compiled: no need to try g++, nor for processes that would run it.
    torch._inductor.config.cpp.vec_isa_ok = False
    torch._inductor.config.compile_threads = 1
    # Without a gradient: the threads of autograd would forbid a fork.
    torch.compile(lambda x: x @ x)(torch.ones(1, 1))
    del os.environ["TORCHINDUCTOR_CACHE_DIR"]
    for lane in lanes:
        if not os.fork():
            for job in lane:
                if not os.fork():
                    run_job(*job)
                os.wait()
            os._exit(0)
    for _ in lanes:
        os.wait()


def run_job(script: str, cache: str, *arguments: str) -> None:
    """Run `script`, write what it prints beside it and end the process."""
    if cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
    sys.argv = [script, *arguments]
    sys.path.insert(0, os.path.dirname(script))
    try:
        with open(f"{script}.json", "w") as sys.stdout:
            runpy.run_path(script, run_name="__main__")
    except BaseException:
        traceback.print_exc()
    os._exit(0)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, list]:
    """Return the folder and the results of each run of the script."""
    root = tmp_path_factory.mktemp("runs")
    everything = [*HONOURED, *STALE]
    plans = {  # kinds that are edited; whether the hash keeps the runs apart
        "unguarded": ([], False),
        "unguarded, edited": (everything, False),
        "first": ([], True),
        "again": ([], True),
        "model": ([*HONOURED], True),
        "edited": (everything, True),
    }
    lanes, outputs = ([], []), {}
    for name, (edited, guarded) in plans.items():
        script = write_script(root / name, edited)
        folders = ("", root / "cache") if guarded else (root / "unguarded cache", "")
        lanes[guarded and name != "edited"].append([str(script), *map(str, folders)])
        outputs[name] = Path(f"{script}.json")
    env = {"PYTHONPATH": str(ROOT), "TORCHINDUCTOR_CACHE_DIR": str(root / "server")}
    done = forks.run(__file__, json.dumps(lanes), env=os.environ | env, seconds=600)
    try:
        return {name: json.loads(output.read_text()) for name, output in outputs.items()}
    except (OSError, ValueError):
        pytest.fail(done.stderr[-4000:])


def values(run: list) -> dict[str, float | str]:
    return {kind: value for kind, (value, _) in run[1].items()}


def test_an_edit_is_honoured_in_the_next_run_that_shares_the_cache(runs):
    assert set(values(runs["first"]).values()) == {1.0, 3.0}  # 1.0: of mutates_args
    assert set(values(runs["edited"]).values()) == {5.0}
    assert runs["edited"][0] != runs["first"][0]


@pytest.mark.parametrize("kind", STALE)
def test_an_edit_of_each_kind_has_a_folder_of_its_own(kind, tmp_path):
    before, after = (
        write_script(tmp_path / "before"),
        write_script(tmp_path / "after", [kind]),
    )
    assert compile_tag(before) != compile_tag(after)


def test_without_the_hash_the_cache_answers_with_the_code_from_before(runs):
    before, after = values(runs["unguarded"]), values(runs["unguarded, edited"])
    refused = {kind for kind in after if "expected dtype" in str(after[kind])}
    assert refused <= {"fake kernel"}
    assert {kind for kind in after if after[kind] == before[kind]} == set(STALE) - refused


def test_a_run_after_no_edit_is_warm(runs):
    assert runs["again"][0] == runs["first"][0]
    assert values(runs["again"]) == values(runs["first"])
    assert {
        kind: said for kind, (_, said) in runs["again"][1].items() if said != ["hit"]
    } == {}


def test_an_edit_of_the_model_is_honoured_and_leaves_the_rest_warm(runs):
    folder, results = runs["model"]
    assert folder == runs["first"][0]
    assert {kind: results[kind][0] for kind in HONOURED} == dict.fromkeys(HONOURED, 5.0)
    assert {kind for kind in STALE if results[kind][1] != ["hit"]} == set()


# ---- The hash -----------------------------------------------------------------------------------
HEADER = """
import functools
import torch
import triton
import triton.language as tl
import constants as C
from helper import TILE, table

KNOB = 3
WIDTH = 4
HEIGHT = WIDTH * 2

def norm(x):
    return x * KNOB

class Model(torch.nn.Module):
    def __init__(self):
        self.register_buffer("one", torch.ones(1))
        self.register_forward_hook(print)
        self.fused = triton is not None and kernel is not None
    def forward(self, x):
        x = op(x) + 30
        launch(x, triton.cdiv(x.numel(), 16))
        return norm(x)

def launch(x, programs):
    kernel[(programs,)](x, WIDTH)

def main():
    model = Model()
    model.x = KNOB
    torch.manual_seed(300)

# ops
def op(x): return x
def kernel(x): return x

if __name__ == "__main__":
    main()
"""
OP = """
@torch.library.custom_op("a::op", mutates_args=())
def op(x: torch.Tensor) -> torch.Tensor:
    return launch(x, 1)
"""
KERNEL = """
@triton.jit
def kernel(x, W: tl.constexpr):
    tl.store(x, tl.load(x) * 2)
"""
HELPERS = {
    "helper.py": "import deeper\nTILE = 16\ndef table(): return deeper.TABLE\n",
    "deeper.py": "TABLE = [1, 2]\n",
    "constants.py": "SIZE = 8\n",
    "package/__init__.py": "",
    "package/inner.py": "from . import sibling\ndef give(): return sibling.GIVEN\n",
    "package/sibling.py": "GIVEN = 7\n",
}
# name: code of operators and kernels; what is edited there or in the header or a helper, and into
# what. Each changes the hash.
SEEN = {
    "body": (OP, "launch(x, 1)", "launch(x, 2)"),
    "default argument": (OP.replace("r)", "r, k: int = 1)"), "int = 1", "int = 2"),
    "schema": (OP, "mutates_args=()", "mutates_args=('x',)"),
    "fake": (OP + "@op.register_fake\ndef _(x): return x.new_empty(5)", "5", "6"),
    "fake by a call": (OP + "op.register_fake(lambda x: x.new_empty(5))", "5", "6"),
    "fake by name": (
        OP + 'torch.library.register_fake("a::op")(lambda x: x[5:])',
        "5",
        "6",
    ),
    "backward": (
        OP + "def back(ctx, g): return g * 5\nop.register_autograd(back)",
        "5",
        "6",
    ),
    "setup_context": (
        OP + "def keep(ctx, inputs, output): ctx.k = 5\n"
        "op.register_autograd(print, setup_context=keep)",
        "5",
        "6",
    ),
    "vmap": (OP + "@op.register_vmap\ndef _(info, dims, x): return x, 5", "5", "6"),
    "kernel for a device": (
        OP + '@op.register_kernel("cpu")\ndef _(x): return x * 5',
        "5",
        "6",
    ),
    "torch_dispatch": (OP + "op.register_torch_dispatch(M, lambda *a: 5)", "5", "6"),
    "triton_op": (OP.replace("custom_op", "triton_op"), "launch(x, 1)", "launch(x, 2)"),
    "launch of a triton_op": (OP.replace("custom_op", "triton_op"), "WIDTH)", "HEIGHT)"),
    "library": (
        'lib = torch.library.Library("a", "DEF")\nlib.define("f(Tensor x) -> Tensor")\n'
        'lib.impl("f", lambda x: x * 5, "CompositeImplicitAutograd")',
        "5",
        "6",
    ),
    "library, decorated": (
        'lib = torch.library.Library("a", "DEF")\n'
        '@torch.library.impl(lib, "f", "Meta")\ndef f(x): return x * 5',
        "5",
        "6",
    ),
    "schema as text": (
        'torch.library.define("a::f", "(Tensor x) -> Tensor")',
        "x)",
        "y)",
    ),
    "alias of a function": (
        "from torch.library import custom_op as co\n"
        '@co("a::op", mutates_args=())\ndef op(x: torch.Tensor) -> torch.Tensor: return x * 5',
        "5",
        "6",
    ),
    "alias of the module": (
        'import torch.library as L\n@L.register_fake("a::op")\ndef _(x): return x * 5',
        "5",
        "6",
    ),
    "assigned alias": (
        "lib = torch.library\nco = lib.custom_op\n"
        '@co("a::op", mutates_args=())\ndef op(x: torch.Tensor) -> torch.Tensor: return x * 5',
        "5",
        "6",
    ),
    "conditional alias": (
        "jit = triton.jit if triton else lambda f: f\nj = jit\n"
        "@j\ndef kernel(x): tl.store(x, 5)",
        "5",
        "6",
    ),
    "alias made at import": (
        "try:\n    from torch.library import custom_op as co\nexcept ImportError:\n    co = None\n"
        '@co("a::op", mutates_args=())\ndef op(x: torch.Tensor) -> torch.Tensor: return x * 5',
        "5",
        "6",
    ),
    "partial": (
        "co = functools.partial(torch.library.custom_op, mutates_args=())\n"
        '@co("a::op")\ndef op(x: torch.Tensor) -> torch.Tensor: return x * 5',
        "5",
        "6",
    ),
    "kept decorator": (
        'co = torch.library.custom_op("a::op", mutates_args=())\n'
        "@co\ndef op(x: torch.Tensor) -> torch.Tensor: return x * 5",
        "5",
        "6",
    ),
    "function form": (
        "def body(x: torch.Tensor) -> torch.Tensor: return x * 5\n"
        'op = torch.library.custom_op("a::op", body, mutates_args=())',
        "5",
        "6",
    ),
    "factory": (
        "def make(name, f): return torch.library.custom_op(name, f, mutates_args=())\n"
        "def body(x: torch.Tensor) -> torch.Tensor: return x * 5\n"
        'op = make("a::op", body)',
        "5",
        "6",
    ),
    "factory called inside": (
        "def make(name, f): return torch.library.custom_op(name, f, mutates_args=())\n"
        "def body(x: torch.Tensor) -> torch.Tensor: return x * 5\n"
        'class Layer:\n    def __init__(self): self.op = make("a::op", body)',
        "5",
        "6",
    ),
    "registrar": (
        OP + "def register(o, f): o.register_fake(f)\ndef fake(x): return x[5:]\n"
        "register(op, fake)",
        "5",
        "6",
    ),
    "inside a function": (
        "def build():\n    @torch.library.custom_op('a::op', mutates_args=())\n"
        "    def op(x: torch.Tensor) -> torch.Tensor: return x * 5\n    return op",
        "5",
        "6",
    ),
    "inside a class": (
        "class Ops:\n    @torch.library.custom_op('a::op', mutates_args=())\n"
        "    def op(x: torch.Tensor) -> torch.Tensor: return x * 5",
        "5",
        "6",
    ),
    "inside an if": ("if torch.cuda:\n" + OP.replace("\n", "\n    "), "x, 1", "x, 2"),
    "allow_in_graph": (
        "@torch.compiler.allow_in_graph\ndef f(x): return x * 5",
        "5",
        "6",
    ),
    "allow_in_graph by a call": (
        "def f(x): return x * 5\ntorch._dynamo.allow_in_graph(f)",
        "5",
        "6",
    ),
    "allow_in_graph of a class": (
        "class F(torch.autograd.Function):\n    backward = staticmethod(lambda ctx, g: g * 5)\n"
        "torch.compiler.allow_in_graph(F)",
        "5",
        "6",
    ),
    "nonstrict_trace": (
        "@torch._dynamo.nonstrict_trace\ndef f(x): return x * 5",
        "5",
        "6",
    ),
    "decomposition": (
        "@register_decomposition(torch.ops.a.op)\ndef f(x): return x * 5",
        "5",
        "6",
    ),
    "decomposition table": ("decompositions[torch.ops.a.op] = lambda x: x * 5", "5", "6"),
    "lowering": ("@register_lowering(torch.ops.a.op)\ndef f(x): return x * 5", "5", "6"),
    "py_impl": ("@torch.ops.a.op.py_impl(KEY)\ndef f(x): return x * 5", "5", "6"),
    "tensor subclass": (
        "class Held(torch.Tensor):\n    @classmethod\n"
        "    def __torch_dispatch__(cls, f, types, args, kwargs): return f(*args) * 5",
        "5",
        "6",
    ),
    "constant two names away": (
        OP.replace("launch(x, 1)", "x * factor()") + "def factor(): return HEIGHT",
        "WIDTH = 4",
        "WIDTH = 5",
    ),
    "constant that is changed": (
        OP.replace("launch(x, 1)", "x * WIDTH") + "WIDTH += 5",
        "+= 5",
        "+= 6",
    ),
    "constant that a function sets": (
        OP.replace("launch(x, 1)", "x * WIDTH")
        + "def widen():\n    global WIDTH\n    WIDTH = 5",
        "= 5",
        "= 6",
    ),
    "table that is filled": (
        OP.replace("launch(x, 1)", "x * TABLE[0]")
        + "TABLE = {}\nfor i in range(5):\n    TABLE[i] = i",
        "5",
        "6",
    ),
    "list that is appended to": (
        OP.replace("launch(x, 1)", "x * LIST[0]")
        + "LIST = []\ndef fill():\n    LIST.append(5)\nfill()",
        "5",
        "6",
    ),
    "class of a constant": (
        OP.replace("launch(x, 1)", "x * Settings.K") + "class Settings:\n    K = 5",
        "5",
        "6",
    ),
    "attribute of a local module": (
        OP.replace("x, 1", "x, C.SIZE"),
        "SIZE = 8",
        "SIZE = 9",
    ),
    "attribute that is set from outside": (OP + "C.SIZE = 5", "5", "6"),
    "attributes that a function sets": (
        OP + "def override():\n    setattr(C, 'SIZE', 5)",
        "5",
        "6",
    ),
    "name from a local module": (OP.replace("x, 1", "x, TILE"), "TILE = 16", "TILE = 32"),
    "what a local module imports": (OP.replace("x, 1", "x, table()"), "[1, 2]", "[1, 3]"),
    "package": (
        "from package.inner import give\n" + OP.replace("x, 1", "x, give()"),
        "GIVEN = 7",
        "GIVEN = 8",
    ),
    "package as a module": (
        "import package.inner\n" + OP.replace("x, 1", "x, package.inner.give()"),
        "GIVEN = 7",
        "GIVEN = 8",
    ),
    "import inside": (
        OP.replace("return", "from package import inner\n    return inner.give(),"),
        "GIVEN = 7",
        "GIVEN = 8",
    ),
    "star import": (
        "from package.sibling import *\n" + OP.replace("x, 1", "x, GIVEN"),
        "N = 7",
        "N = 8",
    ),
    "operator of a local module": ("import extra", "x * 5", "x * 6"),
    "kernel": (KERNEL, "* 2", "* 3"),
    "kernel's decorator": (KERNEL.replace("jit", "jit(debug=5)"), "5", "6"),
    "kernel, conditional": (
        KERNEL.replace("triton.jit", "triton.jit if triton else lambda f: f"),
        "* 2",
        "* 3",
    ),
    "jit by alias": (
        "from triton import jit as j\n" + KERNEL.replace("triton.jit", "j"),
        "* 2",
        "* 3",
    ),
    "jit by a call": (
        "def _kernel(x): tl.store(x, 5)\nkernel = triton.jit(_kernel)",
        "5",
        "6",
    ),
    "autotune": (
        "@triton.autotune([triton.Config({'B': 5})], key=['n'])" + KERNEL,
        "5",
        "6",
    ),
    "attribute that a kernel reads": (
        KERNEL.replace("* 2", "* C.SIZE"),
        "SIZE = 8",
        "SIZE = 9",
    ),
    "global that a kernel reads": (
        KERNEL.replace("* 2", "* WIDTH"),
        "WIDTH = 4",
        "WIDTH = 5",
    ),
    "default argument of a kernel's helper": (
        "@triton.jit\ndef twice(x, k=5): return x * k\n"
        + KERNEL.replace("* 2", "+ twice(1)"),
        "k=5",
        "k=6",
    ),
    "what a constexpr_function reads": (
        "@triton.constexpr_function\ndef size(): return WIDTH\n" + KERNEL,
        "WIDTH = 4",
        "WIDTH = 5",
    ),
    "kernel handed over in a tuple": (
        "@triton.jit\ndef twice(x): return x * 5\nPASSED = (twice,)",
        "5",
        "6",
    ),
    "extension": (
        "from torch.utils.cpp_extension import load_inline\nload_inline('a', cpp_sources='5')",
        "5",
        "6",
    ),
}
# What is edited in the header, with an operator and a kernel in place; each keeps the hash.
KEPT = {
    "knob": ("KNOB = 3", "KNOB = 4"),
    "number of the model": ("+ 30", "+ 31"),
    "function of the model": ("x * KNOB", "x + KNOB"),
    "loop": ("manual_seed(300)", "manual_seed(301)"),
    "comment": ("KNOB = 3", "KNOB = 3  # of three"),
    "comment in an operator": ("return launch(x, 1)", "return launch(x, 1)  # launches"),
    "lines": ("def norm", "\n\n\ndef norm"),
    "parentheses": ("return launch(x, 1)", "return (launch(x,\n        1))"),
    "new function": ("def norm", "def new(x): return op(x)\n\ndef norm"),
    "new import": ("import functools", "import functools, math"),
    "number of another file": ("[1, 2]", "[1, 3]"),
    "order": ("KNOB = 3\nWIDTH = 4", "WIDTH = 4\nKNOB = 3"),
}


def tag(folder: Path, ops: str, old: str = "", new: str = "") -> str:
    """Return the hash of the header with `ops` and its helpers, where `old` has become `new`."""
    files = {"train.py": HEADER.replace("# ops", "# ops\n" + ops), **HELPERS}
    files["extra.py"] = OP.replace("launch(x, 1)", "x * 5").join(["import torch\n", ""])
    changed = 0
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        hits = old and text.count(old)
        changed += bool(hits)
        (folder / name).write_text(text.replace(old, new) if old else text)
    assert changed or not old, "nothing was edited"
    return compile_tag(folder / "train.py")


@pytest.mark.parametrize("kind", SEEN)
def test_the_hash_changes_with_what_the_keys_leave_out(kind, tmp_path):
    ops, old, new = SEEN[kind]
    compile(ops, kind, "exec")
    assert tag(tmp_path, ops) == tag(tmp_path, ops)
    assert tag(tmp_path, ops, old, new) != tag(tmp_path, ops)


@pytest.mark.parametrize("kind", KEPT)
def test_the_hash_stays_after_any_other_edit(kind, tmp_path):
    assert tag(tmp_path, OP + KERNEL, *KEPT[kind]) == tag(tmp_path, OP + KERNEL)


def test_the_hash_of_this_repository_stays_after_an_edit_of_knob_model_or_comment(
    tmp_path,
):
    for name in ("train.py", "constants.py", "sample.py", "prepare.py", "harness"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    train = tmp_path / "train.py"
    text, before = train.read_text(), compile_tag(train)
    edits = {
        r"^DEPTH = .*": "DEPTH = 3  # edited",
        r"^    def forward\(self.*:$": r"\g<0>\n        print('edited')",
        r"^def main\(.*$": r"def added():\n    pass\n\n\n\g<0>",
    }
    for pattern, replacement in edits.items():
        train.write_text(re.sub(pattern, replacement, text, flags=re.MULTILINE))
        assert compile_tag(train) == before, pattern
    train.write_text(f"{text}\n{OP}")
    assert compile_tag(train) != before


def test_the_hash_does_not_depend_on_where_the_repository_lies(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    assert tag(tmp_path / "a", OP + KERNEL) == tag(tmp_path / "b", OP + KERNEL)


@pytest.mark.parametrize("content", [b"def (", b"\0", b"\xff", b"x = " + b"(" * 9999])
def test_what_cannot_be_parsed_counts_with_its_bytes(tmp_path, content):
    source = tmp_path / "train.py"
    source.write_bytes(content)
    before = compile_tag(source)
    source.write_bytes(content + b" ")
    assert compile_tag(source) != before


def test_a_file_that_is_not_there_has_a_hash(tmp_path):
    assert compile_tag(tmp_path / "train.py")


# ---- The folder ---------------------------------------------------------------------------------
@pytest.fixture
def source(tmp_path, monkeypatch) -> Iterator[Path]:
    """Yield a train.py from before this process; what the call sets is put back."""
    names = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "TORCH_COMPILE_CACHE_KEY_TAG")
    for name in names:
        monkeypatch.setenv(name, "")  # noted, to be put back
        monkeypatch.delenv(name)
    monkeypatch.setattr(compile_cache, "OWN_FOLDER", None)
    path = tmp_path / "train.py"
    path.write_text("import torch\n" + OP)
    os.utime(path, (0, 0))
    allowed = "autograd_cache_allow_custom_autograd_functions"
    with (
        torch.compiler.config.patch(cache_key_tag=""),
        torch._functorch.config.patch({allowed: False}),
    ):
        yield path


def test_torch_and_triton_keep_their_code_in_the_folder_of_the_hash(source, tmp_path):
    folder = use_compile_cache(source, tmp_path / "compiled")
    assert folder == tmp_path / "compiled" / compile_tag(source)
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(folder)
    assert os.environ["TRITON_CACHE_DIR"] == str(folder / "triton")
    assert torch.compiler.config.cache_key_tag == folder.name
    # The processes that compile read it there, and name by it what they tuned.
    assert os.environ["TORCH_COMPILE_CACHE_KEY_TAG"] == folder.name
    assert torch._functorch.config.autograd_cache_allow_custom_autograd_functions


def test_a_second_call_and_a_child_process_have_the_same_folder(
    source, tmp_path, monkeypatch
):
    folder = use_compile_cache(source, tmp_path / "compiled")
    assert use_compile_cache(source, tmp_path / "compiled") == folder
    monkeypatch.setattr(compile_cache, "OWN_FOLDER", str(folder))  # as a child finds it
    assert use_compile_cache(source, tmp_path / "compiled") == folder
    assert torch.compiler.config.cache_key_tag == folder.name


def test_a_folder_that_torch_chose_by_itself_is_not_taken_for_the_users(tmp_path):
    code = "import os, train; import torch._dynamo; from pathlib import Path;"
    code += "from harness.compile_cache import use_compile_cache as use;"
    code += "print(use(Path(train.__file__), Path('compiled')).parent)"
    env = os.environ | {"PYTHONPATH": str(ROOT), "AUTORESEARCH_SMOKE": "1"}
    env.pop("TORCHINDUCTOR_CACHE_DIR", None)
    command = [sys.executable, "-c", code]
    printed = subprocess.check_output(command, env=env, cwd=tmp_path, text=True)
    assert printed == f"{tmp_path / 'compiled'}\n"


def test_the_folder_and_the_tag_of_the_user_are_used(source, tmp_path, monkeypatch):
    monkeypatch.setattr(compile_cache, "OWN_FOLDER", str(tmp_path / "own"))
    monkeypatch.setenv("TORCH_COMPILE_CACHE_KEY_TAG", "mine")
    folder = use_compile_cache(source, tmp_path / "compiled")
    assert folder.parent == tmp_path / "own"
    assert torch.compiler.config.cache_key_tag == f"mine{folder.name}"
    assert not (tmp_path / "compiled").exists()


def test_a_folder_that_cannot_be_written_leaves_the_place_to_torch(
    source, tmp_path, monkeypatch
):
    (tmp_path / "file").touch()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    folder = use_compile_cache(source, tmp_path / "file" / "compiled")
    assert folder.is_relative_to(tmp_path / "temporary")
    assert folder.name == torch.compiler.config.cache_key_tag


def test_a_tag_holds_where_no_folder_can_be_written(source, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "file"))
    assert use_compile_cache(source, tmp_path / "file" / "compiled") is None
    assert torch.compiler.config.cache_key_tag == compile_tag(source)
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ


def test_a_file_that_changed_after_the_start_is_compiled_for_this_run_alone(
    source, tmp_path, capsys
):
    os.utime(source)
    folders = {use_compile_cache(source, tmp_path / str(i)).name for i in range(2)}
    assert len(folders | {compile_tag(source)}) == 3
    assert "warning: edit: train.py changed after the start" in capsys.readouterr().out


if __name__ == "__main__":
    serve(json.loads(sys.argv[1]))


WORKERS = """
import constants
import gc, os, sys, threading
from harness.compile_cache import start_compiler
opened = threading.Event()
opened.set()
start_compiler(opened)
from torch._inductor.async_compile import AsyncCompile
AsyncCompile.wait_pool_ready()
print("ready" if AsyncCompile.use_process_pool() else "not ready")
print("let alone" if len(gc.get_objects()) < gc.get_freeze_count() else "seen", flush=True)
os._exit(0)  # as a run ends
"""


def test_what_compiles_is_there_before_the_first_kernel_and_is_not_collected_again(
    tmp_path,
):
    variables = {"TORCHINDUCTOR_COMPILE_THREADS": "2"}
    variables["TORCHINDUCTOR_CACHE_DIR"] = str(tmp_path)
    call = [sys.executable, "-c", WORKERS]
    how = {"cwd": ROOT, "env": os.environ | variables, "text": True}
    done = subprocess.run(call, stdout=subprocess.PIPE, **how)
    assert done.stdout.splitlines() == ["ready", "let alone"]
