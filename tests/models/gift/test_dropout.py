from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from models.gift.dropout import HashedDraws, _hashed
from models.gift.network import Dropout, MultiTaskMLP, cut_of_32
from models.gift.trainer import NetworkConfig

CPU = torch.device("cpu")
WIDTHS = [96, 40]
N_ROWS, N_STEPS = 500, 6


def made(seeds: list[int], widths: list[int] = WIDTHS, n_rows: int = N_ROWS, n_steps: int = N_STEPS) -> HashedDraws:
    found = HashedDraws(len(seeds), n_rows, widths, n_steps, CPU)
    found.begin_epoch(seeds)
    return found


def drawn(draws: HashedDraws, step: int, layer: int, n_rows: int = N_ROWS) -> Tensor:
    draws.begin_step(draws.keys[step])
    return draws.draw(layer, n_rows)


def kept(rate: float, seed: int = 3, step: int = 0, layer: int = 0) -> Tensor:
    """[rows, units] of mean 0 and variance 1."""
    keep = (drawn(made([seed]), step, layer)[0] >= cut_of_32(round(rate * 65536))).double()
    return (keep - (1 - rate)) / (rate * (1 - rate)) ** 0.5


def z_score(products: Tensor) -> float:
    """How many standard errors a mean of independent numbers of mean 0 and variance 1 is off 0."""
    return abs(float(products.mean())) * products.numel() ** 0.5


@pytest.mark.parametrize("rate", [0.001, 0.1, 0.2, 0.5, 0.9])
def test_the_share_that_is_dropped(rate):
    for seed in range(5):
        for step in range(2):
            for layer in range(2):
                assert z_score(kept(rate, seed, step, layer)) < 4.5


def test_every_bit_is_as_often_set_as_not():
    bits = (drawn(made([5]), 1, 0)[0].unsqueeze(-1) >> torch.arange(12, 32)) & 1  # those below decide nothing
    off = (bits.double().mean((0, 1)) - 0.5).abs() * 2 * (N_ROWS * WIDTHS[0]) ** 0.5
    assert off.max() < 4.5


@pytest.mark.parametrize("rate", [0.2, 0.5])
def test_masks_are_independent_of_each_other(rate):
    one = kept(rate)
    others = {
        "seed": kept(rate, seed=4),
        "step": kept(rate, step=1),
        "far step": kept(rate, step=N_STEPS - 1),
        "next row": one.roll(1, 0),
        "next unit": one.roll(1, 1),
        "diagonal": one.roll((1, 1), (0, 1)),
        "next row of the next step": kept(rate, step=1).roll(1, 0),
    }
    for name, other in others.items():
        assert z_score(one * other) < 4.5, name
    for step in range(2):
        assert z_score(one[:, : WIDTHS[1]] * kept(rate, layer=1, step=step)) < 4.5


def test_no_two_rows_and_no_two_units_go_together():
    one = kept(0.2)
    for z in (one, one.T):
        correlation = (z @ z.T / z.shape[1]).fill_diagonal_(0.0) * z.shape[1] ** 0.5
        assert correlation.abs().max() < 6.0
        assert float(correlation.std()) == pytest.approx(1.0, abs=0.05)


def test_rows_and_units_have_no_structure_together():
    """Four corners of a rectangle, three rows, and the spectrum of the whole mask."""
    one = kept(0.2)
    for shift in ((1, 1), (7, 3), (64, 32)):
        down, right = one.roll(shift[0], 0), one.roll(shift[1], 1)
        assert z_score(one * down * right * one.roll(shift, (0, 1))) < 4.5
    assert z_score(one * one.roll(1, 0) * one.roll(2, 0)) < 4.5
    largest = torch.linalg.svdvals(one)[0] / (N_ROWS**0.5 + WIDTHS[0] ** 0.5)
    assert float(largest) == pytest.approx(1.0, abs=0.05)  # of independent entries: Bai and Yin 1993


def test_rows_whose_numbers_are_equally_far_apart_do_not_go_together():
    """Without the last permutation four such rows would have one of three masks in common with the fourth."""
    draws = made([8], [256], 3000)
    a = draws.rows[0, :, 0].long()
    first, second = torch.triu_indices(len(a), len(a), 1)
    apart, order = ((a[first] - a[second]) & 0xFFFFFFFF).sort()
    at = (apart[1:] == apart[:-1]).nonzero().flatten()
    same = torch.stack([order[at], order[at + 1]], 1)
    assert len(same) > 500
    masks = torch.where(drawn(draws, 0, 0, 3000)[0] >= 0, 1.0, -1.0)
    one, other = (masks[first[same[:, i]]] * masks[second[same[:, i]]] for i in (0, 1))
    assert z_score(one * other) < 4.5


def test_the_counts_of_rows_and_units_vary_as_those_of_independent_draws():
    one = kept(0.3)
    assert float(one.mean(0).var() * N_ROWS) == pytest.approx(1.0, abs=0.5)
    assert float(one.mean(1).var() * WIDTHS[0]) == pytest.approx(1.0, abs=0.25)


def test_a_number_depends_on_seed_step_layer_row_and_unit_alone():
    """Not on padding, on the other models, or on how many rows and steps there are."""
    alone, wide = made([77]), made([5, 77, 6], [130, 64, 8], N_ROWS + 3, N_STEPS + 2)
    for step in range(N_STEPS):
        for layer, width in enumerate(WIDTHS):
            assert torch.equal(drawn(alone, step, layer, 90)[0], drawn(wide, step, layer)[1, :90, :width])


def test_its_memory_stays_where_it_is():
    draws = made([1])
    places = [t.data_ptr() for t in (draws.rows, draws.units, draws.keys)]
    first = drawn(draws, 0, 0)
    draws.begin_epoch([2])
    assert places == [t.data_ptr() for t in (draws.rows, draws.units, draws.keys)]
    assert not torch.equal(first, drawn(draws, 0, 0))
    draws.begin_epoch([1])
    assert torch.equal(first, drawn(draws, 0, 0))


def test_splitmix64_known_values():
    """The first outputs of the published generator seeded with 1234567, all but their last shift."""
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    found = _hashed(torch.tensor([[1234567]]), torch.arange(4))[0].numpy().view(np.uint32)
    upper = [value >> 32 for value in expected]
    assert [int(f) ^ (int(f) >> 31) for f in found] == upper


def test_a_network_draws_from_it():
    net = MultiTaskMLP(NetworkConfig(width=40, depth=2, taper=0.5, dropout=0.3), 5, (), [0.0], None, seed=1)
    draws = made([9], [40, 20])
    net.set_hashed(draws)
    layers = [m for m in net.tower if isinstance(m, Dropout)]
    masks = []
    for step in range(2):
        draws.begin_step(draws.keys[step])
        for number, layer in enumerate(layers):
            ones = torch.ones(64, (40, 20)[number], requires_grad=True)
            out = layer(ones)
            expected = draws.draw(number, 64)[0] >= cut_of_32(round(0.3 * 65536))
            torch.testing.assert_close(out, expected / 0.7, rtol=1e-4, atol=0.0)
            out.sum().backward()
            assert torch.equal(ones.grad, out)
            masks.append(out[:, :20] > 0)
    assert not any(torch.equal(a, b) for a, b in pairwise(masks))
    assert layers[0].eval()(ones) is ones
