"""Random weights and Grams of inputs that hang together, and the loss they define."""

import torch


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated(size, seed=0, tokens=200):
    """The Gram, float64, of inputs with unequal energies that are not independent."""
    inputs = rand(tokens, size, seed=seed) @ (rand(size, size, seed=seed + 1) * torch.linspace(0.1, 2, size))
    return (inputs.T @ inputs / tokens).double()


def loss(hessian, rows, values):
    miss = (rows - values).double()
    return float(((miss @ hessian) * miss).sum())
