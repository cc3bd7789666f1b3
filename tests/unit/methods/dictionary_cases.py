"""Random layers and their inputs, and one way to run a dictionary method on them."""

import torch

from cospadi.methods.base import GroupShape, Problem, get_method


def calibration(tokens, d, seed, slope=1.5):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(d, d, generator=generator, dtype=torch.float64) * torch.logspace(0, -slope, d)
    return torch.randn(tokens, d, generator=generator, dtype=torch.float64) @ mixing.T


def decaying(d, n, seed, power=0.5):
    generator = torch.Generator().manual_seed(seed)
    u = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))[0]
    v = torch.linalg.qr(torch.randn(n, min(d, n), generator=generator, dtype=torch.float64))[0]
    return (u[:, : v.shape[1]] * torch.arange(1, v.shape[1] + 1).double() ** -power) @ v.T


def gram(x):
    return x.T @ x / len(x)


def solve(name, weights, grams, keep, options, seed=0):
    sizes = tuple(w.shape[1] for w in weights)
    shape = GroupShape(tuple(f"m{i}" for i in range(len(sizes))), weights[0].shape[0], sizes)
    chosen = get_method(name)
    spec = chosen.spec(shape, int(keep * shape.dense_bytes), options)
    factors = chosen.factorise(Problem("m", tuple(weights), tuple(grams), seed=seed), spec, options)
    return spec, factors


def rebuilt(factors):
    return factors.dictionary.matrix.T @ factors.codes.matrix.T
