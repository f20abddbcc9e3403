"""Typical edits of train.py, each made on a copy: a run honours it or refuses it by a sentence.

An edit replaces texts of train.py. Where one is not there any more, because somebody has edited
train.py, its test is skipped. The clock of these runs counts steps, not seconds: one script gives
one value, and any difference is the edit's.
"""

import ast
import json
import math
import re
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest

import constants as C
from conftest import copy_checkout
from runs import NO_DRY_RUN, SMALLER, apply, run_all, stopped, values

SOURCE = (Path(C.__file__).parent / "train.py").read_text("utf-8")
STEPS = 8
EIGHT_SECONDS = ("constants.py", "0.5 if SMOKE", f"{STEPS} if SMOKE")
# Put at the end of harness/run.py.
WATCHED = """
import json

LOG_EVERY = 1
torch.Tensor.bfloat16 = torch.Tensor.float  # many CPUs have no products in bf16: 1 s per step

class Watched(Run):
    def __init__(self, *args):
        super().__init__(*args)
        self.clock = Clock(C.TIME_BUDGET, iter(range(99)).__next__)  # a step takes a second

    def warm_up(self, model, optimizers, *args, **kwargs):
        super().warm_up(model, optimizers, *args, **kwargs)
        self.optimizers = optimizers

    def evaluate(self, model):
        super().evaluate(model)
        rows = torch.from_numpy(self._val_rows.read_all())
        sizes = torch.from_numpy(self.tokenizer.token_bytes)
        again = evaluate_bpb(model, rows, sizes, max(self.batch_size, 2))
        groups = []
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                of = {"optimizer": type(optimizer).__name__, "size": len(group.pop("params"))}
                groups.append(of | group)
        print("shown:", json.dumps({"again": again, "params": self.num_params, "groups": groups}))

Run = Watched
"""
# Makes the model of a smoke run smaller still, where train.py has these lines.
SMALL_MODEL = [
    ("DEPTH -= 2 * (3 * DEPTH // 10)", "DEPTH -= 2 * (4 * DEPTH // 10)"),
    ("round(N_EMBD / 160)", "round(N_EMBD / 320)"),
]
Change = tuple[str, str]  # a text of train.py, what to put in its place


@dataclass
class Ended:
    """How a run ended, and what its log says."""

    status: int
    log: str

    @cached_property
    def val_bpb(self) -> float:
        return float(values(self.log)["val_bpb"])

    @cached_property
    def shown(self) -> dict:
        return json.loads(re.search("^shown: (.*)$", self.log, re.MULTILINE)[1])

    def steps(self, key: str) -> list[float]:
        """Return the number after `key` in each step's line."""
        found = re.findall(rf"^step .*\b{key}: ([\d.,]+)", self.log, re.MULTILINE)
        return [float(number.replace(",", "")) for number in found]


EDITS: dict[str, list[Change]] = {}
UNDER_FULL_RULES: set[str] = set()


def edit(*changes: Change, dry_run: bool = False):
    """Decorate a test with its changes of train.py; dry_run: its run has one beside it."""

    def register(test):
        EDITS[test.__name__] = list(changes)
        if dry_run:
            UNDER_FULL_RULES.add(test.__name__)
        return test

    return register


def put(new: str, *, before: str = "", after: str = "") -> Change:
    """Return the change that puts `new` before one text or after another."""
    return before + after, after + new + before


def same(text: str) -> Change:
    """Return the change of nothing: the edit is made only where train.py has this text."""
    return text, text


def lines_of(node: ast.AST | None, what: str) -> str:
    """Return the lines of SOURCE that `node` takes; without one a text that is not there."""
    if node is None:
        return f"(train.py has no {what})"
    first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
    return "".join(SOURCE.splitlines(keepends=True)[first - 1 : node.end_lineno])


def definition(name: str) -> str:
    """Return the lines of the class, function or knob at the top of train.py."""

    def names(node: ast.stmt) -> list[str]:
        targets = getattr(node, "targets", [])
        return [getattr(node, "name", ""), *(getattr(t, "id", "") for t in targets)]

    found = (node for node in ast.parse(SOURCE).body if name in names(node))
    return lines_of(next(found, None), name)


