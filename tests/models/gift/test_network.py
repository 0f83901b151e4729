from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from rtdl_num_embeddings import PiecewiseLinearEmbeddings
from torch import nn

from models.gift import model as models_of
from models.gift.model import chunk_rows, outputs
from models.gift.network import Dropout, MultiTaskMLP, PiecewiseLinearEmbedding, bins_of, seeded
from models.gift.trainer import NetworkConfig


def network(config: NetworkConfig | None = None, n_numeric: int = 5, cardinalities=(3, 4), n_tasks: int = 3, **kw):
    config = config or NetworkConfig(width=16, depth=2)
    quantiles = np.sort(np.random.default_rng(0).normal(size=(257, n_numeric)), axis=0)
    arguments = {"bias": [0.0] * n_tasks, "quantiles": quantiles, "seed": 1, **kw}
    return MultiTaskMLP(config, n_numeric, cardinalities, **arguments)


def batch(n: int = 64, n_numeric: int = 5, cardinalities=(3, 4)) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(3)
    codes = np.stack([rng.integers(0, c, n) for c in cardinalities], 1).astype(np.int32)
    return torch.from_numpy(rng.normal(size=(n, n_numeric)).astype(np.float32)), torch.from_numpy(codes)


def test_tower_widths_follow_the_taper():
    net = network(NetworkConfig(depth=3, width=256, taper=0.5))
    assert [m.out_features for m in net.tower if isinstance(m, nn.Linear)] == [256, 128, 64]
    assert net.head_hidden.out_features == 3 * 32
    net = network(NetworkConfig(depth=4, width=10, taper=0.3))
    assert [m.out_features for m in net.tower if isinstance(m, nn.Linear)] == [10, 3, 1, 1]


@pytest.mark.parametrize("batch_norm", [True, False])
def test_layers_are_those_of_the_configuration(batch_norm):
    net = network(NetworkConfig(depth=2, width=8, batch_norm=batch_norm, dropout=0.3))
    assert sum(isinstance(m, nn.BatchNorm1d) for m in net.tower) == 2 * batch_norm
    assert [m.cut for m in net.tower if isinstance(m, Dropout)] == [round(0.3 * 65536)] * 2
    assert net.last_shared.shape == (4, 8)


def test_output_is_the_bias_where_the_units_are_silent():
    net = network(bias=[0.0, -4.2, 1.5]).eval()
    with torch.no_grad():
        net.head_weight.zero_()
        out = net(*batch())
    assert torch.equal(out, torch.tensor([0.0, -4.2, 1.5]).expand(64, 3))


def test_heads_equal_separate_heads():
    net = network().eval()
    numeric, codes = batch()
    with torch.no_grad():
        features = net.features(numeric, codes)
        fused = net.heads(features)
        hidden = net.head_hidden(features).relu().view(-1, 3, 32)
        separate = [hidden[:, k] @ net.head_weight[k] + net.head_bias[k] for k in range(3)]
    torch.testing.assert_close(fused, torch.stack(separate, 1))


def test_a_head_gets_no_gradient_from_another_task():
    net = network()
    net(*batch())[:, 1].sum().backward()
    touched = net.head_hidden.weight.grad.view(3, 32, -1).abs().sum((1, 2)) > 0
    assert touched.tolist() == [False, True, False]
    assert (net.head_weight.grad.abs().sum(1) > 0).tolist() == [False, True, False]
    assert net.head_bias.grad.tolist() == [0.0, 64.0, 0.0]


def test_categorical_columns_use_their_own_rows_of_one_table():
    net = network(NetworkConfig(width=8, depth=1, dropout=0.0, embedding_dim=4)).eval()
    assert net.embedding.weight.shape == (7, 4)
    numeric, codes = batch(8)
    codes[:] = torch.tensor([2, 3], dtype=torch.int32)
    net(numeric, codes).sum().backward()
    assert (net.embedding.weight.grad.abs().sum(1) > 0).nonzero().flatten().tolist() == [2, 6]


@pytest.mark.parametrize(("n_numeric", "cardinalities"), [(5, ()), (0, (3, 4))])
def test_works_with_columns_of_one_kind(n_numeric, cardinalities):
    net = network(n_numeric=n_numeric, cardinalities=cardinalities)
    n = 16
    codes = torch.zeros(n, len(cardinalities), dtype=torch.int32)
    assert net(torch.randn(n, n_numeric), codes).shape == (n, 3)


def test_bins_follow_the_distinct_quantiles():
    quantiles = np.stack(
        [np.linspace(0, 8, 257), np.r_[np.zeros(256), 1.0], np.full(257, 3.0), np.r_[np.zeros(252), 1:6]], axis=1
    )
    edges = bins_of(quantiles, 4)
    assert edges[0].tolist() == [0, 2, 4, 6, 8]
    assert edges[1].tolist() == [0, 1]
    assert edges[2].tolist() == [3, 4]
    assert edges[3].tolist() == [0, 1, 2, 4, 5]  # mostly zeros: the bins are where the other values are


