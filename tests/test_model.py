"""Laws of the model, whatever the knobs say: causality, windows, counts, how it begins."""

import builtins
import collections
import math
import os
import subprocess
import sys
import types
import weakref
from pathlib import Path

import pytest
import torch

import train
from train import GPT, GPTConfig, RotaryNorm

V, T = 50, 16  # ids, tokens a row
LAMBDAS = {
    "resid_lambda": (1.0, 1.0),
    "x0_lambda": (0.1, 0.1),
    "ngram_lambda": (0.1, 0.1),
}


def config(**changes) -> GPTConfig:
    values = {"sequence_len": T, "vocab_size": V, "n_layer": 3, "n_embd": 32}
    values |= {"head_dim": 8, "window_pattern": "SL", "short_window": 4}
    values |= {
        "rope_base": 10_000,
        "softcap": 15.0,
        "attention_gain": 1.3,
        "ngram_rows": 64,
    }
    return GPTConfig(**(values | changes))


def fresh(dtype=torch.float32, **changes) -> GPT:
    """A small model as training begins it."""
    torch.manual_seed(0)
    model = GPT(config(**changes), train.masked_attention, dtype)
    model.init_weights(0.7, LAMBDAS)
    return model


def lively(**changes) -> GPT:
    """A small model in which every weight matters, as if it had been trained."""
    model = fresh(**changes)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model


def some_ids(rows: int = 2) -> torch.Tensor:
    return torch.randint(V, (rows, T), generator=torch.Generator().manual_seed(1))


# ---- What it computes ---------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_float32_for_every_id_at_every_position(dtype):
    logits = fresh(dtype)(some_ids())
    assert logits.shape == (2, T, V) and logits.dtype == torch.float32


@torch.no_grad()
def test_what_comes_later_moves_nothing_before_it():
    model, idx = lively(), some_ids()
    base = model(idx)
    for cut in range(1, T):
        changed = idx.clone()
        changed[0, cut:] = (changed[0, cut:] + 1) % V
        logits = model(changed)
        assert torch.allclose(logits[0, :cut], base[0, :cut], atol=1e-5)
        assert torch.equal(logits[1], base[1])  # nor in another row
        assert not torch.allclose(logits[0, cut:], base[0, cut:], atol=1e-2)


@torch.no_grad()
def test_a_short_row_is_the_beginning_of_a_long_one():
    model, idx = lively(), some_ids()
    assert torch.allclose(model(idx[:, :5]), model(idx)[:, :5], atol=1e-5)


@torch.no_grad()
def test_the_loss_of_an_untrained_model_is_that_of_a_guess():
    idx = some_ids(32)
    loss = fresh().loss(idx, idx.roll(-1, 1))
    assert float(loss) == pytest.approx(math.log(V), rel=0.02)


@torch.no_grad()
def test_logits_stay_within_the_soft_cap():
    model, idx = lively(softcap=3.0), some_ids()
    model.lm_head.weight.mul_(100)
    logits = model(idx)
    assert 2.9 < logits.abs().max() <= 3.0


def test_the_same_seed_draws_the_same_weights():
    first, second = fresh().state_dict(), fresh().state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


# ---- Counts -------------------------------------------------------------------------------------
def test_parameters_and_flops_by_hand():
    # Width 32, four heads of 8.
    layer = 4 * 32 * 32 + 32 * 128 + 128 * 32
    # A gate for each head on attention, and on the value embeddings of layers 0 and 2; two a layer
    # on the n-grams, of bigrams and of trigrams, whose rows are half as wide as the model.
    gates = 3 * (32 * 4) + 2 * (32 * 4) + 3 * (32 * 2)
    head = 32 * 50
    tables = 50 * 32 + 2 * (50 * 32) + 64 * 16
    scalars = 3 + 3 + 3
    model = fresh()
    assert model.num_params() == 3 * layer + gates + head + tables + scalars == 45129
    # Three times two FLOPs for a weight; scores and mix, each 2 * 32 a key, forward and backward.
    keys = 4 + 16 + 16
    assert (
        model.flops_per_token()
        == 6 * (3 * layer + gates + head) + 3 * (2 * 2 * 32) * keys
    )


# ---- Windows ------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "pattern, n_layer, expected",
    [
        ("SL", 3, [4, 16, 16]),
        ("S", 4, [4, 4, 4, 16]),
        ("SSL", 5, [4, 4, 16, 4, 16]),
        ("S", 1, [16]),
    ],
)
def test_windows_repeat_the_pattern_and_end_with_a_full_one(pattern, n_layer, expected):
    assert config(window_pattern=pattern, n_layer=n_layer).windows == expected


