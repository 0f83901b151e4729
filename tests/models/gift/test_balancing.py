from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torchjd.aggregation import AlignedMTLWeighting, PCGradWeighting

from models.gift.balancing import (
    GradNorm,
    Jacobi,
    aligned_weights,
    draw_order,
    gradient_matrix,
    make_balancing,
    pcgrad_weights,
)
from models.gift.losses import MultiTaskLoss
from models.gift.network import MultiTaskMLP
from models.gift.trainer import BalancingConfig, NetworkConfig, TaskConfig
from tests.models.gift.replayed import NoHostReads

METHODS = ["fixed", "gradnorm", "pcgrad", "aligned_mtl"]
TASKS = [TaskConfig(loss="mse"), TaskConfig(loss="bce"), TaskConfig(loss="focal")]
WEIGHTS = torch.tensor([0.5, 0.2, 0.3])
GENERATOR = torch.Generator()


def setting(n: int = 128, batch_norm: bool = True):
    """A small network and a batch whose first two tasks pull in opposite directions."""
    config = NetworkConfig(width=16, depth=2, dropout=0.0, batch_norm=batch_norm, head_width=4, embedding_dim=3)
    net = MultiTaskMLP(config, 4, (3,), [0.0, -1.0, -1.0], None, seed=4)
    rng = np.random.default_rng(1)
    numeric = torch.from_numpy(rng.normal(size=(n, 4)).astype(np.float32))
    codes = torch.from_numpy(rng.integers(0, 3, (n, 1)).astype(np.int32))
    with torch.no_grad():  # both read one unit of the tower with the same sign, but want opposite things of it
        net.head_hidden.weight.view(3, 4, -1)[1] = net.head_hidden.weight.view(3, 4, -1)[0]
        net.head_hidden.bias.view(3, 4)[:2] = 0.5
        net.head_weight[:2] = 0.5
    signal = numeric[:, 0]
    targets = torch.stack([3 * signal, (signal < 0).float(), (numeric[:, 1] > 1).float()], 1)
    return net, numeric, codes, targets


def gradients(method: str, net, numeric, codes, targets, seed: int = 0) -> dict[str, torch.Tensor]:
    net.zero_grad(set_to_none=True)
    features = net.features(numeric, codes)
    losses, present = MultiTaskLoss(TASKS, "cpu")(net.heads(features), targets)
    balancing = make_balancing(BalancingConfig(method=method), WEIGHTS.clone())
    balancing.end_epoch()
    balancing.backward(losses, present, features, net, draw_order(3, seed))
    return {name: p.grad.clone() for name, p in net.named_parameters()}


def task_gradients(net, numeric, codes, targets) -> torch.Tensor:
    """Each task's gradient of all shared parameters, one row a task, by plain autograd."""
    losses, _ = MultiTaskLoss(TASKS, "cpu")(net(numeric, codes), targets)
    shared = net.shared_parameters()
    grads = [torch.autograd.grad(loss, shared, retain_graph=True) for loss in losses]
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in grads])


def flat(net, grads) -> torch.Tensor:
    shared = {id(p) for p in net.shared_parameters()}
    return torch.cat([grads[n].flatten() for n, p in net.named_parameters() if id(p) in shared])


def test_fixed_is_the_gradient_of_the_weighted_sum():
    net, *batch = setting()
    torch.testing.assert_close(flat(net, gradients("fixed", net, *batch)), WEIGHTS @ task_gradients(net, *batch))


@pytest.mark.parametrize("method", METHODS)
def test_effective_weights_are_those_of_the_tasks_gradients(method):
    net, numeric, codes, targets = setting()
    matrix = task_gradients(net, numeric, codes, targets)
    features = net.features(numeric, codes)
    losses, present = MultiTaskLoss(TASKS, "cpu")(net.heads(features), targets)
    weights = make(method).backward(losses, present, features, net, draw_order(3, 0))
    update = torch.cat([p.grad.flatten() for p in net.shared_parameters()])
    torch.testing.assert_close(update, weights @ matrix, rtol=1e-4, atol=1e-6)


