"""The cache of compiled code: a folder for each version of the code that its keys leave out.

The keys of torch and Triton hold what they trace. They name, and do not read, an operator (its
schema, fake kernel, gradient, vmap rule), a function that goes into the graph whole, and most of
what a Triton kernel reads outside itself: after an edit of these, the cache would answer with the
code from before. So their source is hashed here, with all that it refers to in local files, and
each hash has its folder. Any other edit, of a knob or of the model, keeps the folder: a warm start.

Not seen: environment variables, installed packages, files that are not Python, and modules whose
name is made at run time.
"""

import ast
import functools
import gc
import hashlib
import os
import re
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path

import torch
import torch._functorch.config

import constants as C
from harness.ops import prepare_compiler
from harness.output import warning

FIXED = Path(__file__).parent  # harness/
# What registers such code, whatever it is an attribute of: torch.library.custom_op,
# op.register_fake, triton.jit. Buffers and hooks are traced.
REGISTERS = re.compile(
    r"custom_op|triton_op|Library|define|impl|impl_abstract|py_\w*impl|py_kernels"
    r"|register_(?!\w*(buffer|hook|module|parameter)$)\w+|decompositions|lowerings"
    r"|allow_in_graph|nonstrict_trace|__torch_dispatch__|load_inline|load_library"
    r"|jit|autotune|heuristics|constexpr_function|_aggregate"
)
Import = ast.Import | ast.ImportFrom
Function = ast.FunctionDef | ast.AsyncFunctionDef
Definition = Function | ast.ClassDef
Assignment = ast.Assign | ast.AnnAssign
Files = dict[Path, list[ast.stmt]]  # the statements at the top level of each


# As the user set it: torch sets the variable itself as soon as torch._dynamo is imported.
OWN_FOLDER = os.environ.get("TORCHINDUCTOR_CACHE_DIR")


def use_compile_cache(source: Path, folder: Path) -> Path | None:
    """Make torch and Triton keep what `source` compiles in one folder, and return that.

    It lies in TORCHINDUCTOR_CACHE_DIR if that is set, else in `folder`; if it cannot be written,
    where torch keeps it by itself (None if not there either). Call it before anything compiles.
    """
    tag = compile_tag(source, time.time() - time.perf_counter() + C.STARTED_AT)
    # A second fence, and the only one where no folder can be written. In the environment too, or
    # the processes that compile name what they tuned otherwise, and it is tuned at every start.
    own = os.environ.get("TORCH_COMPILE_CACHE_KEY_TAG", "").removesuffix(tag)
    os.environ["TORCH_COMPILE_CACHE_KEY_TAG"] = own + tag
    torch.compiler.config.cache_key_tag = own + tag
    # Functions with a gradient of their own are kept too: 3 s of a warm start.
    torch._functorch.config.autograd_cache_allow_custom_autograd_functions = True
    base = Path(OWN_FOLDER or folder).absolute()
    if chosen := open_folder(base, tag):
        return chosen
    from torch._inductor.runtime import cache_dir_utils  # here: the import takes seconds

    return open_folder(Path(cache_dir_utils.default_cache_dir()), tag)


def open_folder(base: Path, tag: str) -> Path | None:
    """Point torch and Triton at the folder `tag` in `base`; None if it cannot be written."""
    chosen = base if base.name == tag else base / tag  # base: as a parent process left it
    with suppress(OSError):
        (chosen / "triton").mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=chosen).close()
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(chosen)
        os.environ["TRITON_CACHE_DIR"] = str(chosen / "triton")
        return chosen


def start_compiler(opened: threading.Event) -> None:
    """Import torch.compile; once the run is open, start the processes that compile kernels.

    They import torch for seconds, and until they are ready this process compiles every kernel
    itself. So they start after a third of the import if the run is open by then, and else when
    it is: a process that ends before that would wait for them, up to 300 s.
    """
    import torch._dynamo  # noqa: F401  (first, as optimizers do beside this thread)
    from torch._inductor.async_compile import AsyncCompile

    if opened.is_set():
        AsyncCompile.use_process_pool()
    prepare_compiler()
    gc.freeze()  # what was imported stays: 0.3 s of looking at it again
    opened.wait()
    AsyncCompile.use_process_pool()