def table_line(names: str) -> str:
    """Return the lines of the table in build_optimizers that begin a group of these names."""
    found = (
        node
        for node in ast.walk(ast.parse(SOURCE))
        if isinstance(node, ast.Call)
        and getattr(node.func, "id", "") == "group"
        and [getattr(argument, "value", "") for argument in node.args[1:2]] == [names]
    )
    return lines_of(next(found, None), f"group of {names}")


def made(name: str, source: str) -> str:
    """Return `source` with the changes of a test; LookupError if a text is not there, once."""
    for old, new in EDITS[name]:
        if source.count(old) != 1:
            what = old.strip().partition("\n")[0]
            raise LookupError(f"train.py has {what!r} {source.count(old)} times")
        source = source.replace(old, new)
    return source


@pytest.fixture(scope="module")
def runs(request, tmp_path_factory) -> dict[str, Ended | str]:
    """Run train.py, twice, and the edits of all selected tests; a text says why one is not made."""
    folder = tmp_path_factory.mktemp("edits")
    honest = copy_checkout(folder / "honest")
    apply(honest, [*SMALLER, EIGHT_SECONDS])
    source = SOURCE
    for old, new in SMALL_MODEL:
        source = source.replace(old, new)
    with (honest / "harness" / "run.py").open("a", encoding="utf-8") as file:
        file.write(WATCHED)
    (honest / "train.py").write_text(source, "utf-8")
    shutil.copytree(honest, folder / "again")
    ended: dict[str, Ended | str] = {}
    selected = [item.name for item in request.session.items if item.name in EDITS]
    for name in selected:
        try:
            edited = made(name, source)
        except LookupError as error:
            ended[name] = str(error)
            continue
        shutil.copytree(honest, folder / name)
        (folder / name / "train.py").write_text(edited, "utf-8")
    there = [path for path in sorted(folder.iterdir()) if path.name != "honest"]
    for path in [honest, *there]:
        if path.name not in UNDER_FULL_RULES:
            apply(path, [NO_DRY_RUN])
    results = run_all([honest, *there])
    return ended | {name: Ended(*result) for name, result in results.items()}


@pytest.fixture
def honest(runs) -> Ended:
    return runs["honest"]


@pytest.fixture
def run(runs, request) -> Ended:
    """The run of the test's edit."""
    run = runs[request.node.name]
    if isinstance(run, str):
        pytest.skip(run)
    if "not checked, the dry run took over" in run.log:
        pytest.skip("the machine is too busy for the dry run")
    return run


def refused(run: Ended, why: str) -> None:
    """Assert that the run was refused before the clock started, in a sentence."""
    stopped((run.status, run.log), why)
    assert "\nstep " not in run.log


def honoured(run: Ended, honest: Ended, warnings: int = 0) -> None:
    """Assert that the run trained, differently, and that its evaluation can be repeated.

    warnings: how many there are beside those of the unedited train.py.
    """
    assert run.status == 0 and len(run.steps("loss")) == STEPS, run.log
    new = run.log.count("\nwarning: ") - honest.log.count("\nwarning: ")
    assert new == warnings, run.log
    assert run.val_bpb != honest.val_bpb
    assert run.shown["again"] == pytest.approx(run.val_bpb, abs=1e-6)


def groups(run: Ended, names: str) -> list[dict]:
    """Return what became of the optimizer groups of these names."""
    return [group for group in run.shown["groups"] if group.get("names") == names]


def test_without_an_edit_two_runs_are_alike(runs, honest):
    """Else a difference below would say nothing."""
    again = runs["again"]
    assert (honest.status, again.status) == (0, 0), honest.log
    assert again.val_bpb == honest.val_bpb and again.shown == honest.shown
    assert again.steps("loss") == honest.steps("loss")


# ---- The model ----------------------------------------------------------------------------------
@edit(("DEPTH = 10 ", "DEPTH = 12 "), ("    DEPTH = 2\n", "    DEPTH = 3\n"))
def test_deeper(run, honest):
    honoured(run, honest)
    assert (values(run.log)["depth"], values(honest.log)["depth"]) == ("3", "2")
    assert run.shown["params"] > honest.shown["params"]


FC = "        self.c_fc = Linear(C, 4 * C, config.init_std)\n"
RELU2 = "return norm_relu2_mlp(x, self.c_fc.weight, self.c_proj.weight)"
SWIGLU = (RELU2, "return self.c_proj(F.silu(self.c_gate(norm(x))) * self.c_fc(norm(x)))")