@torch.no_grad()
def moved_by(at: int, deaf_layer: int) -> torch.Tensor:
    """Return which positions' logits move, (T,), when the id at one of them changes.

    Of two layers, with windows of 4 and all, only the one that is not deaf looks at others.
    """
    model, idx = lively(n_layer=2, window_pattern="S"), some_ids(1)
    model.h[deaf_layer].attn.c_proj.weight.zero_()
    model.ngram.weight.zero_()  # which would show the id to the next two positions as well
    changed = idx.clone()
    changed[0, at] = (changed[0, at] + 1) % V
    return (model(changed) - model(idx)).abs().amax(-1)[0] > 1e-4


def test_a_token_is_seen_within_the_window_and_not_beyond():
    # Itself and three after it see the token, and one more the key after it, which is half its.
    assert moved_by(5, deaf_layer=1).nonzero().flatten().tolist() == [5, 6, 7, 8, 9]


def test_the_last_layer_sees_everything():
    assert moved_by(0, deaf_layer=0).all()


# ---- Parts --------------------------------------------------------------------------------------
@torch.no_grad()
def test_a_block_begins_as_the_identity():
    model, x = fresh(), torch.randn(2, T, 32)
    x0, ngram = torch.zeros(2, T, 32), torch.zeros(2, T, 2, 16)
    for block in model.h:
        assert torch.equal(block(x, x0, ngram, some_ids(), model.cos, model.sin), x)


@torch.no_grad()
def test_a_layer_mixes_the_stream_and_both_embeddings_by_its_scalars():
    model, (x, x0, ngram) = fresh(), torch.randn(3, 2, T, 32)
    for i, block in enumerate(model.h):
        block.resid_lambda.fill_(0.5 + i)
        block.x0_lambda.fill_(-2.0)
        block.ngram_lambda.fill_(3.0)
        y = block(x, x0, ngram.view(2, T, 2, 16), some_ids(), model.cos, model.sin)
        assert torch.allclose(y, (0.5 + i) * x - 2 * x0 + 3 * ngram, atol=1e-5)


@torch.no_grad()
def test_a_layer_gates_bigrams_and_trigrams_by_the_first_channels_of_its_stream():
    model, (x, x0) = fresh(n_embd=64, head_dim=16), torch.randn(2, 2, T, 64)
    block, ngram = model.h[1], torch.randn(2, T, 2, 32)
    block.ngram_lambda.fill_(1.0)
    block.resid_lambda.fill_(0.7)
    block.ngram_gate.weight.normal_()

    def part(stream):  # of the n-grams in what the layer writes
        inputs = some_ids(), model.cos, model.sin
        return block(stream, x0, ngram, *inputs) - block(stream, x0, 0 * ngram, *inputs)

    first = x[..., :32] / x[..., :32].square().mean(-1, keepdim=True).sqrt()
    gate = 2 / (1 + (-first @ block.ngram_gate.weight.T).exp())
    assert gate.min() < 0.1 and gate.max() > 1.9
    bigram, trigram = gate[..., :1] * ngram[:, :, 0], gate[..., 1:] * ngram[:, :, 1]
    expected = torch.cat([bigram, trigram], -1)  # each in its half of the stream
    assert torch.allclose(part(x), expected, atol=1e-4)
    x[..., 32:] += torch.randn(2, T, 32)
    assert torch.allclose(part(x), expected, atol=1e-4)


def test_scalars_begin_in_a_straight_line_from_the_first_layer_to_the_last():
    model = fresh()
    model.init_weights(0.7, LAMBDAS | {"x0_lambda": (0.5, -0.5)})
    assert [float(block.x0_lambda.detach()) for block in model.h] == [0.5, 0.0, -0.5]
    assert all(float(block.resid_lambda.detach()) == 1.0 for block in model.h)


@torch.no_grad()
def test_ngram_embeddings_are_a_row_of_the_last_two_ids_and_one_of_the_last_three():
    model, idx = lively(ngram_rows=2**20), some_ids()
    rows = []
    model.ngram.register_forward_pre_hook(lambda module, args: rows.append(args[0]))
    idx[1, 3:6] = idx[0, 8:11]  # the same three elsewhere
    ngram = model.embed(idx)[1]
    assert torch.equal(ngram[1, 5], ngram[0, 10])
    sizes = (ngram / model.ngram.weight[rows[0]]).unique()
    assert torch.equal(sizes, torch.tensor([-1.0, 1.0]))  # nothing but signs
    changed = idx.clone()
    changed[0, 5] = (changed[0, 5] + 1) % V
    moved = (model.embed(changed)[1] != ngram).any(-1)
    two, three = (moved[..., i].nonzero().tolist() for i in range(2))
    assert two == [[0, 5], [0, 6]] and three == [[0, 5], [0, 6], [0, 7]]
    assert torch.equal(rows[0] != rows[1], moved)
    assert torch.equal(
        model.embed(idx[:, :1])[1], ngram[:, :1]
    )  # a row may be as short as that