def test_every_method_changes_the_update():
    net, *batch = setting()
    updates = {m: flat(net, gradients(m, net, *batch)) for m in METHODS}
    for a in ("fixed", "pcgrad", "aligned_mtl"):
        for b in ("pcgrad", "aligned_mtl"):
            if a != b:
                cosine = torch.cosine_similarity(updates[a], updates[b], dim=0)
                assert cosine < 0.999, (a, b)


# ---- weights from inner products


def matrices(n: int, kind: str, dtype: torch.dtype, count: int = 30):
    """Gradients of n tasks [n, 40] of one kind."""
    generator = torch.Generator().manual_seed(n)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype)

    for _ in range(count):
        rows = normal(n, 40)
        if kind == "zero rows":
            rows[:: 2 if n > 2 else 1] = 0.0
        elif kind == "conflicting":
            rows -= 1.2 * rows.mean(0)
        elif kind == "opposed":
            rows[-1] = -2.0 * rows[0]
        elif kind == "same":
            rows[:] = rows[0]
        elif kind == "low rank":
            rows = normal(n, max(1, n // 2)) @ rows[: max(1, n // 2)]
        elif kind == "scaled":
            rows *= 10.0 ** torch.linspace(-0.5, 0.5, n, dtype=dtype).unsqueeze(1)
        yield rows


KINDS = ["random", "conflicting", "zero rows", "opposed", "same", "low rank", "scaled"]
PRECISION = {torch.float32: 2e-6, torch.float64: 1e-10}  # torchjd finds eigenvalues in that of the gradients


@pytest.mark.parametrize("dtype", PRECISION)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1, 2, 3, 4, 8])
def test_pcgrad_weights_are_those_of_torchjd(n, kind, dtype):
    for seed, rows in enumerate(matrices(n, kind, dtype)):
        gramian = rows @ rows.T
        with torch.random.fork_rng():
            torch.manual_seed(seed)  # torchjd draws the orders itself, from the global generator
            expected = PCGradWeighting()(gramian)
        got = pcgrad_weights(gramian, draw_order(n, seed))
        assert got.dtype == dtype
        torch.testing.assert_close(got, expected, rtol=PRECISION[dtype], atol=PRECISION[dtype])


@pytest.mark.parametrize("solver", ["eigh", "jacobi"])
@pytest.mark.parametrize("dtype", PRECISION)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1, 2, 3, 4, 8])
def test_aligned_weights_are_those_of_torchjd(n, kind, dtype, solver):
    eigen = torch.linalg.eigh if solver == "eigh" else Jacobi(n, "cpu")
    preference = torch.rand(n, generator=torch.Generator().manual_seed(0), dtype=dtype) + 0.1
    for rows in matrices(n, kind, dtype):
        gramian = rows @ rows.T
        expected = AlignedMTLWeighting(preference)(gramian)
        got = aligned_weights(gramian, preference, eigen)
        assert got.dtype == dtype
        torch.testing.assert_close(got, expected, rtol=PRECISION[dtype], atol=PRECISION[dtype])


def pcgrad_reference(matrix: torch.Tensor, order: list[list[int]]) -> torch.Tensor:
    """Algorithm 1 of the paper, on the gradients themselves."""
    rows = []
    for i, others in enumerate(order):
        g = matrix[i].clone()
        for j in others:
            if j != i and g @ matrix[j] < 0:
                g -= (g @ matrix[j]) / (matrix[j] @ matrix[j]) * matrix[j]
        rows.append(g)
    return torch.stack(rows).sum(0)


@pytest.mark.parametrize("n", range(1, 9))
def test_jacobi_finds_all_eigenvalues_and_vectors(n):
    generator = torch.Generator().manual_seed(n)
    solve, worst = Jacobi(n, "cpu"), 0.0
    for trial in range(300):
        turned = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0]
        sizes = 10.0 ** (-9.0 * torch.rand(n, generator=generator, dtype=torch.float64)) * 10.0 ** (trial % 40 - 20)
        matrix = (turned * sizes) @ turned.T
        values, vectors = solve(matrix)
        scale = sizes.max()
        worst = max(worst, ((vectors * values) @ vectors.T - matrix).abs().max().div(scale).item())
        worst = max(worst, (values.sort().values - sizes.sort().values).abs().max().div(scale).item())
        worst = max(worst, (vectors @ vectors.T - torch.eye(n)).abs().max().item())
    assert worst < 1e-14