# ---- The hash -----------------------------------------------------------------------------------
def compile_tag(source: Path, started: float = float("inf")) -> str:
    """Return 12 hex digits that change with the code that the keys leave out.

    started: seconds since 1970; a file that changed later is not what runs: a tag used only once.
    """
    files, digest = read_files(source), hashlib.sha256()
    for path in sorted(
        FIXED.glob("*.py")
    ):  # not edited in a night: no need to look closer
        digest.update(path.read_bytes())
    wanted = follow(files, find_roots(files, source.parent), source.parent)
    for path in sorted(files):
        if texts := [ast.dump(tree) for tree in files[path] if tree in wanted]:
            digest.update(repr((path.relative_to(source.parent).parts, texts)).encode())
    newer = [p.name for p in files if p.is_file() and p.stat().st_mtime > started]
    if newer:
        text = f"{newer[0]} changed after the start, so this run compiles everything"
        print(warning("edit", text), flush=True)
        digest.update(str(time.time_ns()).encode())
    return digest.hexdigest()[:12]


def read_files(source: Path) -> Files:
    """Return the statements of `source` and of all files in its folder that it comes to import."""
    files, queue = {}, [source]
    while queue:
        if (path := queue.pop()) in files or path.parent == source.parent / FIXED.name:
            continue
        content = b""
        try:
            content = path.read_bytes()
            files[path] = ast.parse(content).body
        except (OSError, SyntaxError, ValueError, RecursionError):  # its bytes count
            files[path] = ast.parse(
                f"register_{hashlib.sha256(content).hexdigest()}"
            ).body
        for tree in files[path]:
            queue += set().union(*imports(tree, path, source.parent).values())
    return files


@functools.cache
def imports(tree: ast.stmt, path: Path, root: Path) -> dict[str, set[Path]]:
    """Return the names that `tree` in file `path` imports, each with the local files it loads."""
    found, package = {}, path.relative_to(root).parent.parts
    for node in ast.walk(tree):
        stem = ()
        if isinstance(node, ast.ImportFrom):
            stem = package[: len(package) + 1 - node.level] if node.level else ()
            stem += tuple(node.module.split(".")) if node.module else ()
        for name in node.names if isinstance(node, Import) else ():
            parts = (*stem, *name.name.split("."))
            places = [root.joinpath(*parts[: i + 1]) for i in range(len(parts))]
            tries = [
                p for at in places for p in (at.with_suffix(".py"), at / "__init__.py")
            ]
            key = name.asname or name.name.partition(".")[0]
            found.setdefault(key, set()).update(p for p in tries if p.is_file())
    return found


def find_roots(files: Files, root: Path) -> list[tuple[Path, ast.stmt]]:
    """Return the statements that register code or change what another local file holds."""
    pairs = [(path, tree) for path, trees in files.items() for tree in trees]
    functions = {tree.name for _, tree in pairs if isinstance(tree, Function)}
    known, size = set(), -1
    while len(known) > size:
        size = len(known)
        for _, tree in pairs:
            known |= made_names(tree, known, functions)
    roots = []
    for path, trees in files.items():
        loaded = [item for tree in trees for item in imports(tree, path, root).items()]
        local = {name for name, paths in loaded if paths}
        roots += [(path, t) for t in trees if mentions(t, known) or set_parts(t) & local]
    return roots