@edit((RELU2, "return self.c_proj(F.gelu(self.c_fc(norm(x))))"))
def test_another_activation(run, honest):
    honoured(run, honest)
    assert run.shown["params"] == honest.shown["params"]


@edit(put(FC.replace("c_fc", "c_gate"), before=FC), SWIGLU)
def test_swiglu(run, honest):
    honoured(run, honest)
    assert run.shown["params"] > honest.shown["params"]


@edit(put("        self.c_gate = Linear(C, 4 * C, std=0.0)\n", before=FC), SWIGLU)
def test_swiglu_whose_gate_and_projection_are_both_zero(run):
    """Neither would ever have a gradient."""
    refused(run, r"h\.0\.mlp\.c_gate\.weight, .*: the gradient is zero in 3 steps")


SCALE = [
    put(
        "\n        self.mlp_scale = nn.Parameter(torch.ones(C))",
        after="        self.c_proj = Linear(4 * C, C, std=0.0)  # adds nothing at first",
    ),
    (RELU2, RELU2.replace("norm_", "self.mlp_scale * norm_")),
]
SCALARS = table_line("h.*.resid_lambda")


@edit(*SCALE)
def test_a_new_vector_in_no_group(run):
    refused(
        run, r"h\.0\.mlp\.mlp_scale, .*: in no optimizer; each parameter belongs to one"
    )


@edit(*SCALE, put('        group("scalar", "h.*.mlp_scale", 0.01),\n', before=SCALARS))
def test_a_new_vector_in_a_group(run, honest):
    honoured(run, honest)
    (group,) = groups(run, "h.*.mlp_scale")
    assert group["size"] == int(values(run.log)["depth"])


ADDS = " + a * x0 + ngram"
KNOBS = """NGRAM_ENTRIES NGRAM_LAMBDA_INIT NGRAM_LR NGRAM_LAMBDA_LR NGRAM_BETA2 NGRAM_WEIGHT_DECAY
NGRAM_REFILL NgramEmbedding RowRMSprop""".split()
OF_NGRAMS = """
    NGRAM_ENTRIES = -(-NGRAM_ENTRIES // 2**11)
    ngram_entries: int
    ngram_lambda_init: tuple[float, float]
        if self.ngram_entries < 1:
            raise ValueError(f"NGRAM_ENTRIES ({self.ngram_entries}) is below 1")
        self.ngram_lambda = scalar(*config.ngram_lambda_init)
        # On bigrams, on trigrams; 1 at first.
        self.ngram_gate = Linear(GATE_CHANNELS, 2, std=0.0)
        gate = torch.sigmoid(self.ngram_gate(norm(x[..., :GATE_CHANNELS])))  # (B, T, 2)
        gate = 2 * self.ngram_lambda * gate
        ngram = (gate[..., None] * ngram).flatten(-2)  # (B, T, C)
        self.ngram = NgramEmbedding(config)
        ngram_entries=NGRAM_ENTRIES,
        ngram_lambda_init=NGRAM_LAMBDA_INIT,
    ngram_lr = NGRAM_LR * width_scale
        RowRMSprop(row_rmsprop),
    epoch, tables = 1, [m for m in model.modules() if isinstance(m, NgramEmbedding)]
    of_table = [o for o in optimizers if isinstance(o, RowRMSprop)]
        if step.epoch > epoch:  # the n-grams know its rows
            epoch, gone = step.epoch, step.progress
            if (epoch - 1) * (1 - gone) > NGRAM_REFILL * gone:
                for table in tables:
                    nn.init.zeros_(table.weight)
            elif of_table:
                optimizers = of_table
""".strip("\n")