@pytest.mark.parametrize("n", range(1, 9))
def test_jacobi_leaves_a_diagonal_matrix_as_it_is(n):
    for matrix in (torch.zeros(n, n), torch.eye(n), torch.arange(1.0, n + 1).diag()):
        values, vectors = Jacobi(n, "cpu")(matrix.double())
        assert torch.equal(values.sort().values, matrix.diagonal().double())
        torch.testing.assert_close(vectors, torch.eye(n, dtype=torch.float64), rtol=0.0, atol=1e-14)


def test_aligned_gradients_have_equal_singular_values():
    for rows in matrices(4, "conflicting", torch.float64):
        weights = torch.stack([aligned_weights(rows @ rows.T, w, torch.linalg.eigh) for w in torch.eye(4)])
        values = torch.linalg.svdvals(weights @ rows)
        smallest = torch.linalg.svdvals(rows)[-1]
        torch.testing.assert_close(values, smallest.expand(4))


def test_pcgrad_is_the_papers_algorithm_for_many_tasks():
    for seed, rows in enumerate(matrices(8, "conflicting", torch.float64)):
        order = draw_order(8, seed)
        expected = pcgrad_reference(rows, order.tolist())
        torch.testing.assert_close(pcgrad_weights(rows @ rows.T, order) @ rows, expected)


@pytest.mark.parametrize("method", ["pcgrad", "aligned_mtl"])
def test_one_task_alone_is_not_changed(method):
    net, numeric, codes, targets = setting()
    net = MultiTaskMLP(NetworkConfig(width=16, depth=2, dropout=0.0, embedding_dim=3), 4, (3,), [0.0], None, seed=4)
    found = []
    for chosen in ("fixed", method):
        net.zero_grad(set_to_none=True)
        features = net.features(numeric, codes)
        losses, present = MultiTaskLoss(TASKS[:1], "cpu")(net.heads(features), targets[:, :1])
        balancing = make_balancing(BalancingConfig(method=chosen), torch.ones(1))
        weights = balancing.backward(losses, present, features, net, draw_order(1, 0))
        torch.testing.assert_close(weights, torch.ones(1))
        found.append([p.grad for p in net.parameters()])
    torch.testing.assert_close(found[0], found[1])


def test_pcgrad_is_the_papers_algorithm_on_weighted_gradients():
    net, *batch = setting()
    matrix = WEIGHTS[:, None] * task_gradients(net, *batch)
    expected = pcgrad_reference(matrix, draw_order(3, 7).tolist())
    got = flat(net, gradients("pcgrad", net, *batch, seed=7))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


def test_pcgrad_leaves_no_conflict_between_two_tasks():
    net, numeric, codes, targets = setting()
    targets[:, 2] = float("nan")
    matrix = task_gradients(net, numeric, codes, targets)
    assert torch.cosine_similarity(matrix[0], matrix[1], dim=0) < -0.1
    update = flat(net, gradients("pcgrad", net, numeric, codes, targets))
    assert (matrix[:2] @ update >= -1e-6 * matrix[:2].norm(dim=1) * update.norm()).all()


def test_aligned_mtl_gives_the_gradients_equal_singular_values():
    net, *batch = setting()
    matrix = task_gradients(net, *batch).double()
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    expected = values[-1] * WEIGHTS.double() @ (left @ right)
    got = flat(net, gradients("aligned_mtl", net, *batch)).double()
    torch.testing.assert_close(got, expected, rtol=1e-2, atol=1e-3 * expected.abs().max().item())


