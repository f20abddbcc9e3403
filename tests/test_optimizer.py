"""Laws of the optimizers, against loops, an SVD and Muon written out one matrix at a time.

What train.py need not have is tested only if it is there.
"""

import itertools
import math

import pytest
import torch

import train
from harness.warmup import check_groups
from laws import (
    difference,
    fresh,
    lively,
    loss_and_gradients,
    part,
    some_batch,
)


def muon_group(params, **changes) -> dict:
    group = {"lr": 0.1, "momentum": 0.9, "beta2": 0.9, "weight_decay": 0.0}
    return {"params": params} | group | changes


def random_params(*shapes: tuple[int, ...]) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes
    ]


@pytest.mark.parametrize("shape", [(8, 8), (4, 8), (8, 4)])
def test_muon_moves_each_matrix_as_if_alone_whichever_have_a_gradient(shape):
    together, alone = (random_params(shape, shape, shape) for _ in range(2))
    optimizer = part("Muon")([muon_group(together)])
    others = [part("Muon")([muon_group([p])]) for p in alone]
    generator = torch.Generator().manual_seed(1)
    for used in ((0, 1, 2), (0, 2), (1,), (), (1, 2), (0, 1, 2)):
        for i in range(3):
            grad = torch.randn(shape, generator=generator) if i in used else None
            together[i].grad, alone[i].grad = grad, grad
        before = [p.detach().clone() for p in together]
        for each in (optimizer, *others):
            each.step()
        for i in range(3):
            torch.testing.assert_close(together[i], alone[i], rtol=1e-3, atol=1e-4)
            assert torch.equal(together[i], before[i]) == (i not in used)


# ---- Whatever the optimizers are ----------------------------------------------------------------
def test_every_parameter_is_in_exactly_one_group():
    model = fresh()
    check_groups(model, train.build_optimizers(model))


def test_training_lowers_the_loss():
    model, batch, losses = fresh(), some_batch(4), []
    optimizers = train.build_optimizers(model)
    for _ in range(10):
        train.set_schedules(optimizers, 0.3)
        losses.append(float(train.train_step(model, optimizers, [batch], 1)))
    assert losses[-1] < 0.9 * losses[0]  # the same batch each time


@pytest.mark.parametrize("count", [2, 4])
def test_micro_steps_add_up_to_the_step(count):
    model, (x, y) = lively(), some_batch(8)
    whole_loss, whole = loss_and_gradients(model, [(x, y)])
    parts = list(zip(x.chunk(count), y.chunk(count), strict=True))
    loss, gradients = loss_and_gradients(model, parts)
    assert loss == pytest.approx(whole_loss, rel=1e-3)
    assert difference(gradients, whole) < 0.01


def test_a_step_leaves_no_gradient_to_the_next():
    model, first, second = lively(), some_batch(seed=1), some_batch(seed=2)
    loss_and_gradients(model, [first])
    after = loss_and_gradients(model, [second])
    alone = loss_and_gradients(lively(), [second])
    assert after[0] == pytest.approx(alone[0], rel=1e-5)
    assert difference(after[1], alone[1]) < 1e-4


# ---- RowRMSprop ---------------------------------------------------------------------------------
def test_rows_move_as_in_the_slow_loop_over_rows():
    (p,), beta2 = random_params((6, 5)), 0.9
    slow, moments = p.detach().clone(), [0.0] * 6
    group = {"params": [p], "lr": 0.1, "weight_decay": 0.0, "beta2": beta2}
    rows = part("RowRMSprop")([group])
    for step in range(4):
        p.grad = torch.randn(6, 5)
        p.grad[2] = 0.0  # never read
        p.grad[3] *= step == 1  # read once
        rows.step()
        for i, grad in enumerate(p.grad):
            moments[i] = beta2 * moments[i] + (1 - beta2) * float(grad.square().mean())
            if moments[i]:
                slow[i] -= 0.1 * grad / moments[i] ** 0.5
    assert torch.allclose(p, slow, atol=1e-6)
    # Two numbers per entry beside the table: memory is what it is for.
    tensors = [t for t in rows.state[p].values() if isinstance(t, torch.Tensor)]
    assert sum(t.numel() for t in tensors) == 12


def test_rows_of_a_sparse_gradient_move_as_those_of_the_dense_one_with_zeros():
    """Rows come twice, and miss steps."""
    torch.manual_seed(0)
    dense, sparse = (torch.nn.Parameter(torch.ones(8, 5)) for _ in range(2))
    group = {"lr": 0.1, "weight_decay": 0.0, "beta2": 0.9}
    both = [part("RowRMSprop")([{"params": [p], **group}]) for p in (dense, sparse)]
    for step in range(6):
        ids = torch.randint(0, 6, (2, 4))  # 6 and 7: never
        ids[0, 0] = 5 * (step % 5 == 0)
        weight = torch.randn(2, 4, 5)
        for p, is_sparse in ((dense, False), (sparse, True)):
            p.grad = None
            for part_of_batch in range(2):  # added up, as by two micro-steps
                rows = torch.nn.functional.embedding(
                    ids[part_of_batch], p, sparse=is_sparse
                )
                (rows * weight[part_of_batch]).sum().backward()
        assert sparse.grad.is_sparse and not dense.grad.is_sparse
        for optimizer in both:
            optimizer.step()
        torch.testing.assert_close(sparse, dense)
    assert torch.equal(sparse[6:], torch.ones(2, 5))