@torch.no_grad()
def test_ngrams_spread_evenly_over_rows_and_signs():
    model, rows = fresh(ngram_rows=256, vocab_size=8192), []
    model.ngram.weight.fill_(1.0)
    model.ngram.register_forward_pre_hook(lambda module, args: rows.append(args[0]))
    embedded = [model.embed(torch.randint(8192, (64, T)))[1] for _ in range(64)]
    for of_one_length in torch.cat(rows).unbind(-1):
        counts = torch.bincount(of_one_length.flatten(), minlength=256).double()
        expected = counts.sum() / 256
        # Chi squared over its degrees of freedom: 1 with an error of sqrt(2 / 255) for a fair draw.
        assert float(((counts - expected) ** 2 / expected).sum() / 255) < 1.5
    signs = torch.cat(embedded)[:, 2:, :, 0].flatten(0, 1)
    assert float(signs.mean(0).abs().max()) < 0.015  # fair
    assert abs(float(signs.prod(-1).mean())) < 0.025  # and independent of each other


@torch.no_grad()
def test_half_of_a_key_is_of_the_token_before_and_nothing_else_of_the_layer():
    model, x, idx = fresh(), torch.randn(2, T, 32), some_ids()
    attention = model.h[0].attn
    changed = x.clone()
    changed[0, 5] = torch.randn(32)
    parts = zip(
        attention.project(x, idx, model.cos, model.sin),
        attention.project(changed, idx, model.cos, model.sin),
        strict=True,
    )
    q, k, v, gate = (
        (a != b).flatten(2).any(-1)[0].nonzero().flatten().tolist() for a, b in parts
    )
    assert q == v == [5] and set(gate) <= {5} and k == [5, 6]
    # Before rotation and norm: of a head's 8 dimensions those of the slower two of four angles.
    keys = attention.c_k(x).view(2, T, 4, 8)
    mixed = keys.clone()
    for d in (2, 3, 6, 7):
        mixed[:, 1:, :, d], mixed[:, 0, :, d] = keys[:, :-1, :, d], 0.0
    got = attention.project(x, idx, model.cos, model.sin)[1]
    assert torch.allclose(got, RotaryNorm.apply(mixed, model.cos, model.sin), atol=1e-5)


@torch.no_grad()
def test_a_gate_scales_what_a_head_of_attention_adds():
    model, idx, x = fresh(), some_ids(), torch.randn(2, T, 32)
    attention = model.h[1].attn
    assert torch.equal(
        attention.project(x, idx, model.cos, model.sin)[3], torch.ones(2, T, 4)
    )
    attention.gate.weight.normal_(std=100)
    gate = attention.project(x, idx, model.cos, model.sin)[3]
    assert gate.min() < 0.1 and 1.9 < gate.max() <= 2.0
    block, y = model.h[1], torch.randn(2, T, 4, 8)
    block.mlp.c_proj.weight.zero_()
    block.attn.c_proj.weight.copy_(torch.eye(32))
    assert torch.allclose(
        block.after(x, y, gate), x + (y * gate[..., None]).flatten(2), atol=1e-5
    )


@pytest.mark.parametrize("n_layer", [1, 2, 5, 6])
def test_value_embeddings_are_on_every_second_layer_with_the_last(n_layer):
    has = [block.attn.value_embed is not None for block in fresh(n_layer=n_layer).h]
    assert has[-1] and all(a != b for a, b in zip(has, has[1:], strict=False))


@torch.no_grad()
def test_every_value_embedding_moves_the_logits():
    model, idx = lively(), some_ids()
    base = model(idx)
    for block in model.h:
        if (table := block.attn.value_embed) is not None:
            saved = table.weight.clone()
            table.weight.zero_()
            assert not torch.allclose(model(idx), base, atol=1e-3)
            table.weight.copy_(saved)


