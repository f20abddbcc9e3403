"""Laws of the model, which hold for any honest edit of train.py, whatever the knobs say."""

import dataclasses
import importlib.util
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import constants as C
import harness.ops
import train
from harness.attention import masked_attention
from laws import (
    CPU,
    SHORT,
    T,
    V,
    difference,
    fresh,
    lively,
    loss_and_gradients,
    part,
    some_batch,
    some_ids,
)


def changed_config(**changes):
    """Return the configuration with other values; skip the test if it has no such fields."""
    config = train.build_config()
    missing = changes.keys() - {field.name for field in dataclasses.fields(config)}
    if missing:
        pytest.skip(
            f"the configuration has no {', '.join(missing)}, which it need not have"
        )
    return dataclasses.replace(config, **changes)


# ---- What it computes ---------------------------------------------------------------------------
def test_logits_are_floats_for_every_id_at_every_position():
    logits = fresh()(some_ids())
    assert logits.shape == (2, SHORT, V) and logits.dtype == torch.float32


@torch.no_grad()
def test_what_comes_later_moves_nothing_before_it():
    model, idx = lively().eval(), some_ids(1, T)
    # All residues of 64: a leak within blocks of a power of two shows at some of them.
    cuts = [1 + cut + 64 * (7 * cut % (T // 64)) for cut in range(63)]
    assert {cut % 64 for cut in cuts} == set(range(1, 64)) and max(cuts) < T
    changed = idx.repeat(len(cuts), 1)
    for row, cut in zip(changed, cuts, strict=True):
        row[cut:] = (row[cut:] + 1 + some_ids(1, T, cut)[0, cut:] % (V - 1)) % V
    base, logits = model(idx)[0], model(changed)
    for moved, cut in zip(logits, cuts, strict=True):
        torch.testing.assert_close(moved[:cut], base[:cut], atol=1e-4, rtol=1e-4)
        assert not torch.allclose(moved[cut], base[cut], atol=1e-2)  # its own id counts


@torch.no_grad()
def test_rows_do_not_mix():
    model, idx = lively().eval(), some_ids(3)
    base, changed = model(idx), idx.clone()
    changed[1] = (changed[1] + 1) % V
    logits = model(changed)
    for row in (0, 2):
        torch.testing.assert_close(logits[row], base[row], atol=1e-4, rtol=1e-4)
        alone = model(idx[row : row + 1])[0]
        torch.testing.assert_close(alone, base[row], atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 2, 5, 31])
def test_a_short_row_is_the_beginning_of_a_long_one(length):
    model, idx = lively().eval(), some_ids()
    short, long = model(idx[:, :length]), model(idx)
    torch.testing.assert_close(short, long[:, :length], atol=1e-4, rtol=1e-4)


# ---- Loss ---------------------------------------------------------------------------------------
def exact_loss(model, x, y) -> torch.Tensor:
    """Return torch's cross-entropy of model(x), in float64."""
    return F.cross_entropy(model(x).double().flatten(0, 1), y.flatten())


@torch.no_grad()
def test_the_loss_of_an_untrained_model_is_that_of_a_guess():
    loss = exact_loss(fresh().eval(), *some_batch(8))
    assert float(loss) == pytest.approx(math.log(V), rel=0.05)


@pytest.mark.parametrize("build", [fresh, lively])
def test_loss_and_gradients_of_a_step_are_those_of_torchs_cross_entropy(build):
    model, batch = build(), some_batch()
    loss, gradients = loss_and_gradients(model, [batch])
    model.zero_grad()
    expected = exact_loss(model, *batch)
    expected.backward()
    apart = abs(loss / float(expected.detach()) - 1)
    exact = {n: p.grad.double() for n, p in model.named_parameters() if n in gradients}
    assert any(gradient.any() for gradient in gradients.values())
    # What is zero but for rounding has no relative error.
    largest = max(float(g.norm()) for g in exact.values())
    exact = {n: g for n, g in exact.items() if float(g.norm()) > 1e-6 * largest}
    gradients_apart = difference({n: gradients[n] for n in exact}, exact)
    if max(apart, gradients_apart) > 0.05:
        pytest.skip(
            f"train_step's loss is not plain cross-entropy (off by {apart:.1%}, its gradients "
            f"by {gradients_apart:.1%}): something is added to it or clipped"
        )
    assert apart < 1e-3 and gradients_apart < 1e-2  # an added term of 1e-4 passes as well


@torch.no_grad()
@pytest.mark.parametrize("softcap", [1.0, 15.0, 1000.0])
def test_any_softcap_that_is_taken_gives_logits_the_loss_that_is_trained(softcap):
    part("SOFTCAP")
    model, (x, y) = lively().eval(), some_batch()
    model.config = dataclasses.replace(model.config, softcap=softcap)
    model.lm_head.weight.mul_(100)
    assert float(model.loss(x, y)) == pytest.approx(float(exact_loss(model, x, y)), 1e-5)


def test_the_loss_of_a_step_is_a_number_without_a_graph():
    model = fresh()
    optimizers = train.build_optimizers(model)
    loss = train.train_step(model, optimizers, [some_batch()], 1)
    assert loss.ndim == 0 and not loss.requires_grad and loss.device.type == "cpu"


def test_evaluation_gives_the_logits_of_training_and_keeps_no_graph():
    model, idx = lively(), some_ids()
    trained, evaluated = model.train()(idx), model.eval()(idx)
    with torch.no_grad():
        plain = model(idx)
    assert not plain.requires_grad
    torch.testing.assert_close(plain, evaluated.detach(), atol=1e-5, rtol=1e-5)
    if not torch.equal(trained, evaluated):
        pytest.skip("the model differs by mode, as with dropout")
    assert trained.requires_grad


def test_the_same_seed_draws_the_same_weights():
    first, second = fresh().state_dict(), fresh().state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


# ---- Counts -------------------------------------------------------------------------------------
def test_flops_are_six_for_each_weight_and_at_most_full_attention_beside():
    # Attention that costs nothing: what torch counts is then matmuls with weights.
    model = fresh(lambda q, k, v, window, scale: v if v.shape == q.shape else q)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.eval()(some_ids(2, T))
    weights = 3 * counter.get_total_flops() / (2 * T)  # a backward pass costs two forward
    config = model.config if hasattr(model, "config") else train.build_config()
    assert weights > 0
    assert model.flops_per_token() >= 0.999 * weights
    if not (hasattr(config, "n_layer") and hasattr(config, "n_embd")):
        pytest.skip("the configuration has no n_layer or n_embd, which it need not have")
    attention = 12 * config.n_embd * config.n_layer * T
    assert model.flops_per_token() <= 1.001 * (weights + attention)


def test_the_graphs_that_are_compiled_do_not_grow_with_depth(monkeypatch):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    # As on a GPU, where what is decorated is compiled; here to what it was before.
    monkeypatch.setattr(
        harness.ops,
        "compiled",
        lambda function: torch.compile(
            function, backend=backend, dynamic=False, fullgraph=True
        ),
    )
    spec = importlib.util.spec_from_file_location("train_compiled", train.__file__)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look there
    spec.loader.exec_module(module)
    changed_config(n_layer=6)  # skips where there is no such field
    counts = []
    for n_layer in (6, 12):
        torch._dynamo.reset()
        graphs.clear()
        config = dataclasses.replace(module.build_config(), n_layer=n_layer)
        model = module.build_model(config, masked_attention, CPU)
        optimizers = module.build_optimizers(model)
        for progress in (0.0, 0.6):
            module.set_schedules(optimizers, progress)
            module.train_step(model, optimizers, [some_batch()], 1)
        with torch.no_grad():
            model.eval()(some_ids())
        counts.append(len(graphs))
    torch._dynamo.reset()
    assert 0 < counts[0] == counts[1]


# ---- Import and knobs ---------------------------------------------------------------------------
def test_importing_train_prints_nothing_writes_nothing_and_leaves_the_gpu_alone(tmp_path):
    code = "import train, torch; assert not torch.cuda.is_initialized()"
    env = os.environ | {"PYTHONPATH": str(Path(C.__file__).parent), "HOME": str(tmp_path)}
    env |= {"AUTORESEARCH_CACHE": str(tmp_path / "cache"), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=env,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "knob, value",
    [
        ("DEPTH", 0),
        ("HEAD_DIM", 48),
        ("WINDOW_PATTERN", "SM"),
        ("SHORT_WINDOW", 10**6),
        ("NGRAM_ENTRIES", 0),
        ("SOFTCAP", 0.0),
        ("SOFTCAP", 1e6),
    ],
)
def test_a_knob_that_cannot_work_is_named(monkeypatch, knob, value):
    part(knob)
    monkeypatch.setattr(train, knob, value)
    with pytest.raises(ValueError, match=knob):
        train.build_config()


# ---- Windows ------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "pattern, n_layer, expected",
    [
        ("SL", 3, [4, T, T]),
        ("S", 4, [4, 4, 4, T]),
        ("SSL", 5, [4, 4, T, 4, T]),
        ("S", 1, [T]),
    ],
)
def test_windows_repeat_the_pattern_and_end_with_a_full_one(pattern, n_layer, expected):
    changes = {"window_pattern": pattern, "n_layer": n_layer, "short_window": 4}
    config = changed_config(**changes)
    if not hasattr(config, "windows"):
        pytest.skip("the configuration has no windows, which it need not have")
    assert list(config.windows) == expected


@torch.no_grad()
def test_each_layer_attends_within_its_window():
    given = []

    def attend(q, k, v, window, scale):
        given.append(window)
        return masked_attention(q, k, v, window, scale)

    model = fresh(attend)
    if not hasattr(getattr(model, "config", None), "windows"):
        pytest.skip("the configuration has no windows, which it need not have")
    model.eval()(some_ids(1, T))
    assert given == list(model.config.windows)


# ---- Hooks --------------------------------------------------------------------------------------
@torch.no_grad()
def test_a_hook_on_a_table_of_embeddings_fires():
    """One that did not would leave an edit without effect, and without a word."""
    model, fired = lively().eval(), set()
    tables = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Embedding)}
    for name, table in tables.items():
        table.register_forward_hook(lambda *_, name=name: fired.add(name))
    model(some_ids())
    assert fired == tables.keys()