@edit(
    *((definition(name), "") for name in KNOBS),
    (table_line("h.*.ngram_lambda"), ""),
    ("    row_rmsprop = [\n" + table_line("ngram.weight") + "    ]\n", ""),
    *((f"{line}\n", "") for line in OF_NGRAMS.splitlines()),
    (ADDS, ADDS.removesuffix(" + ngram")),
    (
        "def before(self, x, change, x0, ngram, cos, sin)",
        "def before(self, x, change, x0, cos, sin)",
    ),
    (
        "def forward(self, x, change, x0, ngram, idx, cos, sin)",
        "def forward(self, x, change, x0, idx, cos, sin)",
    ),
    ("before(x, change, x0, ngram, cos, sin)", "before(x, change, x0, cos, sin)"),
    ("        entry, sign = self.ngram.find(idx)\n", ""),
    ("        ngram = self.ngram(entry) * sign[..., None]\n", ""),
    (
        "        return norm(self.wte(idx, self.dtype)), ngram.to(self.dtype)\n",
        "        return norm(self.wte(idx, self.dtype))\n",
    ),
    ("x0, ngram = self.embed(idx)", "x0 = self.embed(idx)"),
    ("        ngrams = fan_out(ngram, len(self.h))\n", ""),
    (
        "for block, x0, ngram in zip(self.h, x0s, ngrams, strict=True)",
        "for block, x0 in zip(self.h, x0s, strict=True)",
    ),
    ("block(x, change, x0, ngram, idx, cos, sin)", "block(x, change, x0, idx, cos, sin)"),
)
def test_no_ngrams(run, honest):
    """Whatever is theirs goes: knobs, class, gates, table, optimizer, schedule."""
    honoured(run, honest)
    assert run.shown["params"] < honest.shown["params"]
    assert not any("ngram" in group.get("names", "") for group in run.shown["groups"])


@edit(
    ("self.ngram = NgramEmbedding", "self.hashed = NgramEmbedding"),
    ("= self.ngram.find(idx)", "= self.hashed.find(idx)"),
    ("self.ngram(entry)", "self.hashed(entry)"),
    ('"ngram.weight"', '"hashed.weight"'),
)
def test_a_table_with_another_name_is_as_good(run, honest):
    assert run.status == 0, run.log
    assert run.val_bpb == pytest.approx(honest.val_bpb, abs=1e-3)


@edit((ADDS, ADDS.removesuffix(" + ngram")))
def test_ngrams_that_are_not_added_but_still_there(run):
    refused(run, "h.0.ngram_.*: no gradient; the model does not use it")


TIED = put(
    "        self.lm_head.weight = self.wte.weight\n",
    after="        self.lm_head = Linear(config.n_embd, config.vocab_size, std=0.001)\n",
)


@edit(TIED)
def test_a_tied_head_whose_group_is_empty(run):
    refused(
        run, r"group \d of \w+ \(lm_head\.weight\) is empty; correct its pattern or take"
    )


@edit(TIED, (table_line("lm_head.weight"), ""), same("self.wte.weight, std=1.0)"))
def test_a_tied_head_begins_with_a_high_loss(run, honest):
    """Of embeddings as large as the untied ones; a smaller start would do without a warning."""
    honoured(run, honest, warnings=2)
    assert "warning: edit: the loss of the first step on random ids is " in run.log
    assert "warning: edit: the loss of step 0 is " in run.log
    assert run.shown["params"] < honest.shown["params"]


@edit(
    put("N_KV_HEAD = 1  # heads of keys and values\n", before="WINDOW_PATTERN = "),
    put("    n_kv_head: int\n", after="    head_dim: int\n"),
    put("        n_kv_head=N_KV_HEAD,\n", after="        head_dim=HEAD_DIM,\n"),
    put(
        "\n        K = config.n_kv_head",
        after="        C, H, std = config.n_embd, config.n_head, config.init_std",
    ),
    ("self.c_k = Linear(C, C, std)", "self.c_k = Linear(C, K * config.head_dim, std)"),
    ("self.c_v = Linear(C, C, std)", "self.c_v = Linear(C, K * config.head_dim, std)"),
    (
        "= Embedding(config.vocab_size, C)",
        "= Embedding(config.vocab_size, K * config.head_dim)",
    ),
    (
        "self.value_gate = Linear(GATE_CHANNELS, H,",
        "self.value_gate = Linear(GATE_CHANNELS, K,",
    ),
    (
        "        y = self.attend(q, k, v, self.window, self.scale)",
        "        k, v = (t.repeat_interleave(q.size(2) // k.size(2), 2) for t in (k, v))\n"
        "        y = self.attend(q, k, v, self.window, self.scale)",
    ),
)
def test_fewer_heads_of_keys_and_values(run, honest):
    honoured(run, honest)
    assert run.shown["params"] < honest.shown["params"]