@torch.no_grad()
def test_a_value_gate_begins_at_one_and_stays_below_two():
    model, idx, x = fresh(), some_ids(), torch.randn(2, T, 32)
    attention = model.h[-1].attn
    attention.value_embed.weight.sign_()  # nothing near zero to divide by
    e = attention.value_embed(idx).view(2, T, 4, 8)
    without = attention.c_v(x).view(2, T, 4, 8)

    def gate():
        return (attention.project(x, idx, model.cos, model.sin)[2] - without) / e

    assert torch.allclose(gate(), torch.ones(2, T, 4, 8), atol=1e-4)
    attention.value_gate.weight.normal_(std=100)
    moved = gate()  # one for each head and position
    assert torch.allclose(moved, moved[..., :1].expand_as(moved), atol=1e-2)
    assert moved.min() > -0.01 and moved.max() < 2.01 and moved.max() - moved.min() > 1.9


@torch.no_grad()
def test_queries_and_keys_have_norm_one_however_large_their_weights():
    model, x = fresh(), torch.randn(2, T, 32)
    attention = model.h[0].attn
    for factor in (1.0, 1000.0):
        attention.c_q.weight.mul_(factor)
        attention.c_k.weight.mul_(factor)
        q, k, v, _ = attention.project(x, some_ids(), model.cos, model.sin)
        assert q.shape == k.shape == v.shape == (2, T, 4, 8)
        for t in (q, k):
            assert torch.allclose(t.square().mean(-1), torch.ones(2, T, 4), atol=1e-3)


@torch.no_grad()
def test_rotary_scores_depend_on_the_distance_alone():
    model = fresh()
    q, k = torch.randn(2, 1, 1, 1, 8)
    pair = (t.expand(1, T, 1, 8) for t in (q, k))
    q, k = (RotaryNorm.apply(t, model.cos, model.sin)[0, :, 0] for t in pair)
    scores = q @ k.T  # (T, T) of one query and one key at every pair of positions
    for distance in range(-T + 1, T):
        along = scores.diagonal(distance)
        assert torch.allclose(along, along[:1].expand_as(along), atol=1e-4)
    assert scores[0].std() > 0.05  # and do depend on it


@torch.no_grad()
def test_rotary_leaves_position_zero_alone_and_keeps_the_dtype():
    model, x = fresh(), torch.randn(2, T, 4, 8)
    y = RotaryNorm.apply(x, model.cos, model.sin)
    assert torch.allclose(y[:, 0], train.norm(x)[:, 0], atol=1e-6)
    assert not torch.allclose(y[:, 1:], train.norm(x)[:, 1:], atol=0.1)
    assert RotaryNorm.apply(x.bfloat16(), model.cos, model.sin).dtype == torch.bfloat16


def rotated_by_complex_numbers(x: torch.Tensor, base: float) -> torch.Tensor:
    """Return the rotary embedding of x (B, T, H, D), of a half each for real and imaginary part."""
    half = x.size(-1) // 2
    frequency = base ** -(torch.arange(half, dtype=torch.float64) / half)
    angle = torch.arange(x.size(1))[:, None, None] * frequency
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(
        torch.ones_like(angle), -angle
    )
    return torch.cat([turned.real, turned.imag], -1)


def test_rotary_norm_and_its_gradient_are_those_of_complex_numbers_and_autograd():
    model, x = fresh(), torch.randn(2, T, 4, 8, requires_grad=True)
    exact, weights = x.detach().double().requires_grad_(), torch.randn(2, T, 4, 8)
    y = RotaryNorm.apply(x, model.cos, model.sin)
    expected = rotated_by_complex_numbers(train.norm(exact), 10_000)
    assert torch.allclose(y.double(), expected, atol=1e-5)
    (y * weights).sum().backward()
    (expected * weights).sum().backward()
    assert torch.allclose(x.grad.double(), exact.grad, atol=1e-5)


@pytest.mark.parametrize("softcap", [1.0, 15.0, 60.0])
def test_loss_and_gradient_are_those_of_torchs_cross_entropy_of_a_tanh(softcap):
    model, idx = lively(softcap=softcap), some_ids()
    targets = idx.roll(-1, 1)
    with torch.no_grad():
        model.lm_head.weight.mul_(30)  # well into the cap
    loss = model.loss(idx, targets)
    loss.backward()
    got = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    raw = model.lm_head(train.norm(model.trunk(idx))).double()
    capped = softcap * torch.tanh(raw / softcap)
    expected = torch.nn.functional.cross_entropy(capped.flatten(0, 1), targets.flatten())
    expected.backward()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    assert torch.allclose(model(idx).double(), capped, atol=1e-4 * softcap)
    for name, p in model.named_parameters():
        assert torch.allclose(got[name], p.grad, rtol=1e-3, atol=1e-5), name