def test_every_row_decays_as_each_step_says_at_most_64_steps_late():
    p = torch.nn.Parameter(torch.ones(3, 4))
    group = {"params": [p], "lr": 0.0, "weight_decay": 0.1, "beta2": 0.9}
    rows = part("RowRMSprop")([group])
    kept = []  # of a row, from each step
    for step in range(200):
        (group,) = rows.param_groups
        group["lr"] = 0.2 * (1 - step / 200)
        kept.append(1 - group["lr"] * group["weight_decay"])
        p.grad = None
        read = torch.nn.functional.embedding(torch.tensor([0, 0, 1]), p, sparse=True)
        (0 * read).sum().backward()
        rows.step()
        latest, earliest = math.prod(kept), math.prod(kept[:-64])
        assert bool((p >= latest - 1e-4).all() and (p <= earliest + 1e-4).all())
    assert math.prod(kept) < 0.3  # so it has shown


def test_a_row_that_is_read_once_moves_once_however_small_its_gradient():
    steps = []
    for scale in (1.0, 1e-10):
        p = torch.nn.Parameter(torch.zeros(2, 8))
        group = {"params": [p], "lr": 0.1, "weight_decay": 0.0, "beta2": 0.95}
        rows = part("RowRMSprop")([group])
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
    got = part("polar_express")(17 * G[None])[0].float()
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
    together = part("polar_express")(G).float()
    for one, among in zip(G, together, strict=True):
        assert torch.allclose(
            part("polar_express")(one[None])[0].float(), among, atol=0.02
        )


# ---- Muon ---------------------------------------------------------------------------------------
def exact_polar(G: torch.Tensor) -> torch.Tensor:
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
def test_muon_is_the_slow_loop_over_single_matrices_of_any_shapes(monkeypatch, shape):
    part("polar_express")
    monkeypatch.setattr(train, "polar_express", exact_polar)
    params = random_params(shape, shape, (6, 10), shape)
    expected, states = [p.clone() for p in params], [{} for _ in params]
    optimizer = part("Muon")([muon_group(params)])
    generator = torch.Generator().manual_seed(1)
    for momentum, lr, decay in ((0.0, 0.1, 0.0), (0.9, 0.05, 0.5), (0.95, 0.2, 1.0)):
        optimizer.param_groups[0] |= {
            "momentum": momentum,
            "lr": lr,
            "weight_decay": decay,
        }
        for i, p in enumerate(params):
            p.grad = 10.0**-i * torch.randn(p.shape, generator=generator)
            args = (expected[i], p.grad, states[i], momentum, 0.9, lr, decay)
            expected[i] = slow_muon(*args)
        optimizer.step()
        for p, slow in zip(params, expected, strict=True):
            assert torch.allclose(p, slow, atol=1e-4)


def muon_change(p, grad, decay: float = 0.0, lr: float = 1.0) -> torch.Tensor:
    """Return what the first step with `grad` takes from p (1, rows, columns)."""
    param = torch.nn.Parameter(p[0].clone())
    param.grad = grad[0].clone()
    part("Muon")([muon_group([param], momentum=0.0, lr=lr, weight_decay=decay)]).step()
    return p - param


@torch.no_grad()
def test_variance_reduction_equalises_the_longer_sides_norms_and_keeps_the_total():
    torch.manual_seed(0)
    for shape in ((96, 32), (32, 96)):
        grad = torch.randn(1, *shape) * torch.logspace(-1, 1, shape[0])[:, None]
        update = muon_change(torch.zeros(1, *shape), grad)[0]
        tall = grad[0] if shape[0] >= shape[1] else grad[0].T
        plain = part("polar_express")(tall[None])[0].float()
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

    part("polar_express")
    monkeypatch.setattr(train, "polar_express", polar_express)
    (p,) = random_params((4, 4))
    optimizer, buffer = part("Muon")([muon_group([p], momentum=0.75)]), torch.zeros(4, 4)
    for _ in range(4):
        p.grad = torch.randn(4, 4)
        optimizer.step()
        buffer = 0.75 * buffer + 0.25 * p.grad
        assert torch.allclose(seen[-1][0], 0.75 * buffer + 0.25 * p.grad, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("shape", [(8, 8), (16, 4), (4, 16)])
def test_a_gradient_of_zero_moves_nothing_and_poisons_nothing(shape):
    (p,) = random_params(shape)
    before, optimizer = p.clone(), part("Muon")([muon_group([p])])
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