PLAIN_QKV = """q, k, v = (
            f(norm(x)).unflatten(-1, (-1, self.head_dim))
            for f in (self.c_q, self.c_k, self.c_v)
        )
        slow = torch.arange(self.head_dim, device=x.device) % (self.head_dim // 2)
        k_before = F.pad(k[:, :-1], (0, 0, 0, 0, 1, 0))
        k = torch.where(slow >= self.head_dim // 4, k_before, k)
        q, k = rotary_norm(q, cos, sin), rotary_norm(k, cos, sin)"""


@edit(
    ("q, k, v = norm_qkv(x, *weights, cos, sin, offset=True)", PLAIN_QKV),
    ("    norm_relu2_mlp,\n", "    norm_relu2_mlp,\n    rotary_norm,\n"),
)
def test_queries_keys_and_values_in_plain_torch_are_the_same(run, honest):
    assert run.status == 0, run.log
    assert run.val_bpb == pytest.approx(honest.val_bpb, abs=1e-3)


DOCUMENTS = '''def document_attention(q, k, v, window, scale, idx):
    """Attend within a window and a document: no key before the last BOS is seen."""
    document = (idx == BOS_ID).cumsum(1)  # (B, T)
    at = torch.arange(idx.size(1), device=idx.device)
    distance = at[:, None] - at
    seen = (distance >= 0) & (distance < window)
    seen = seen & (document[:, :, None] == document[:, None])  # (B, T, T)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, seen[:, None], scale=scale)
    return y.transpose(1, 2)


'''


@edit(
    ("from constants import MAX", "from constants import BOS_ID, MAX"),
    put(DOCUMENTS, before="class Block("),
    (
        "y = self.attend(q, k, v, self.window, self.scale)",
        "y = document_attention(q, k, v, self.window, self.scale, idx)",
    ),
)
def test_attention_within_documents(run, honest):
    honoured(run, honest)


LAST = "return x, self.mlp(x)"


@edit((LAST, "return x, F.dropout(self.mlp(x), 0.3, self.training)"))
def test_dropout(run, honest):
    """It is on in training alone: the evaluation, done twice, is the same."""
    honoured(run, honest)


@edit((LAST, "return x, F.dropout(self.mlp(x), 0.3)"))
def test_dropout_that_is_never_turned_off(run):
    refused(run, "evaluation refused: the model .* is random in evaluation mode")


PLACES = [
    put(
        "        self.wpe = nn.Parameter(torch.zeros(1024, config.n_embd))\n",
        before="        self.ngram = NgramEmbedding(config)\n",
    ),
    put(
        "        x = x + self.wpe[: x.size(1)]\n",
        before="        for block, x0, ngram in",
    ),
    put('        group("embedding", "wpe", 0.01),\n', before=SCALARS),
]


@edit(*PLACES, dry_run=True)
def test_a_table_too_short_for_a_full_row(run):
    """Smoke rows are short enough for it."""
    refused(
        run,
        r"under the full rules: RuntimeError: .*\b1024\b.*\b2048\b",
    )


@edit(("N_EMBD = 640", "N_EMBD = 700"), same("HEAD_DIM = 128 "), dry_run=True)
def test_a_width_that_works_in_a_smoke_run_alone(run):
    refused(
        run,
        r"under the full rules: ValueError: HEAD_DIM .* does not divide N_EMBD \(700\)",
    )


@edit(
    (definition("DEPTH"), "DEPTH = 25\n"),
    (definition("N_EMBD"), "N_EMBD = 1280\n"),
    (definition("NGRAM_ENTRIES"), "NGRAM_ENTRIES = 2**23\n"),
)
def test_the_models_size_is_what_the_knobs_say_in_a_smoke_run_too(run, honest):
    honoured(run, honest)
    assert int(values(run.log)["depth"]) > int(values(honest.log)["depth"])
    assert run.shown["params"] > 3.5 * honest.shown["params"]  # table: twice in both ways


# ---- Optimizers and schedules -------------------------------------------------------------------
@edit(("h.*.c_*.weight ", "h.*.c_*.weight lm_head.weight "))
def test_a_parameter_in_two_optimizers(run):
    refused(run, r"lm_head\.weight: in two groups, lm_head\.weight and h\.\*\.c_\*")