# ---- N-grams ------------------------------------------------------------------------------------
ENTRIES = 256


def entries_and_signs(idx: torch.Tensor, entries: int = ENTRIES):
    """Return of each n-gram that ends at idx (B, T) its entry and its sign, both (B, T, 2)."""
    table = part("NgramEmbedding")(changed_config(ngram_entries=entries))
    entry, sign = table.find(idx)
    assert entry.min() >= 0 and entry.max() < entries
    assert torch.equal(sign.abs(), torch.ones_like(sign))
    return entry, sign


def test_an_ngram_has_its_entry_and_sign_wherever_it_stands_and_others_have_others():
    idx = some_ids(2, 32)
    idx[1, 3:6] = idx[0, 18:21]  # the same three elsewhere
    entry, sign = entries_and_signs(idx, 2**20)
    for found in (entry[..., :2], sign[..., :2]):  # longer n-grams reach further back
        assert torch.equal(found[1, 5], found[0, 20])
    changed = idx.clone()
    changed[0, 12] = (changed[0, 12] + 1) % V
    moved = entries_and_signs(changed, 2**20)[0] != entry
    two, three = (moved[..., i].nonzero().tolist() for i in range(2))
    assert two == [[0, 12], [0, 13]] and three == [[0, 12], [0, 13], [0, 14]]
    # The order of ids counts: of the pairs read backwards few have the entry they had.
    backwards = entries_and_signs(idx.flip(1), 2**20)[0].flip(1)
    assert (backwards[:, 1:-1, 0] != entry[:, 2:, 0]).float().mean() > 0.9
    # Those of two are not those of three, and a row may be as short as one id.
    assert (entry[..., 0] != entry[..., 1]).float().mean() > 0.99
    assert torch.equal(entries_and_signs(idx[:, :1], 2**20)[0], entry[:, :1])