@pytest.mark.parametrize("method", ["pcgrad", "aligned_mtl"])
def test_heads_get_their_own_tasks_gradient(method):
    net, *batch = setting()
    got = gradients(method, net, *batch)
    losses, _ = MultiTaskLoss(TASKS, "cpu")(net(*batch[:2]), batch[2])
    scale = WEIGHTS if method == "pcgrad" else torch.ones(3)
    names = ["head_hidden.weight", "head_hidden.bias", "head_weight", "head_bias"]
    expected = torch.autograd.grad((losses * scale).sum(), net.head_parameters())
    for name, gradient in zip(names, expected, strict=True):
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("batch_norm", [True, False])
def test_a_task_without_rows_adds_nothing(method, batch_norm):
    net, numeric, codes, targets = setting(batch_norm=batch_norm)
    targets[:, 2] = float("nan")
    grads = gradients(method, net, numeric, codes, targets)
    assert all(torch.isfinite(g).all() for g in grads.values())
    assert (grads["head_weight"][2] == 0).all()
    assert grads["head_bias"][2] == 0
    assert (grads["head_weight"][:2].abs().sum(1) > 0).all()


def test_order_is_of_permutations_that_the_seed_alone_decides():
    torch.manual_seed(1)
    before = torch.default_generator.get_state()
    orders = [draw_order(5, seed) for seed in (3, 3, 4)]
    assert torch.equal(before, torch.default_generator.get_state())
    assert torch.equal(orders[0], orders[1])
    assert not torch.equal(orders[0], orders[2])
    assert (orders[0].sort(1).values == torch.arange(5)).all()
    assert len({tuple(row) for row in orders[0].tolist()}) > 1  # each task's own


# ---- nothing is read by the host


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x[0].item(),
        lambda x: bool(x[0] > 0),
        lambda x: x[x > 0],
        lambda x: (x > 0).nonzero(),
        lambda x: torch.equal(x, x),
        lambda x: x.masked_select(x > 0),
        lambda x: x.unique(),
        lambda x: x.index_put_((x > 0,), x[0]),
        lambda x: x + torch.tensor(1.0),
        lambda x: torch.rand(3, generator=GENERATOR),
    ],
)
def test_a_host_read_would_be_noticed(read):
    with pytest.raises(RuntimeError, match="not permitted"), NoHostReads():
        read(torch.ones(3))


def solvers(method: str) -> list[str]:
    return ["eigh", "jacobi"] if method == "aligned_mtl" else ["none"]


EVERY = [(method, solver) for method in METHODS for solver in solvers(method)]


def make(method: str, solver: str = "none"):
    balancing = make_balancing(BalancingConfig(method=method), WEIGHTS.clone())
    if solver == "jacobi":  # as on a GPU
        balancing.eigen = Jacobi(3, "cpu")
    return balancing


@pytest.mark.parametrize(("method", "solver"), EVERY)
def test_a_step_reads_nothing_and_draws_nothing(method, solver):
    net, numeric, codes, targets = setting()
    loss, balancing = MultiTaskLoss(TASKS, "cpu"), make(method, solver)
    before = torch.default_generator.get_state()
    for epoch in range(2):
        assert balancing.phase == (epoch if method == "gradnorm" else 0)
        for step in range(3):
            order = draw_order(3, step) if balancing.draws_order else None
            net.zero_grad(set_to_none=True)
            with NoHostReads():
                features = net.features(numeric, codes)
                losses, present = loss(net.heads(features), targets)
                balancing.backward(losses, present, features, net, order)
        balancing.end_epoch()
    assert torch.equal(before, torch.default_generator.get_state())


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
@pytest.mark.parametrize(("method", "solver"), EVERY)
def test_gradients_that_are_not_finite_are_passed_on(method, solver, value):
    net, numeric, codes, targets = setting()
    balancing = make(method, solver)
    balancing.end_epoch()
    for _ in range(2):
        net.zero_grad(set_to_none=True)
        features = net.features(numeric, codes)
        losses, present = MultiTaskLoss(TASKS, "cpu")(net.heads(features), targets)
        losses = losses * torch.tensor([1.0, value, value])
        balancing.backward(losses, present, features, net, draw_order(3, 0))
    shared = torch.cat([p.grad.flatten() for p in net.shared_parameters()])
    if value == 1e30 and method == "fixed":  # elsewhere the products of such gradients overflow
        assert shared.isfinite().all()
    else:
        assert not shared.isfinite().any()