def test_piecewise_linear_embedding_equals_the_published_one():
    columns = [np.linspace(-1, 1, 257), np.r_[np.zeros(200), np.ones(57)], np.zeros(257), np.r_[np.zeros(252), 1:6]]
    bins = bins_of(np.stack(columns, 1), 6)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The .*-th feature has just two bin edges")
        published = PiecewiseLinearEmbeddings(bins, 3, activation=False, version="B")
    ours = PiecewiseLinearEmbedding(bins, 3)
    assert not ours.weight.any()  # at first it is linear
    mask = torch.stack([torch.arange(6) < len(edges) - 1 for edges in bins])
    with torch.no_grad():
        ours.weight.normal_()
        for column, edges in enumerate(bins):
            n = len(edges) - 1  # theirs keeps the last bin in the last place
            published.linear.weight[column, : n - 1] = ours.weight[column, : n - 1]
            published.linear.weight[column, -1] = ours.weight[column, n - 1]
        published.linear0.weight.copy_(ours.linear)
        published.linear0.bias.copy_(ours.bias)
    x = torch.randn(500, 4) * 3
    expected, found = published(x).flatten(1), ours(x)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    upstream = torch.randn_like(found)
    expected.backward(upstream)
    found.backward(upstream)
    torch.testing.assert_close(ours.linear.grad, published.linear0.weight.grad, atol=1e-4, rtol=1e-4)
    for column, edges in enumerate(bins):
        n = len(edges) - 1
        theirs = torch.cat(
            [published.linear.weight.grad[column, : n - 1], published.linear.weight.grad[column, -1:]]
        )
        torch.testing.assert_close(ours.weight.grad[column, :n], theirs, atol=1e-3, rtol=1e-4)
    assert not ours.weight.grad[~mask].any()


def test_piecewise_linear_embedding_bends_at_its_bins():
    config = NetworkConfig(numeric_embedding="piecewise_linear", n_bins=4, bin_embedding_dim=3, width=8, depth=1)
    net = network(config, n_numeric=2, cardinalities=())
    assert net.tower[0].in_features == 2 * 3
    with torch.no_grad():
        net.numeric_embedding.weight.normal_()
    x = torch.linspace(-5, 5, 400)
    embedded = net.numeric_embedding(torch.stack([x, x], 1))[:, 0].detach()
    bends = (embedded.diff().diff().abs() > 1e-4).nonzero().flatten()
    edges = bins_of(np.sort(np.random.default_rng(0).normal(size=(257, 2)), axis=0), 4)[0]
    assert all((edges - x[i + 1]).abs().min() < 0.06 for i in bends)
    assert len(bends) >= 3


def test_rows_of_a_forward_in_evaluation():
    """4096 on the CPU, whose bits they decide; elsewhere as many as launches are worth, fewer for wide networks."""
    wide = NetworkConfig(width=16384, depth=1)
    binned = NetworkConfig(width=8, depth=1, numeric_embedding="piecewise_linear", n_bins=256, bin_embedding_dim=2)
    cases = [(NetworkConfig(), 65_536), (wide, 4096), (binned, 2**26 // (20 * 256))]
    for config, expected in cases:
        net = network(config, n_numeric=20)
        assert chunk_rows(net, torch.device("cuda")) == expected
        assert chunk_rows(net, torch.device("cpu")) == 4096


@pytest.mark.parametrize("n_rows", [1, 4096, 5000])
def test_outputs_are_those_of_one_forward_whatever_its_rows(monkeypatch, n_rows):
    net, (numeric, codes) = network(), batch(n_rows)
    expected = net.eval()(numeric, codes)
    torch.testing.assert_close(outputs(net, numeric, codes), expected)
    monkeypatch.setattr(models_of, "chunk_rows", lambda *_: 300)
    torch.testing.assert_close(outputs(net, numeric, codes), expected)


def test_initial_weights_depend_on_the_seed_alone():
    torch.manual_seed(11)
    first = network().state_dict()
    expected = torch.rand(3)
    torch.manual_seed(11)
    assert torch.equal(torch.rand(3), expected)  # the global generator was not advanced
    torch.manual_seed(99)
    second = network().state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["head_weight"], network(seed=2).state_dict()["head_weight"])


def test_seeded_restores_the_generator_after_an_error():
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    with pytest.raises(RuntimeError), seeded(1):
        torch.rand(7).view(3, 5)
    assert torch.equal(torch.rand(2), expected)


@pytest.mark.parametrize("rate", [0.1, 0.2, 0.5, 0.9])
def test_dropout_keeps_the_expected_share_and_the_mean(rate):
    layer = Dropout(rate)
    layer.generator = torch.Generator().manual_seed(3)
    out = layer(torch.ones(1001, 201))
    kept = (out > 0).float().mean().item()
    assert kept == pytest.approx(1 - rate, abs=5 * (rate * (1 - rate) / out.numel()) ** 0.5)
    assert out[out > 0].unique().tolist() == pytest.approx([1 / (1 - rate)], rel=1e-3)


def test_dropout_draws_are_independent_of_each_other():
    layer = Dropout(0.5)
    layer.generator = torch.Generator().manual_seed(3)
    kept = (layer(torch.ones(40000)) > 0).float().view(-1, 4)
    again = (layer(torch.ones(40000)) > 0).float().view(-1, 4)
    correlation = torch.corrcoef(torch.cat([kept, again], 1).T) - torch.eye(8)
    assert correlation.abs().max() < 0.05
    assert abs(torch.corrcoef(torch.stack([kept.flatten()[1:], kept.flatten()[:-1]]))[0, 1]) < 0.03


def test_dropout_passes_the_gradient_of_what_it_kept():
    layer = Dropout(0.4)
    layer.generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 7, requires_grad=True)
    out = layer(x)
    out.sum().backward()
    torch.testing.assert_close(out, x * x.grad)


def test_dropout_is_off_in_evaluation_and_at_zero():
    x = torch.randn(4, 4)
    assert Dropout(0.5).eval()(x) is x
    assert Dropout(0.0)(x) is x