def test_evaluation_gives_the_logits_of_training_and_keeps_no_graph():
    model, idx = lively(), some_ids()
    logits = model(idx)
    with torch.no_grad():
        evaluated = model(idx)
    assert logits.requires_grad and not evaluated.requires_grad
    assert torch.equal(logits, evaluated)


@torch.no_grad()
def test_evaluation_lets_the_activations_go_before_the_logits_are_made(monkeypatch):
    model, idx, alive = lively(), some_ids(), []
    trunk, head = model.trunk, model.head

    def watched_trunk(idx):
        x = trunk(idx)
        alive.append(weakref.ref(x))  # its graph holds the activations
        return x

    def watched_head(x):
        alive.append(alive[0]() is not None)
        return head(x)

    monkeypatch.setattr(model, "trunk", watched_trunk)
    monkeypatch.setattr(model, "head", watched_head)
    model(idx)
    assert alive[1] is False


def test_all_layers_share_the_graphs_they_are_compiled_to(monkeypatch):
    names, compile = [], torch.compile

    def counted(function, **options):
        def backend(graph, inputs):
            names.append(function.__name__)
            return graph.forward

        return compile(function, backend=backend, **options)

    # As on a GPU: every function is compiled, here to what it was before.
    source = Path(train.__file__).read_text("utf-8")
    source = source.replace(
        "(fused if args[1].is_cuda else function)(*args)", "fused(*args)"
    )
    module = types.ModuleType("train_compiled")
    monkeypatch.setattr(torch, "compile", counted)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(builtins.compile(source, train.__file__, "exec"), module.__dict__)
    torch._dynamo.reset()
    parts = config(n_layer=7, n_embd=64, head_dim=16, window_pattern="SSL")
    model = module.GPT(
        module.GPTConfig(**vars(parts)), train.masked_attention, torch.float32
    )
    model.init_weights(0.7, LAMBDAS)
    optimizers, idx = module.build_optimizers(model), some_ids()
    for progress in (0.0, 0.3, 0.6):
        module.set_schedules(optimizers, progress)
        module.train_step(model, optimizers, [(idx, idx)] * 2, 2)
    with torch.no_grad():
        model(idx)
    # A layer has a value embedding or not; Muon has square, long and two kinds of gate matrices.
    expected = {"embed": 1, "before": 2, "after": 1, "cross_entropy": 1, "logits": 1}
    assert collections.Counter(names) == expected | {"muon_update": 4, "row_update": 1}


@torch.no_grad()
def test_norm_gives_root_mean_square_one():
    x = 7 * torch.randn(3, 5, 32)
    assert torch.allclose(train.norm(x).square().mean(-1), torch.ones(3, 5), atol=1e-4)


# ---- Configuration ------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "changes, what",
    [
        ({"n_layer": 0}, r"DEPTH \(0\)"),
        ({"n_embd": 36}, r"HEAD_DIM \(8\) is odd or does not divide 36"),
        ({"head_dim": 0}, r"HEAD_DIM \(0\)"),
        ({"n_embd": 36, "head_dim": 9}, r"HEAD_DIM \(9\) is odd"),
        ({"n_embd": 16}, r"N_EMBD \(16\) is below 32"),
        ({"window_pattern": ""}, r"WINDOW_PATTERN \(''\)"),
        ({"window_pattern": "SXL"}, r"WINDOW_PATTERN \('SXL'\) is not made of S and L"),
        ({"short_window": 0}, r"SHORT_WINDOW \(0\) is not 1 to 16"),
        ({"short_window": 17}, r"SHORT_WINDOW \(17\)"),
    ],
)
def test_a_configuration_that_cannot_work_names_the_knob(changes, what):
    with pytest.raises(ValueError, match=what):
        config(**changes)


def test_importing_train_prints_nothing_writes_nothing_and_leaves_the_gpu_alone(tmp_path):
    code = "import train, torch; assert not torch.cuda.is_initialized()"
    env = os.environ | {
        "PYTHONPATH": str(Path(train.__file__).parent),
        "HOME": str(tmp_path),
    }
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


@pytest.mark.parametrize("head_dim", [98, 196, 206])
def test_rotary_angles_of_a_head_size_whose_inverse_rounds_up(head_dim):
    assert fresh(head_dim=head_dim, n_embd=head_dim).cos.shape == (T, 1, head_dim)


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
def test_a_knob_that_cannot_work_is_named(prepared_copy, monkeypatch, knobs, what):
    for name, value in knobs.items():
        monkeypatch.setattr(train, name, value)
    with pytest.raises(SystemExit, match=f"^train.py: .*{what}"):
        train.main()