@pytest.mark.parametrize("method", ["pcgrad", "aligned_mtl"])
def test_combining_stays_on_the_device(method):
    with FakeTensorMode():  # devices and shapes alone, without a GPU
        balancing = make_balancing(BalancingConfig(method=method), torch.ones(3, device="cuda"))
        order = torch.zeros(3, 3, dtype=torch.int64, device="cuda")
        weights = balancing.combine(torch.rand(3, 3, device="cuda"), order)
    assert weights.device.type == "cuda"
    assert weights.shape == (3,)
    assert method != "aligned_mtl" or isinstance(balancing.eigen, Jacobi)


def test_gradient_matrix_equals_single_gradients():
    net, numeric, codes, targets = setting()
    losses, _ = MultiTaskLoss(TASKS, "cpu")(net(numeric, codes), targets)
    matrix = gradient_matrix(losses, net.last_shared)
    for k in range(3):
        single = torch.autograd.grad(losses[k], net.last_shared, retain_graph=True)[0]
        assert torch.equal(matrix[k], single.flatten())


def started(weights: list[float], alpha: float, initial: list[float] | None = None) -> GradNorm:
    balancing = GradNorm(torch.tensor(weights), alpha)
    balancing.state["initial_sum"] += torch.tensor(initial or [1.0] * len(weights))
    balancing.state["initial_count"] += 1
    balancing.end_epoch()
    return balancing


ALL = torch.tensor([True, True, True])


def test_gradnorm_keeps_the_sum_and_stays_positive():
    balancing = started([0.3, 0.2, 3.0], alpha=1.5)
    generator = torch.Generator().manual_seed(0)
    for _ in range(600):
        norms = torch.tensor([1000.0, 1.0, 0.001]) * torch.rand(3, generator=generator)
        balancing.update(torch.rand(3, generator=generator), norms, ALL)
        assert balancing.weights.sum().item() == pytest.approx(3.5, rel=1e-5)
        assert (balancing.weights > 0).all()
    assert balancing.weights[2] > 10 * balancing.weights[0]


def test_gradnorm_keeps_equal_tasks_equal():
    balancing = started([1.0, 1.0, 1.0], alpha=1.5)
    for i in range(100):
        balancing.update(torch.full((3,), 1.0 / (i + 1)), torch.full((3,), 5.0 / (i + 1)), ALL)
    torch.testing.assert_close(balancing.weights, torch.ones(3))


def test_gradnorm_equalises_the_norms_at_alpha_zero():
    balancing = started([1.0, 1.0, 1.0], alpha=0.0)
    norms = torch.tensor([4.0, 1.0, 2.0])
    for _ in range(2000):
        balancing.update(torch.tensor([0.1, 0.9, 0.5]), norms, ALL)
    weighted = balancing.weights * norms
    torch.testing.assert_close(weighted / weighted.mean(), torch.ones(3), rtol=0.12, atol=0.0)


def test_gradnorm_alpha_favours_the_slow_task():
    slow_first = torch.tensor([0.9, 0.1, 0.1])  # of the initial loss 1
    shares = []
    for alpha in (0.0, 0.5, 1.5):
        balancing = started([1.0, 1.0, 1.0], alpha=alpha)
        for _ in range(1000):
            balancing.update(slow_first, torch.ones(3), ALL)
        shares.append(balancing.weights[0].item())
    assert shares[0] == pytest.approx(1.0, abs=0.1)
    assert shares[0] < shares[1] < shares[2]


def test_gradnorm_carries_the_norm_of_a_task_without_rows():
    seen, carried = (started([1.0, 1.0, 1.0], alpha=1.0) for _ in range(2))
    losses, norms = torch.tensor([0.5, 0.6, 0.7]), torch.tensor([1.0, 2.0, 3.0])
    for balancing in (seen, carried):
        balancing.update(losses, norms, ALL)
    seen.update(losses, norms, ALL)
    carried.update(
        losses * torch.tensor([1, 1, 0]), norms * torch.tensor([1, 1, 0]), torch.tensor([True, True, False])
    )
    assert torch.equal(seen.weights, carried.weights)