@edit(('"wte.weight"', '"wte.weight lm_head.weight"'))
def test_a_parameter_in_two_groups_of_one_optimizer(run):
    refused(run, r"lm_head\.weight: in two groups")


@edit(("EMBEDDING_LR = 0.9 ", "EMBEDDING_LR = 0 "))
def test_a_learning_rate_of_0(run, honest):
    honoured(run, honest, warnings=1)
    assert re.search(
        r"warning: edit: wte\.weight.*: not moved by 3 steps; is its learn", run.log
    )


CLIP = put(
    "    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)\n",
    before="    for optimizer in optimizers:\n        optimizer.step()\n",
)


@edit(CLIP)
def test_clipping_of_a_sparse_gradient(run):
    """Torch's own message has 40 lines, none of which says what to do."""
    refused(run, r"linalg_vector_norm")
    advice, _ = run.log.splitlines()[-2:]  # the last says that there is no result
    assert re.search("^train.py: .*sparse=False", advice)


@edit(CLIP, (", sparse=True)", ", sparse=False)"))
def test_clipping_of_a_gradient_that_is_not_sparse(run, honest):
    honoured(run, honest)


@edit(
    (table_line("lm_head.weight"), ""),
    put(
        '    sgd = [group("head", "lm_head.weight", 0.5, 0.01, momentum=0.9)]\n',
        before="    row_rmsprop = [",
    ),
    put("        torch.optim.SGD(sgd),\n", before="        RowRMSprop(row_rmsprop),\n"),
)
def test_sgd_for_the_head(run, honest):
    """Its momentum and decay stay what they are: those of the schedules are Muon's."""
    honoured(run, honest)
    (group,) = groups(run, "lm_head.weight")
    last = run.steps("lrm")[-1]
    assert (group["optimizer"], group["momentum"], group["weight_decay"]) == (
        "SGD",
        0.9,
        0.01,
    )
    assert group["lr"] == pytest.approx(0.5 * last, abs=0.5 * 0.005)


COSINE = '''def lr_multiplier(progress: float) -> float:
    """Return the factor on all learning rates at `progress`: half a cosine."""
    return (1 + math.cos(math.pi * progress)) / 2
'''


@edit(
    put("import math\n", before="import torch\n"), (definition("lr_multiplier"), COSINE)
)
def test_a_cosine_schedule(run, honest):
    honoured(run, honest)
    expected = [(1 + math.cos(math.pi * step / STEPS)) / 2 for step in range(STEPS)]
    assert run.steps("lrm") == pytest.approx(expected, abs=0.005)
    assert run.steps("lrm") != honest.steps("lrm")


# ---- The batch ----------------------------------------------------------------------------------
@edit(
    ("TOTAL_BATCH_SIZE = 2**17", "TOTAL_BATCH_SIZE = 3 * 2**16"),
    same("DEVICE_BATCH_SIZE = 64 "),
)
def test_a_batch_that_rows_do_not_divide(run):
    batch = r"TOTAL_BATCH_SIZE \(196608 tokens\) is 96 rows"
    refused(run, batch + r" .* DEVICE_BATCH_SIZE \(64\) does not divide")


def ramp(first: str) -> list[Change]:
    """Return the changes for a batch of `first` micro-steps in the first half of the budget."""
    return [
        put("from itertools import islice\n", after="from fnmatch import fnmatch\n"),
        ("DEVICE_BATCH_SIZE = 64 ", "DEVICE_BATCH_SIZE = 16 "),
        put(
            f"        few = {first} if step.progress < 0.5 else step.micro_steps\n",
            before="        step.loss = train_step(",
        ),
        ("step.batches, step.micro_steps)", "islice(step.batches, few), few)"),
    ]


@edit(*ramp("1"))
def test_a_batch_that_grows(run, honest):
    honoured(run, honest)
    tokens = run.steps("tok/sec")  # a step takes a second
    half = STEPS // 2
    assert len({*tokens[:half]}) == len({*tokens[half:]}) == 1
    assert tokens[-1] > tokens[0] and tokens[-1] % tokens[0] == 0


@edit(*ramp("0"))
def test_a_step_without_a_batch(run):
    """An optimizer may fail for want of gradients before the run can say what is missing."""
    stopped(
        (run.status, run.log), "step 0 took no batch; use step.batches|'NoneType' object"
    )