def made_names(node: ast.AST, known: set[str], functions: set[str]) -> set[str]:
    """Return the names that `node` gives to what registers code: aliases, functions that do it.

    Not those of what is registered (a function by its decorators, a call that is handed one of
    `functions`): code that uses an operator or a kernel is seen by the keys.
    """
    if isinstance(node, Import):
        return {
            name.asname for name in node.names if name.asname and mentions(name, known)
        }
    if isinstance(node, Function):
        inside = any(mentions(n, known) for n in [node.args, *node.body])
        return {node.name} if inside else set()
    blocks = ast.stmt | ast.ExceptHandler | ast.match_case
    children = [n for n in ast.iter_child_nodes(node) if isinstance(n, blocks)]
    inner = [made_names(n, known, functions) for n in children]
    if isinstance(node, ast.ClassDef):
        return {node.name} if any(inner) else set()
    if isinstance(node, ast.Assign | ast.AnnAssign) and mentions(node, known):
        registered = isinstance(node.value, ast.Call) and words(node.value) & functions
        return set() if registered else set_names(node)
    return set().union(*inner)


def follow(files: Files, roots: list[tuple[Path, ast.stmt]], root: Path) -> set[ast.stmt]:
    """Return the statements of `roots` and all that they refer to; an imported file whole."""
    given = functools.cache(lambda path: given_names(files[path], path, root))
    wanted, queue = set(), list(roots)
    while queue:
        path, tree = queue.pop()
        if tree not in wanted:
            wanted.add(tree)
            read = names(tree) | {"*"}
            queue += [(path, t) for t in files[path] if read & given(path)[t]]
            for other in set().union(*imports(tree, path, root).values()):
                queue += [(other, t) for t in files.get(other, [])]  # not if fixed
    return wanted


def given_names(
    trees: list[ast.stmt], path: Path, root: Path
) -> dict[ast.stmt, set[str]]:
    """Return the names whose value each of a file's statements has a part in."""
    given = {tree: set_names(tree) | imports(tree, path, root).keys() for tree in trees}
    imported = set().union(*(imports(tree, path, root) for tree in trees))
    variables = set().union(*given.values()) - imported
    for tree in trees:
        calls = [n.value for n in ast.walk(tree) if isinstance(n, ast.Expr)]
        methods = [c.func for c in calls if isinstance(c, ast.Call)]
        parts = {
            base_name(m) for m in methods if isinstance(m, ast.Attribute)
        } | set_parts(tree)
        if not isinstance(tree, Definition | Assignment):
            parts |= names(tree)  # run at once: fill(TABLE), for i in TABLE: ...
        given[tree] |= parts & variables
    return given


def set_names(tree: ast.stmt) -> set[str]:
    """Return the names at the top level of a file that `tree` defines or assigns."""
    outer = [tree] if isinstance(tree, Definition) else list(ast.walk(tree))
    found = {n.name for n in outer if isinstance(n, Definition)}
    found |= {n.id for n in outer if isinstance(n, ast.Name) and is_set(n)}
    return found.union(*(n.names for n in ast.walk(tree) if isinstance(n, ast.Global)))


def set_parts(tree: ast.stmt) -> set[str | None]:
    """Return each `a` for which `tree` has a.b = 1, a[0] = 1 or setattr(a, "b", 1)."""
    found = set()
    for n in ast.walk(tree):
        if isinstance(n, ast.Attribute | ast.Subscript) and is_set(n):
            found.add(base_name(n))
        elif isinstance(n, ast.Call) and base_name(n.func) == "setattr":
            found |= {base_name(argument) for argument in n.args[:1]}
    return found


def base_name(node: ast.AST | None) -> str | None:
    """Return the `a` of a.b[0].c, None where no name is at the bottom."""
    while isinstance(node, ast.Attribute | ast.Subscript):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None


def is_set(node: ast.expr) -> bool:
    return not isinstance(node.ctx, ast.Load)


def names(tree: ast.AST) -> set[str]:
    return {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}


@functools.cache
def words(node: ast.AST) -> set[str]:
    """Return the names of variables, attributes, imports and definitions in `node`."""
    found = {
        getattr(n, key, None) for n in ast.walk(node) for key in ("id", "attr", "name")
    }
    return {word.rpartition(".")[2] for word in found if word}


def mentions(node: ast.AST, known: set[str]) -> bool:
    """Return whether a word in `node` registers code: one of torch's, or one of `known`."""
    return any(word in known or REGISTERS.fullmatch(word) for word in words(node))
