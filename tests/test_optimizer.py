"""The optimizer against torch's AdamW, an SVD and Muon written out one matrix at a time."""

import itertools
import types

import pytest
import torch

import train
from train import GPT, GPTConfig, MuonAdamW

V, T = 50, 16


def tiny_model() -> GPT:
    torch.manual_seed(0)
    config = GPTConfig(T, V, 2, 2, 1, 32, "SL", 4, 10_000, 15.0)
    model = GPT(config, train.masked_attention, torch.float32)
    model.init_weights(0.7, 0.1)
    return model


def tiny_batch(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(V, (rows, T + 1), generator=torch.Generator().manual_seed(3))
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def muon_group(params, **changes) -> dict:
    group = {"kind": "muon", "params": params, "lr": 0.1, "momentum": 0.9, "beta2": 0.9}
    return group | {"weight_decay": 0.0} | changes


def adamw_group(params, **changes) -> dict:
    group = {"kind": "adamw", "params": params, "lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8}
    return group | {"weight_decay": 0.0} | changes


def random_params(*shapes: tuple[int, ...]) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


# ---- AdamW --------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "changes",
    [
        {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.0},
        {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-10, "weight_decay": 0.3},
        {"lr": 0.5, "betas": (0.0, 0.5), "eps": 0.1, "weight_decay": 0.01},
    ],
)
def test_adamw_is_torchs(changes):
    ours, theirs = random_params((5, 7), (3,), ()), random_params((5, 7), (3,), ())
    optimizers = MuonAdamW([adamw_group(ours, **changes)]), torch.optim.AdamW(theirs, **changes)
    generator = torch.Generator().manual_seed(1)
    for step in range(12):
        if step == 6:  # rates move during a run
            optimizers[0].param_groups[0]["lr"] = optimizers[1].param_groups[0]["lr"] = 0.02
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn(p.shape, generator=generator)
            q.grad = p.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
        for p, q in zip(ours, theirs, strict=True):
            assert torch.allclose(p, q, rtol=1e-4, atol=1e-6)


# ---- The polar factor ---------------------------------------------------------------------------
def conditioned(shape: tuple[int, int], smallest: float) -> torch.Tensor:
    """Return a matrix whose singular values fall from 1 to `smallest`, on a logarithmic scale."""
    U, _, Vh = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    return U @ torch.diag(torch.logspace(0, torch.log10(torch.tensor(smallest)), min(shape))) @ Vh


@pytest.mark.parametrize("shape", [(48, 48), (96, 32), (32, 96), (256, 16)])
@pytest.mark.parametrize("smallest", [None, 0.3, 0.03])
def test_the_polar_factor_is_that_of_an_svd(shape, smallest):
    torch.manual_seed(0)
    G = torch.randn(shape) if smallest is None else conditioned(shape, smallest)
    U, S, Vh = torch.linalg.svd(G, full_matrices=False)
    got = train.polar_express(17 * G[None])[0].float()
    values = torch.linalg.svdvals(got)
    well = S > 0.02 * S.norm()  # five steps lift what is not lost in the norm of the matrix
    assert well.sum() > len(S) / 2 and values.max() < 1.3
    assert torch.linalg.svdvals(U[:, well].T @ got @ Vh[well].T).min() > 0.7
    agreement = torch.diagonal(U[:, well].T @ got @ Vh[well].T)
    assert agreement.min() > 0.7 and agreement.max() < 1.3
    if well.all():
        assert (got - U @ Vh).norm() / len(S) ** 0.5 < 0.2


def test_a_stack_is_orthogonalised_one_matrix_at_a_time():
    G = torch.randn(3, 40, 24, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [1e-3, 1.0, 1e3]
    ).view(3, 1, 1)
    together = train.polar_express(G).float()
    for one, among in zip(G, together, strict=True):
        assert torch.allclose(train.polar_express(one[None])[0].float(), among, atol=0.02)


# ---- Muon ---------------------------------------------------------------------------------------
def exact_polar(G: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Return the polar factor of each matrix, without the rounding of bf16."""
    U, _, Vh = torch.linalg.svd(G, full_matrices=False)
    return U @ Vh


def slow_muon(p, grad, state, momentum, beta2, lr, decay):
    """Return p after one step, a row or column at a time; state: {} at first, moved on."""
    rows, columns = p.shape
    buffer = momentum * state.get("buffer", 0.0) + (1 - momentum) * grad
    nesterov = momentum * buffer + (1 - momentum) * grad
    polar = exact_polar(nesterov)
    units = polar if rows >= columns else polar.T  # a moment for each of the longer side
    seconds, scaled = state.get("seconds", [0.0] * len(units)), []
    for i, unit in enumerate(units):
        seconds[i] = beta2 * seconds[i] + (1 - beta2) * float((unit**2).mean())
        scaled.append(unit / seconds[i] ** 0.5)
    scaled = torch.stack(scaled) if rows >= columns else torch.stack(scaled).T
    scaled = scaled * polar.norm() / scaled.norm()
    lr = lr * max(1.0, rows / columns) ** 0.5
    new = p.clone()
    for i, j in itertools.product(range(rows), range(columns)):
        new[i, j] -= lr * scaled[i, j]
        if scaled[i, j] * p[i, j] > 0:
            new[i, j] -= lr * decay * p[i, j]
    state |= {"buffer": buffer, "seconds": seconds}
    return new


@torch.no_grad()
@pytest.mark.parametrize("shape", [(12, 12), (24, 8), (8, 24)])
def test_muon_is_the_slow_loop_over_single_matrices(monkeypatch, shape):
    monkeypatch.setattr(train, "polar_express", exact_polar)
    params = random_params(shape, shape, shape)
    expected, states = [p.clone() for p in params], [{} for _ in params]
    optimizer = MuonAdamW([muon_group(params)])
    generator = torch.Generator().manual_seed(1)
    for momentum, lr, decay in ((0.0, 0.1, 0.0), (0.9, 0.05, 0.5), (0.95, 0.2, 1.0)):
        optimizer.param_groups[0] |= {"momentum": momentum, "lr": lr, "weight_decay": decay}
        for i, p in enumerate(params):
            p.grad = 10.0**-i * torch.randn(shape, generator=generator)
            args = (expected[i], p.grad, states[i], momentum, 0.9, lr, decay)
            expected[i] = slow_muon(*args)
        optimizer.step()
        for p, slow in zip(params, expected, strict=True):
            assert torch.allclose(p, slow, atol=1e-4)


def muon_change(p, grad, decay: float = 0.0, lr: float = 1.0) -> torch.Tensor:
    """Return what the first step with `grad` takes from p, a (1, rows, columns) stack."""
    buffers = torch.zeros_like(p), torch.zeros_like(p[..., :1])
    if p.size(-2) < p.size(-1):
        buffers = torch.zeros_like(p), torch.zeros_like(p[..., :1, :])
    numbers = map(torch.tensor, (0.0, 0.9, lr, decay))
    return p - train.muon_update(grad, p, *buffers, *numbers)


@torch.no_grad()
def test_variance_reduction_equalises_the_longer_sides_norms_and_keeps_the_total():
    torch.manual_seed(0)
    for shape in ((96, 32), (32, 96)):
        grad = torch.randn(1, *shape) * torch.logspace(-1, 1, shape[0])[:, None]
        update = muon_change(torch.zeros(1, *shape), grad)[0]
        plain = train.polar_express(grad)[0].float()
        dim = 1 if shape[0] >= shape[1] else 0
        before, after = plain.norm(dim=dim), update.norm(dim=dim)
        assert before.std() > 0.05 * before.mean() and after.std() < 0.01 * after.mean()
        tall = max(1.0, shape[0] / shape[1]) ** 0.5
        assert float(update.norm()) == pytest.approx(float(plain.norm()) * tall, rel=0.01)


@torch.no_grad()
def test_decay_is_cautious_only_where_it_agrees_with_the_update():
    torch.manual_seed(0)
    p, grad = torch.randn(1, 16, 16), torch.randn(1, 16, 16)
    update = muon_change(p, grad)
    decay = muon_change(p, grad, decay=0.5) - update
    agrees = update * p > 0
    assert 0.2 < agrees.float().mean() < 0.8
    assert torch.allclose(decay[agrees], 0.5 * p[agrees], atol=1e-5)
    assert decay[~agrees].abs().max() < 1e-5


@torch.no_grad()
def test_momentum_is_nesterovs(monkeypatch):
    seen = []

    def polar_express(G):
        seen.append(G.clone())
        return torch.ones_like(G)

    monkeypatch.setattr(train, "polar_express", polar_express)
    (p,) = random_params((4, 4))
    optimizer, buffer = MuonAdamW([muon_group([p], momentum=0.75)]), torch.zeros(4, 4)
    for _ in range(4):
        p.grad = torch.randn(4, 4)
        optimizer.step()
        buffer = 0.75 * buffer + 0.25 * p.grad
        assert torch.allclose(seen[-1][0], 0.75 * buffer + 0.25 * p.grad, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("shape", [(8, 8), (16, 4), (4, 16)])
def test_a_gradient_of_zero_moves_nothing_and_poisons_nothing(shape):
    (p,) = random_params(shape)
    before, optimizer = p.clone(), MuonAdamW([muon_group([p])])
    p.grad = torch.zeros(shape)
    optimizer.step()
    assert torch.equal(p, before)
    p.grad = torch.randn(shape)
    optimizer.step()
    assert p.isfinite().all() and not torch.equal(p, before)


@torch.no_grad()
def test_the_size_of_a_gradient_does_not_matter_to_muon():
    torch.manual_seed(0)
    p, grad = torch.zeros(1, 16, 8), torch.randn(1, 16, 8)
    reference = muon_change(p, grad)
    for factor in (2.0**-10, 2.0**10):
        assert torch.allclose(muon_change(p, factor * grad), reference, atol=0.02)


# ---- Groups -------------------------------------------------------------------------------------
def test_an_unknown_kind_is_refused_never_skipped():
    with pytest.raises(ValueError, match="unknown kind 'sgd'"):
        MuonAdamW([adamw_group(random_params((3,))) | {"kind": "sgd"}])


def test_a_muon_group_of_mixed_shapes_is_refused():
    with pytest.raises(ValueError, match="one shape"):
        MuonAdamW([muon_group(random_params((4, 8), (8, 4)))])


def test_every_parameter_is_in_exactly_one_group():
    model = tiny_model()
    groups = train.build_optimizer(model, compile=False).param_groups
    grouped = [id(p) for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())
    assert len(grouped) == len(set(grouped))
    for group in groups:
        if group["kind"] == "muon":
            assert all(p.ndim == 2 for p in group["params"])


# ---- Steps --------------------------------------------------------------------------------------
def test_training_lowers_the_loss():
    model, (x, y) = tiny_model(), tiny_batch(4)
    optimizer, losses = train.build_optimizer(model, compile=False), []
    for _ in range(50):
        train.set_schedules(optimizer, 0.5)
        loss = train.train_step(model, optimizer, train.compute_loss, [(x, y)], 1)
        losses.append(float(loss))
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("count", [2, 4])
def test_micro_steps_add_up_to_the_step(count):
    x, y = tiny_batch(8)
    results = []
    for n in (1, count):
        model = tiny_model()
        # A plain gradient step, so that the change is the gradient.
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        parts = list(zip(x.chunk(n), y.chunk(n), strict=True))
        loss = train.train_step(model, optimizer, train.compute_loss, iter(parts), n)
        results.append((loss, [p.detach() for p in model.parameters()]))
        assert all(p.grad is None for p in model.parameters())
    (whole_loss, whole), (loss, parts) = results
    assert loss.ndim == 0 and not loss.requires_grad
    assert float(loss) == pytest.approx(float(whole_loss), rel=1e-5)
    for a, b in zip(whole, parts, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)


# ---- Warm-up ------------------------------------------------------------------------------------
def snapshot(model, optimizer) -> list[torch.Tensor]:
    states = [t for state in optimizer.state.values() for t in state.values()]
    return [t.detach().clone() for t in [*model.parameters(), *states]]


@pytest.fixture
def trained():
    """A model and its optimizer after two steps, so that no state is zero."""
    model = tiny_model()
    optimizer = train.build_optimizer(model, compile=False)
    for _ in range(2):
        train.set_schedules(optimizer, 0.5)
        train.train_step(model, optimizer, train.compute_loss, [tiny_batch(4)], 1)
    return model, optimizer


def test_warm_up_puts_weights_and_state_back_bit_for_bit(trained):
    model, optimizer = trained
    before, moved = snapshot(model, optimizer), []

    def loss_of(model, x, y):
        moved.append(not torch.equal(model.wte.weight, before[0]))
        return train.compute_loss(model, x, y)

    run = types.SimpleNamespace(random_batch=tiny_batch)
    rates = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    train.warm_up(run, model, optimizer, loss_of, model, 2)
    assert moved[-1]  # it did train in between
    after = snapshot(model, optimizer)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(p.grad is None for p in model.parameters())
    assert rates == [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]


@pytest.mark.parametrize("fails_at", [1, 2, 3, 4])
def test_a_warm_up_that_fails_half_way_leaves_nothing_behind(trained, fails_at):
    model, optimizer = trained
    before, calls = snapshot(model, optimizer), itertools.count(1)

    def loss_of(model, x, y):
        if next(calls) == fails_at:
            raise torch.OutOfMemoryError("does not fit")
        return train.compute_loss(model, x, y)

    run = types.SimpleNamespace(random_batch=tiny_batch)
    with pytest.raises(torch.OutOfMemoryError):
        train.warm_up(run, model, optimizer, loss_of, model, 2)
    assert next(calls) == fails_at + 1
    after = snapshot(model, optimizer)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(p.grad is None for p in model.parameters())


def test_an_unused_parameter_is_named_not_a_type_error_from_torch():
    used, unused = random_params((4, 4), (4, 4))
    used.grad = torch.ones(4, 4)
    with pytest.raises(RuntimeError, match=r"no gradient for parameters of shape \[\(4, 4\)\]"):
        MuonAdamW([muon_group([used, unused])]).step()


def test_a_batch_that_does_not_fit_leaves_nothing_behind_and_an_odd_one_ends_the_run(trained):
    model, optimizer = trained
    run = types.SimpleNamespace(random_batch=tiny_batch)

    def too_much(*_):
        raise torch.OutOfMemoryError("no room")

    before = snapshot(model, optimizer)
    parts = (run, model, optimizer)
    assert not train.fits(*parts, too_much, model, 2)
    assert all(map(torch.equal, snapshot(model, optimizer), before))
    assert train.fits(*parts, train.compute_loss, model, 2)
    with pytest.raises(torch.OutOfMemoryError):
        train.fits(*parts, too_much, model, 1)