def test_gradnorm_averages_the_initial_losses_over_the_first_epoch():
    net, numeric, codes, targets = setting()
    balancing = GradNorm(WEIGHTS, alpha=1.0)
    seen = []
    for rows in (slice(0, 40), slice(40, 80), slice(80, 128)):
        batch_targets = targets[rows].clone()
        if rows.start == 40:
            batch_targets[:, 2] = float("nan")
        features = net.features(numeric[rows], codes[rows])
        losses, present = MultiTaskLoss(TASKS, "cpu")(net.heads(features), batch_targets)
        balancing.backward(losses, present, features, net, None)
        seen.append(losses.detach())
    balancing.end_epoch()
    assert torch.equal(balancing.weights, WEIGHTS)  # the first epoch trains with the given weights
    mean = balancing.state["initial_sum"] / balancing.state["initial_count"]
    torch.testing.assert_close(mean[:2], torch.stack(seen)[:, :2].mean(0))
    torch.testing.assert_close(mean[2], (seen[0][2] + seen[2][2]) / 2)


def test_gradnorm_weights_give_no_gradient_to_the_model():
    net, *batch = setting()
    torch.testing.assert_close(
        flat(net, gradients("gradnorm", net, *batch)), flat(net, gradients("fixed", net, *batch))
    )


def test_gradnorm_state_survives_a_checkpoint():
    first = started([1.0, 2.0, 3.0], alpha=0.7)
    rng = np.random.default_rng(0)
    steps = [torch.from_numpy(rng.random((2, 3)).astype(np.float32)) for _ in range(20)]
    for losses, norms in steps[:10]:
        first.update(losses, norms, ALL)
    second = GradNorm(torch.tensor([1.0, 2.0, 3.0]), alpha=0.7)
    second.load({name: t.clone() for name, t in first.tensors().items()})
    assert second.phase == 1
    for losses, norms in steps[10:]:
        first.update(losses, norms, ALL)
        second.update(losses, norms, ALL)
    assert torch.equal(first.weights, second.weights)


class Toy(nn.Module):
    """The toy of Chen et al. 2018, section 4: tasks tanh((B + E_i) x) times a scale each, one common trunk."""

    def __init__(self, scales: torch.Tensor, generator: torch.Generator) -> None:
        super().__init__()
        n = 30
        common = torch.randn(10, n, generator=generator) * 10**0.5
        own = torch.randn(len(scales), 10, n, generator=generator) * 3.5**0.5
        self.maps, self.scales = (common + own) / n**0.5, scales
        self.trunk = nn.Sequential(nn.Linear(n, 60), nn.ReLU(), nn.Linear(60, 60), nn.ReLU())
        self.tops = nn.ModuleList([nn.Linear(60, 10) for _ in scales])

    @property
    def last_shared(self) -> nn.Parameter:
        return self.trunk[2].weight

    def losses(self, x: torch.Tensor) -> torch.Tensor:
        features = self.trunk(x)
        targets = torch.tanh(torch.einsum("kon,bn->kbo", self.maps, x)) * self.scales[:, None, None]
        outputs = torch.stack([top(features) for top in self.tops])
        return ((outputs - targets) ** 2).mean((1, 2))


@pytest.mark.parametrize("seed", [0, 1])
def test_gradnorm_balances_the_papers_toy(seed):
    scales = torch.tensor([1.0, 10.0])
    results = {}
    for method in ("fixed", "gradnorm"):
        generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            toy = Toy(scales, generator)
        weights = torch.ones(2)
        balancing = make_balancing(BalancingConfig(method=method, alpha=0.12), weights)
        optimizer = torch.optim.Adam(toy.parameters(), lr=2e-3)
        for step in range(500):
            optimizer.zero_grad()
            losses = toy.losses(torch.randn(100, 30, generator=generator))
            balancing.backward(losses, torch.tensor([True, True]), losses, toy, None)
            optimizer.step()
            if step == 10:
                balancing.end_epoch()
        with torch.no_grad():
            results[method] = toy.losses(torch.randn(2000, 30, generator=generator)) / scales**2
        if method == "gradnorm":
            assert balancing.weights[1] < 0.3 < 1.7 < balancing.weights[0]
    assert results["gradnorm"][0] < 0.8 * results["fixed"][0]  # the small task is no longer drowned
    assert results["gradnorm"].sum() < results["fixed"].sum()
