"""The optimizers against torch's AdamW, loops, an SVD and Muon written out one matrix at a time."""

import itertools
import types

import pytest
import torch
from tiny import tiny_batch, tiny_model

import train
from train import Muon


def muon_group(params, **changes) -> dict:
    group = {
        "params": params,
        "lr": 0.1,
        "momentum": 0.9,
        "beta2": 0.9,
        "weight_decay": 0.0,
    }
    return group | changes


def random_params(*shapes: tuple[int, ...]) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes
    ]


# ---- Rates and decays ---------------------------------------------------------------------------
@torch.no_grad()
def test_every_table_and_scalar_moves_with_its_own_rate_and_decay(monkeypatch):
    monkeypatch.setattr(train, "EMBEDDING_LR", 0.4)
    monkeypatch.setattr(train, "UNEMBEDDING_LR", 0.02)
    monkeypatch.setattr(train, "RESID_LAMBDA_LR", 0.003)
    monkeypatch.setattr(train, "X0_LAMBDA_LR", 0.3)
    monkeypatch.setattr(train, "NGRAM_LAMBDA_LR", 0.06)
    monkeypatch.setattr(train, "NGRAM_LR", 0.5)
    monkeypatch.setattr(train, "NGRAM_BETA2", 0.9)
    monkeypatch.setattr(train, "NGRAM_WEIGHT_DECAY", 0.4)
    monkeypatch.setattr(train, "WTE_WEIGHT_DECAY", 0.1)
    monkeypatch.setattr(train, "VALUE_EMBED_WEIGHT_DECAY", 0.2)
    monkeypatch.setattr(train, "LM_HEAD_WEIGHT_DECAY", 0.3)
    model, by_width = tiny_model(), (32 / 768) ** -0.5
    expected = {  # part of the name: rate, decay
        "wte": (0.4 * by_width, 0.1),
        "value_embed": (0.4 * by_width, 0.2),
        "lm_head": (0.02 * by_width, 0.3),
        "resid_lambda": (0.003, 0.0),
        "x0_lambda": (0.3, 0.0),
        "ngram_lambda": (0.06, 0.0),
        "ngram.": (0.5 * by_width, 0.4),
    }
    adamw, rows, _ = train.build_optimizers(model)
    model.ngram.weight.normal_()  # begins at zero, where no decay shows
    before = {name: p.clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.randn(p.shape)
    adamw.step()
    rows.step()
    for name, p in model.named_parameters():
        rates = [rate for part, rate in expected.items() if part in name]
        if not rates:  # a matrix: Muon's
            assert torch.equal(p, before[name])
            continue
        (lr, decay), old = rates[0], before[name]
        # Of the first step both moments are the gradient's own: it moves by the rate.
        update = p.grad.sign()
        if name == "ngram.weight":  # its second moment is the row's, and begins at zero
            update = p.grad / (0.1 * p.grad.square().mean(1, keepdim=True)).sqrt()
        slow = old * (1 - lr * decay) - lr * update
        assert torch.allclose(p, slow, rtol=1e-4, atol=1e-5), name


# ---- RowRMSprop ---------------------------------------------------------------------------------
def test_rows_move_as_in_the_slow_loop_over_rows():
    (p,), beta2 = random_params((6, 5)), 0.9
    slow, moments = p.detach().clone(), [0.0] * 6
    group = {"params": [p], "lr": 0.1, "weight_decay": 0.2, "beta2": beta2}
    rows = train.RowRMSprop([group], {})
    for step in range(4):
        p.grad = torch.randn(6, 5)
        p.grad[2] = 0.0  # never read
        p.grad[3] *= step == 1  # read once
        rows.step()
        for i, grad in enumerate(p.grad):
            moments[i] = beta2 * moments[i] + (1 - beta2) * float(grad.square().mean())
            slow[i] *= 1 - 0.1 * 0.2
            if moments[i]:
                slow[i] -= 0.1 * grad / moments[i] ** 0.5
    assert torch.allclose(p, slow, atol=1e-6)
    # One number a row beside the table: memory is what it is for.
    assert sum(value.numel() for value in rows.state[p].values()) == 6


def test_a_row_that_is_read_once_moves_once_however_small_its_gradient():
    steps = []
    for scale in (1.0, 1e-10):
        p = torch.nn.Parameter(torch.zeros(2, 8))
        group = {"params": [p], "lr": 0.1, "weight_decay": 0.0, "beta2": 0.95}
        rows = train.RowRMSprop([group], {})
        for step in range(3):
            p.grad = torch.zeros(2, 8)
            p.grad[1] = scale * (step == 1)
            rows.step()
            steps.append(p.detach().clone())
    first, second, third = steps[:3]
    assert torch.equal(first, torch.zeros(2, 8)) and torch.equal(second, third)
    assert (
        torch.allclose(second[1], torch.tensor(-0.1 / 0.05**0.5)) and not second[0].any()
    )
    assert torch.allclose(steps[4], second, rtol=1e-4)


# ---- The polar factor ---------------------------------------------------------------------------
def conditioned(shape: tuple[int, int], smallest: float) -> torch.Tensor:
    """Return a matrix whose singular values fall from 1 to `smallest`, on a logarithmic scale."""
    U, _, Vh = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    return (
        U
        @ torch.diag(torch.logspace(0, torch.log10(torch.tensor(smallest)), min(shape)))
        @ Vh
    )


@pytest.mark.parametrize("shape", [(48, 48), (96, 32), (256, 16)])
@pytest.mark.parametrize("smallest", [None, 0.3, 0.03])
def test_the_polar_factor_is_that_of_an_svd(shape, smallest):
    torch.manual_seed(0)
    G = torch.randn(shape) if smallest is None else conditioned(shape, smallest)
    U, S, Vh = torch.linalg.svd(G, full_matrices=False)
    got = train.polar_express(17 * G[None])[0].float()
    values = torch.linalg.svdvals(got)
    # Five steps lift what is not lost in the norm of the matrix.
    well = S > 0.02 * S.norm()
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
    optimizer = Muon([muon_group(params)])
    generator = torch.Generator().manual_seed(1)
    for momentum, lr, decay in ((0.0, 0.1, 0.0), (0.9, 0.05, 0.5), (0.95, 0.2, 1.0)):
        optimizer.param_groups[0] |= {
            "momentum": momentum,
            "lr": lr,
            "weight_decay": decay,
        }
        for i, p in enumerate(params):
            p.grad = 10.0**-i * torch.randn(shape, generator=generator)
            args = (expected[i], p.grad, states[i], momentum, 0.9, lr, decay)
            expected[i] = slow_muon(*args)
        optimizer.step()
        for p, slow in zip(params, expected, strict=True):
            assert torch.allclose(p, slow, atol=1e-4)


def muon_change(p, grad, decay: float = 0.0, lr: float = 1.0) -> torch.Tensor:
    """Return what the first step with `grad` takes from p (1, rows, columns)."""
    param = torch.nn.Parameter(p[0].clone())
    param.grad = grad[0].clone()
    Muon([muon_group([param], momentum=0.0, lr=lr, weight_decay=decay)]).step()
    return p - param


@torch.no_grad()
def test_variance_reduction_equalises_the_longer_sides_norms_and_keeps_the_total():
    torch.manual_seed(0)
    for shape in ((96, 32), (32, 96)):
        grad = torch.randn(1, *shape) * torch.logspace(-1, 1, shape[0])[:, None]
        update = muon_change(torch.zeros(1, *shape), grad)[0]
        tall = grad[0] if shape[0] >= shape[1] else grad[0].T
        plain = train.polar_express(tall[None])[0].float()
        plain = plain if shape[0] >= shape[1] else plain.T
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
    optimizer, buffer = Muon([muon_group([p], momentum=0.75)]), torch.zeros(4, 4)
    for _ in range(4):
        p.grad = torch.randn(4, 4)
        optimizer.step()
        buffer = 0.75 * buffer + 0.25 * p.grad
        assert torch.allclose(seen[-1][0], 0.75 * buffer + 0.25 * p.grad, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("shape", [(8, 8), (16, 4), (4, 16)])
def test_a_gradient_of_zero_moves_nothing_and_poisons_nothing(shape):
    (p,) = random_params(shape)
    before, optimizer = p.clone(), Muon([muon_group([p])])
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
def test_a_muon_group_of_mixed_shapes_is_refused():
    with pytest.raises(ValueError, match="one shape"):
        Muon([muon_group(random_params((4, 8), (8, 4)))])


def test_every_parameter_is_in_exactly_one_group():
    model = tiny_model()
    optimizers = train.build_optimizers(model)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    grouped = [id(p) for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())
    assert len(grouped) == len(set(grouped))
    assert all(
        p.ndim == 2 for group in optimizers[-1].param_groups for p in group["params"]
    )


# ---- Steps --------------------------------------------------------------------------------------
def test_training_lowers_the_loss():
    model, (x, y) = tiny_model(), tiny_batch(4)
    optimizers, losses = train.build_optimizers(model), []
    for _ in range(50):
        train.set_schedules(optimizers, 0.5)
        loss = train.train_step(model, optimizers, [(x, y)], 1)
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
        loss = train.train_step(model, [optimizer], iter(parts), n)
        results.append((loss, [p.detach() for p in model.parameters()]))
        assert all(p.grad is None for p in model.parameters())
    (whole_loss, whole), (loss, parts) = results
    assert loss.ndim == 0 and not loss.requires_grad
    assert float(loss) == pytest.approx(float(whole_loss), rel=1e-5)
    for a, b in zip(whole, parts, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)


def test_an_unused_parameter_is_named_not_a_type_error_from_torch():
    model = tiny_model()
    model.unused = torch.nn.Parameter(torch.ones(4, 4))
    with pytest.raises(RuntimeError, match=r"no gradient for \['unused'\]"):
        train.train_step(model, [], [tiny_batch(2)], 1)


def test_the_losses_do_not_depend_on_the_accumulation():
    losses = {}
    for count in (1, 2, 8):
        model = tiny_model()
        optimizers = train.build_optimizers(model)
        losses[count] = []
        for number in range(3):
            train.set_schedules(optimizers, 0.5)
            x, y = tiny_batch(8)
            x, y = (x + number) % 50, (y + number) % 50  # another batch each time
            batches = zip(x.chunk(count), y.chunk(count), strict=True)
            losses[count].append(
                train.train_step(model, optimizers, batches, count).item()
            )
    assert (
        len(set(losses[1])) == 3 and max(losses[1]) - min(losses[1]) > 1e-2
    )  # it does move
    assert losses[2] == pytest.approx(losses[1], rel=2e-4)
    assert losses[8] == pytest.approx(losses[1], rel=2e-4)


# ---- Warm-up ------------------------------------------------------------------------------------
def snapshot(model, optimizers) -> list[torch.Tensor]:
    states = [s for optimizer in optimizers for s in optimizer.state.values()]
    tensors = [*model.parameters(), *(t for state in states for t in state.values())]
    return [t.detach().clone() for t in tensors]


@pytest.fixture
def trained():
    """A model and its optimizers after two steps, so that no state is zero."""
    model = tiny_model()
    optimizers = train.build_optimizers(model)
    for _ in range(2):
        train.set_schedules(optimizers, 0.5)
        train.train_step(model, optimizers, [tiny_batch(4)], 1)
    return model, optimizers


RUN = types.SimpleNamespace(random_batch=tiny_batch)


def spoil(monkeypatch, model, fails_at: int) -> list[bool]:
    """Let the loss run out of memory at a call; return the calls so far: had wte moved?"""
    wte, loss, calls = model.wte.weight.detach().clone(), model.loss, []

    def spoiled(x, y):
        calls.append(not torch.equal(model.wte.weight, wte))
        if len(calls) == fails_at:
            raise torch.OutOfMemoryError("does not fit")
        return loss(x, y)

    monkeypatch.setattr(model, "loss", spoiled)
    return calls


def rates(optimizers) -> list[dict]:
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    return [{k: v for k, v in group.items() if k != "params"} for group in groups]


def test_warm_up_puts_weights_and_state_back_bit_for_bit(trained, monkeypatch):
    model, optimizers = trained
    before, moved, settings = snapshot(model, optimizers), [], rates(optimizers)
    trunk = model.trunk

    def watched(idx):
        moved.append(not torch.equal(model.wte.weight, before[0]))
        return trunk(idx)

    monkeypatch.setattr(model, "trunk", watched)
    train.warm_up(RUN, model, optimizers, 2)
    assert moved == [
        False,
        False,
        True,
        True,
        True,
    ]  # two steps of two, then what they made
    after = snapshot(model, optimizers)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(p.grad is None for p in model.parameters())
    assert rates(optimizers) == settings


def test_a_warm_up_before_any_step_leaves_a_run_as_it_would_be_without(monkeypatch):
    results = []
    for warm in (False, True):
        model = tiny_model()
        optimizers = train.build_optimizers(model)
        if warm:
            train.warm_up(RUN, model, optimizers, 2)
        for progress in (0.0, 0.5):
            train.set_schedules(optimizers, progress)
            train.train_step(model, optimizers, [tiny_batch(4)], 1)
        results.append(snapshot(model, optimizers))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("fails_at", [1, 2])
def test_a_warm_up_that_does_not_fit_leaves_nothing_behind(
    trained, monkeypatch, fails_at
):
    model, optimizers = trained
    before = snapshot(model, optimizers)
    calls = spoil(monkeypatch, model, fails_at)
    with pytest.raises(torch.OutOfMemoryError):
        train.warm_up(RUN, model, optimizers, 2)
    assert len(calls) == fails_at
    after = snapshot(model, optimizers)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(p.grad is None for p in model.parameters())
