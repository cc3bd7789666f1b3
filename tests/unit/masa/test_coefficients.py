"""Coefficients: the network against a float64 reference, its initialisation, and composition."""

import pytest
import torch

from cospadi.masa.models.coefficients import CoefficientNetwork, compose, spread_rows


def network(layers=7, atoms=3, embedding=10, hidden=12, seed=0, **how):
    torch.manual_seed(seed)
    built = CoefficientNetwork(layers, atoms, embedding, hidden, **how)
    built.initialise()
    return built


def test_is_a_three_layer_perceptron_of_the_block_embedding():
    net = network().double()
    with torch.no_grad():
        for bias in (net.first_bias, net.second_bias, net.last_bias):
            bias.normal_()
    for layer in range(7):
        hidden = (net.first_weight @ net.embedding[layer] + net.first_bias).clamp_min(0)
        hidden = (net.second_weight @ hidden + net.second_bias).clamp_min(0)
        torch.testing.assert_close(net(layer), net.last_weight @ hidden + net.last_bias)
    assert torch.equal(net.table(), torch.stack([net(layer) for layer in range(7)]))


@pytest.mark.parametrize("atoms", [1, 2, 8])
def test_every_block_starts_with_coefficients_of_unit_norm(atoms):
    for seed in range(5):
        table = network(layers=12, atoms=atoms, embedding=64, hidden=64, seed=seed).table()
        torch.testing.assert_close(table.norm(dim=1), torch.ones(12), rtol=0, atol=1e-4)
    assert (table[0] - table[1]).abs().max() > 1e-3 or atoms == 1  # blocks differ


def test_values_read_from_a_checkpoint_are_not_initialised_again():
    net = network()
    before = {name: value.clone() for name, value in net.named_parameters()}
    net.last_bias._is_hf_initialized = True
    net.initialise()
    assert all(torch.equal(value, before[name]) for name, value in net.named_parameters())


def test_compose_is_the_weighted_sum_of_atoms():
    atoms, coefficients = torch.randn(4, 5, 6, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    wanted = sum(c * a for c, a in zip(coefficients, atoms, strict=True))
    torch.testing.assert_close(compose(coefficients, atoms), wanted)
    assert compose(coefficients, atoms.bfloat16()).dtype == torch.bfloat16
    torch.testing.assert_close(compose(coefficients, atoms.bfloat16()).double(), wanted, rtol=0.05, atol=0.05)


def test_gradients_reach_atoms_and_network():
    net, atoms = network().double(), torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a: compose(net(2), a), (atoms,))
    compose(net(2), atoms).square().sum().backward()
    assert net.embedding.grad[2].abs().max() > 0 and net.embedding.grad[1].abs().max() == 0
    assert net.first_weight.grad.abs().max() > 0


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_a_lower_rate_is_the_same_function_with_smaller_steps(rate):
    """Adam's steps do not depend on the scale of gradients: stored 1 / rate as large, parameters move rate as far."""
    plain, slow = network(layers=6, embedding=64, hidden=64).double(), network(6, 3, 64, 64, rate=rate).double()
    torch.testing.assert_close(slow.table(), plain.table(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(slow.all_layers(), slow.table())
    torch.testing.assert_close(slow.table().norm(dim=1), torch.ones(6).double(), rtol=0, atol=1e-4)
    for (name, stored), used in zip(slow.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(stored * rate, used, rtol=1e-4, atol=1e-6, msg=name)
    target, tables = torch.randn(6, 3, dtype=torch.float64), []
    for net, learning_rate in ((slow, 1e-2), (plain, rate * 1e-2)):
        optimizer = torch.optim.AdamW(net.parameters(), lr=learning_rate, eps=1e-20, weight_decay=0.0)
        for _ in range(5):
            optimizer.zero_grad()
            (net.all_layers() - target).square().sum().backward()
            optimizer.step()
        tables.append(net.table())
    assert (tables[0] - target).norm() < (network(6, 3, 64, 64).double().table() - target).norm()
    torch.testing.assert_close(tables[0], tables[1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("count", "width"), [(6, 2), (12, 4), (7, 3), (6, 6), (3, 1), (3, 5)])
def test_spread_rows_are_a_tight_frame_of_unit_rows(count, width):
    torch.manual_seed(0)
    rows = spread_rows(count, width)
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(count).double())
    if count >= width:
        torch.testing.assert_close(rows.T @ rows, torch.eye(width).double() * count / width, rtol=0, atol=2e-3)
    if count <= width:
        torch.testing.assert_close(rows @ rows.T, torch.eye(count).double())


@pytest.mark.parametrize("rate", [1.0, 0.1])
def test_a_spread_start_differs_from_layer_to_layer(rate):
    def alike(start):
        tables = [network(12, 4, 64, 64, seed, rate=rate, start=start).table() for seed in range(5)]
        assert all(torch.allclose(table.norm(dim=1), torch.ones(12), atol=1e-4) for table in tables)
        return sum((table @ table.T).square().mean().item() for table in tables) / 5

    assert alike("spread") == pytest.approx(1 / 4, abs=1e-3)  # 1 / S, the least there is
    assert alike("network") > 0.4


def test_more_layers_than_hidden_units_are_spread_as_far_as_that_goes():
    table = network(layers=40, atoms=6, embedding=8, hidden=24, start="spread").table()
    assert torch.isfinite(table).all()
    torch.testing.assert_close(table.norm(dim=1), torch.ones(40), rtol=0, atol=1e-4)
