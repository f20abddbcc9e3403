"""Laws of the model, whatever the knobs say: causality, windows, counts, how it begins."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train
from train import GPT, GPTConfig

V, T = 50, 16  # ids, tokens a row


def config(**changes) -> GPTConfig:
    values = {"sequence_len": T, "vocab_size": V, "n_layer": 3, "n_embd": 32}
    values |= {"n_head": 4, "n_kv_head": 2, "window_pattern": "SL", "short_window": 4}
    return GPTConfig(**(values | {"rope_base": 10_000, "softcap": 15.0} | changes))


def fresh(dtype=torch.float32, **changes) -> GPT:
    """A small model as training begins it."""
    torch.manual_seed(0)
    model = GPT(config(**changes), train.masked_attention, dtype)
    model.init_weights(0.7, 0.1)
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


class Spy:
    """Attention that remembers what it was given."""

    def __call__(self, q, k, v, window):
        self.q, self.k, self.v, self.window = q, k, v, window
        return train.masked_attention(q, k, v, window)


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
    loss = train.compute_loss(fresh(), idx, idx.roll(-1, 1))
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
    # Width 32, four query heads of 8, two key-value heads: keys and values are 16 wide.
    layer = 32 * 32 + 32 * 16 + 32 * 16 + 32 * 32 + 32 * 128 + 128 * 32
    gates = 2 * (32 * 2)  # value embeddings on layers 0 and 2, a gate for each key-value head
    head = 32 * 50
    tables = 50 * 32 + 2 * (50 * 16)
    scalars = 3 + 3
    model = fresh()
    assert model.num_params() == 3 * layer + gates + head + tables + scalars == 38726
    # Three times two FLOPs for a weight; scores and mix, each 2 * 32 a key, forward and backward.
    keys = 4 + 16 + 16
    assert model.flops_per_token() == 6 * (3 * layer + gates + head) + 3 * (2 * 2 * 32) * keys


def test_without_grouping_keys_are_as_wide_as_queries():
    grouped, plain = fresh(), fresh(n_kv_head=4)
    assert plain.num_params() - grouped.num_params() == 3 * 2 * 32 * 16 + 2 * 50 * 16 + 2 * 32 * 2


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
    changed = idx.clone()
    changed[0, at] = (changed[0, at] + 1) % V
    return (model(changed) - model(idx)).abs().amax(-1)[0] > 1e-4


def test_a_token_is_seen_within_the_window_and_not_beyond():
    assert moved_by(5, deaf_layer=1).nonzero().flatten().tolist() == [5, 6, 7, 8]


def test_the_last_layer_sees_everything():
    assert moved_by(0, deaf_layer=0).all()


# ---- Parts --------------------------------------------------------------------------------------
@torch.no_grad()
def test_a_block_begins_as_the_identity():
    model = fresh()
    x, table = torch.randn(2, T, 32), torch.randn(2, T, 16)
    for i, block in enumerate(model.h):
        e = table if model.config.has_value_embedding(i) else None
        assert torch.equal(block(x, e, model.cos, model.sin), x)


@pytest.mark.parametrize("n_layer", [1, 2, 5, 6])
def test_value_embeddings_are_on_every_second_layer_with_the_last(n_layer):
    has = [config(n_layer=n_layer).has_value_embedding(i) for i in range(n_layer)]
    assert has[-1] and all(a != b for a, b in zip(has, has[1:], strict=False))
    model = fresh(n_layer=n_layer)
    assert sorted(model.value_embeds) == [str(i) for i in range(n_layer) if has[i]]


@torch.no_grad()
def test_every_value_embedding_moves_the_logits():
    model, idx = lively(), some_ids()
    base = model(idx)
    for table in model.value_embeds.values():
        saved = table.weight.clone()
        table.weight.zero_()
        assert not torch.allclose(model(idx), base, atol=1e-3)
        table.weight.copy_(saved)


@torch.no_grad()
def test_a_value_gate_begins_at_one_and_stays_below_two():
    spy, x, e = Spy(), torch.randn(2, T, 32), torch.randn(2, T, 16)
    model = fresh()
    attention = model.h[-1].attn
    attention.attend = spy
    attention(x, None, model.cos, model.sin)
    without = spy.v
    attention(x, e, model.cos, model.sin)
    assert torch.allclose(spy.v - without, e.view_as(spy.v), atol=1e-6)
    attention.value_gate.weight.normal_(std=100)
    attention(x, e, model.cos, model.sin)
    gate = (spy.v - without) / e.view_as(spy.v)  # one for each key-value head and position
    assert torch.allclose(gate, gate[..., :1].expand_as(gate), atol=1e-2)
    assert gate.min() > -0.01 and gate.max() < 2.01 and gate.max() - gate.min() > 1.9


@torch.no_grad()
def test_queries_and_keys_have_norm_one_however_large_their_weights():
    spy, x = Spy(), torch.randn(2, T, 32)
    model = fresh()
    attention = model.h[0].attn
    attention.attend = spy
    for factor in (1.0, 1000.0):
        attention.c_q.weight.mul_(factor)
        attention.c_k.weight.mul_(factor)
        attention(x, torch.zeros(2, T, 16), model.cos, model.sin)
        for t, heads in ((spy.q, 4), (spy.k, 2)):
            assert t.shape == (2, T, heads, 8)
            assert torch.allclose(t.square().mean(-1), torch.ones(2, T, heads), atol=1e-3)


@torch.no_grad()
def test_rotary_scores_depend_on_the_distance_alone():
    model = fresh()
    q, k = torch.randn(2, 1, 1, 1, 8)
    q, k = (train.rotate(t.expand(1, T, 1, 8), model.cos, model.sin)[0, :, 0] for t in (q, k))
    scores = q @ k.T  # (T, T) of one query and one key at every pair of positions
    for distance in range(-T + 1, T):
        along = scores.diagonal(distance)
        assert torch.allclose(along, along[:1].expand_as(along), atol=1e-4)
    assert scores[0].std() > 0.05  # and do depend on it


@torch.no_grad()
def test_rotary_keeps_lengths_and_leaves_position_zero_alone():
    model, x = fresh(), torch.randn(2, T, 4, 8)
    y = train.rotate(x, model.cos, model.sin)
    assert torch.allclose(y.norm(dim=-1), x.norm(dim=-1), atol=1e-5)
    assert torch.equal(y[:, 0], x[:, 0]) and not torch.allclose(y[:, 1:], x[:, 1:], atol=0.1)
    assert train.rotate(x.bfloat16(), model.cos, model.sin).dtype == torch.bfloat16


@torch.no_grad()
def test_norm_gives_root_mean_square_one():
    x = 7 * torch.randn(3, 5, 32)
    assert torch.allclose(train.norm(x).square().mean(-1), torch.ones(3, 5), atol=1e-4)


# ---- Configuration ------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "changes, what",
    [
        ({"n_embd": 34}, r"N_EMBD \(34\) cannot be cut into 4 heads"),
        ({"n_head": 0}, "N_EMBD"),
        ({"n_layer": 0}, "0 layers"),
        ({"n_kv_head": 3}, "KV_GROUP does not divide the 4 heads"),
        ({"n_embd": 36}, r"HEAD_DIM \(9\) is odd"),
        ({"n_embd": 16}, r"N_EMBD \(16\)"),
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
    env = os.environ | {"PYTHONPATH": str(Path(train.__file__).parent), "HOME": str(tmp_path)}
    env |= {"AUTORESEARCH_CACHE": str(tmp_path / "cache"), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("head_dim", [98, 196, 206])
def test_rotary_angles_of_a_head_size_whose_inverse_rounds_up(head_dim):
    assert fresh(n_head=1, n_kv_head=1, n_embd=head_dim).cos.shape[-1] == head_dim // 2


def test_the_expected_batch_is_halved_until_it_fits_and_never_grows():
    sizes = [train.expected_batch(64, config(), free) for free in (10**12, 10**6, 10**5, 10**4, 0)]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] == 64 and sizes[-1] == 1
    assert train.expected_batch(6, config(), 0) == 3  # an odd number is left to the warm-up