@torch.no_grad()
def test_what_an_ngram_adds_is_its_entry_times_its_sign():
    part("NgramEmbedding")
    model, idx = lively().eval(), some_ids()
    model.ngram.weight.copy_(torch.arange(1.0, len(model.ngram.weight) + 1)[:, None])
    entry, sign = model.ngram.find(idx)
    embedded = model.embed(idx)[1]  # (B, T, 2, C / 2)
    expected = (model.ngram.weight[entry, 0].float() * sign)[..., None]
    assert torch.equal(embedded, expected.expand_as(embedded))


def test_ngrams_spread_evenly_over_entries_and_signs():
    generator = torch.Generator().manual_seed(2)
    idx = torch.randint(8192, (1024, 64), generator=generator)  # ids of the full rules
    entry, sign = entries_and_signs(idx)
    entry, sign = entry[:, 2:].flatten(0, 1), sign[:, 2:].flatten(0, 1).double()
    for of_one_length in entry.unbind(-1):
        counts = torch.bincount(of_one_length, minlength=ENTRIES).double()
        expected = counts.sum() / ENTRIES
        # Chi squared over its degrees of freedom: 1 with an error of sqrt(2 / 255) for a fair draw.
        assert float(((counts - expected) ** 2 / expected).sum() / (ENTRIES - 1)) < 1.5
    assert float(sign.mean(0).abs().max()) < 0.02  # fair
    assert abs(float(sign.prod(-1).mean())) < 0.025  # and independent of each other


# ---- What a GPU compiles ------------------------------------------------------------------------
TRACED = """
import functools
import sys

import constants  # first: it sets what torch reads
import torch

from harness import ops
from harness.attention import masked_attention

traced = set()


def compiled(function):
    # As that of harness.ops, for a CPU, without the compiler behind the tracing.
    @functools.cache
    def once():
        traced.add(function.__qualname__)
        ops.prepare_compiler()
        return torch.compile(function, dynamic=False, fullgraph=True, backend="aot_eager")

    return functools.wraps(function)(lambda *args: once()(*args))


def losses():
    import train

    torch.manual_seed(0)
    train.DEPTH = 2
    model = train.build_model(train.build_config(), masked_attention, torch.device("cpu"))
    optimizers = train.build_optimizers(model)
    for ids in torch.randint(constants.VOCAB_SIZE, (3, 2, 17)):
        batch = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
        yield float(train.train_step(model, optimizers, [batch], 1))
    with torch.no_grad():
        model.eval()(batch[0])


print(*losses())
del sys.modules["train"]
ops.compiled = compiled
print(*losses())
print(*traced)
"""


def test_what_a_gpu_compiles_can_be_traced_and_gives_what_a_cpu_computes():
    """On a CPU it is run as it stands, so nothing else there shows what the tracing refuses."""
    done = subprocess.run(
        [sys.executable, "-c", TRACED],
        cwd=Path(C.__file__).parent,
        env=os.environ | {"AUTORESEARCH_SMOKE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    plain, compiled, traced = (line.split() for line in done.stdout.splitlines())
    if not traced:
        pytest.skip("train.py compiles nothing, which it need not")
    assert [float(x) for x in compiled] == pytest.approx(
        [float(x) for x in plain], rel=1e-4
    )


# ---- On a GPU -----------------------------------------------------------------------------------
@pytest.mark.gpu
def test_a_gpu_gives_the_loss_and_the_gradients_of_a_cpu():
    exact, gpu = lively(), torch.device("cuda")
    model = train.build_model(train.build_config(), masked_attention, gpu)
    model.load_state_dict(exact.state_dict())
    x, y = some_batch(4, T)
    loss, gradients = loss_and_gradients(model, [(x.to(gpu), y.to(gpu))])
    expected, exact_gradients = loss_and_gradients(exact, [(x, y)])
    assert loss == pytest.approx(expected, rel=0.01)  # bf16 and compiled
    gradients = {name: gradient.cpu() for name, gradient in gradients.items()}
    together = [
        torch.cat([g[n].flatten() for n in g]) for g in (gradients, exact_gradients)
    ]
    assert float(torch.cosine_similarity(*together, dim=0)) > 0.95
    assert gradients.keys() == exact_gradients.keys()
    assert all(gradients[n].any() for n, g in exact_gradients.items() if g.any())
