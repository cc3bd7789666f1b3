"""Accelerated hard-thresholding pursuit with a least-squares dictionary: this project's fast solver.

Minimises ‖Y − D S‖_F² where every column of S has s non-zeros (or n in every m), by alternating

    S ← a few accelerated projected gradient steps  (Nesterov momentum, step 1/‖DᵀD‖₂, projection: keep the largest)
    D ← Y Sᵀ (S Sᵀ + ε I)⁻¹                         (least squares: MOD, Engan 1999)

The cost of orthogonal matching pursuit grows with s for every column. A gradient step is one matrix product for all
columns, and D and S improve each other in every round. Codes are stored as C = Sᵀ (d_out, k), so that the projection
works along contiguous rows.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from cospadi.format.patterns import balanced_nonzeros, keep_largest, parse_pattern
from cospadi.solvers.linalg import leading_vector, restricted_least_squares
from cospadi.solvers.mod import least_squares_dictionary


@dataclass(frozen=True)
class PursuitResult:
    """D (d, k) with unit-norm atoms, S (k, n), support (k, n), and the relative squared error after every round."""

    dictionary: Tensor
    codes: Tensor
    support: Tensor
    losses: list[float]


def initial_dictionary(target: Tensor, atoms: int, generator: torch.Generator) -> Tensor:
    """Leading left singular vectors of Y (d, n), followed by normalised random columns of Y if atoms > d.

    Returns:
        (d, atoms) with unit-norm columns.
    """
    d, n = target.shape
    # Only a starting point: beyond this size float32 is good enough and several times faster.
    wide = target.double() if min(d, n) <= 2048 else target
    if d <= n or atoms > n:
        vectors: Tensor = torch.linalg.eigh(wide @ wide.T).eigenvectors.flip(1).to(target.dtype)
    else:
        right = torch.linalg.eigh(wide.T @ wide).eigenvectors.flip(1)[:, :atoms]
        vectors = torch.linalg.qr(wide @ right).Q.to(target.dtype)
    if atoms <= d:
        return vectors[:, :atoms].contiguous()
    pick = torch.randint(n, (atoms - d,), generator=generator).to(target.device)
    extra = target[:, pick]
    noise = torch.randn(d, atoms - d, generator=generator).to(target)
    extra = extra + 1e-3 * noise * extra.norm(dim=0).mean() + 1e-12 * noise
    return torch.cat([vectors, extra / extra.norm(dim=0)], 1)


def _revive(dictionary: Tensor, codes: Tensor, target: Tensor) -> Tensor:
    """Replace atoms that no column uses by the residuals of the worst-approximated columns. Does not normalise."""
    norms = dictionary.norm(dim=0)
    dead = (codes != 0).sum(0).eq(0) | (norms < 1e-12)
    if bool(dead.any()):
        residual = target - dictionary @ codes.T
        order = residual.norm(dim=0).argsort(descending=True, stable=True)
        count = int(dead.sum())
        chosen = residual[:, order[torch.arange(count, device=order.device) % order.numel()]]
        fallback = torch.eye(target.shape[0], dtype=target.dtype, device=target.device)
        lost = chosen.norm(dim=0) < 1e-12
        chosen[:, lost] = fallback[:, torch.arange(int(lost.sum()), device=order.device) % target.shape[0]]
        dictionary = dictionary.clone()
        dictionary[:, dead] = chosen
    return dictionary


MARGIN = 1.05
"""On the estimate of ‖DᵀD‖₂, which power iteration approaches from below."""


def lipschitz_bound(gram: Tensor, vector: Tensor | None = None, iterations: int = 8) -> tuple[float, Tensor]:
    """Upper bound on ‖DᵀD‖₂, which determines the step size.

    Args:
        gram: DᵀD (k, k).
        vector: (k,) leading vector of the last round; None: a fixed random one.
        iterations: of the power method.

    Returns:
        the bound, and the vector to start the next estimate from.
    """
    vector = leading_vector(gram, vector, iterations)
    return MARGIN * float(vector @ (gram @ vector)), vector


LEAST_MOMENTUM = 0.5
"""Smallest momentum. Nesterov's starts at zero; from a warm start, 0.5 from the first step on saves two thirds of the
rounds (measured on a trained model). 0.8 diverges, because the constraint set is not convex."""


EXCESS, TIGHT_SHARE, FREE_SHARE = 0.25, 0.65, 0.25
"""The first round keeps a quarter more non-zeros than the pattern allows; the excess shrinks to zero over 65 % of the
rounds. During the first quarter of the rounds non-zeros may lie anywhere. On a trained model this gave 2 % (square
matrices) to 6 % (wide ones) less error than the final number from the start with free places for half the rounds."""


def tightening(number: int, rounds: int, atoms: int, nonzeros: int, pattern: str) -> tuple[str, int]:
    """Pattern and non-zeros per column in a given round; from 65 % of the rounds on, those asked for.

    Args:
        number: of the round, from 0.
        rounds: total.
        atoms: k.
        nonzeros: s, for ``"free"``.
        pattern: ``"free"`` or ``"n:m"``.
    """
    done = min(1.0, number / (TIGHT_SHARE * (rounds - 1))) if rounds > 1 else 1.0
    share = 1 + EXCESS * (1 - done)
    balanced = parse_pattern(pattern)
    if balanced is None:
        return pattern, min(atoms, round(nonzeros * share))
    n, m = balanced
    n = min(m, round(n * share))
    return f"{n}:{m}", balanced_nonzeros(atoms, n, m)


def gradient_steps(
    codes: Tensor,
    gram: Tensor,
    right: Tensor,
    lipschitz: float,
    steps: int,
    nonzeros: int,
    pattern: str,
    before: Tensor | None = None,
) -> Tensor:
    """Accelerated projected gradient descent on ½‖Y − D Cᵀ‖² over codes of a given pattern.

    Args:
        codes: C (n, k) to start from.
        gram: DᵀD (k, k).
        right: YᵀD (n, k).
        lipschitz: at least ‖DᵀD‖₂.
        steps: number of gradient steps.
        nonzeros: per row; ignored for ``"n:m"``.
        pattern: see `cospadi.format.patterns`.
        before: the codes of the previous round; the first step continues in the direction of that change. None: it does
            not.

    Returns:
        C (n, k) with the pattern.
    """
    previous, momentum = codes, 1.0
    ahead = codes if before is None else codes + LEAST_MOMENTUM * (codes - before)
    for _ in range(steps):
        moved = torch.addmm(ahead, ahead, gram, alpha=-1 / lipschitz).add_(right, alpha=1 / lipschitz)
        codes = moved * keep_largest(moved, nonzeros, pattern, dim=1)
        following = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
        ahead = codes + max((momentum - 1) / following, LEAST_MOMENTUM) * (codes - previous)
        previous, momentum = codes, following
    return codes


def order_by_use(codes: Tensor, m: int) -> Tensor:
    """An order of atoms in which every run of m atoms is used about equally (snake order).

    Args:
        codes: (n, k).
        m: length of a run.

    Returns:
        int64 (k,), the old index at each new place.
    """
    k = codes.shape[1]
    use = (codes != 0).sum(0)
    ranked = use.argsort(descending=True, stable=True)
    runs = max(1, k // m)
    place = torch.arange(k, device=codes.device)
    lap, at = place // runs, place % runs
    run = torch.where(lap % 2 == 0, at, runs - 1 - at)
    run = torch.where(place < runs * m, run, runs)
    return ranked[(run * k + place).argsort(stable=True)]


def pursuit(
    target: Tensor,
    atoms: int,
    nonzeros: int,
    *,
    pattern: str = "free",
    rounds: int = 20,
    steps: int = 5,
    polish: int = 8,
    seed: int = 0,
    start: Tensor | None = None,
) -> PursuitResult:
    """Sparse dictionary learning by alternating hard-thresholding pursuit and least squares.

    Args:
        target: Y (d, n), float32 or float64; whitened weights.
        atoms: k, may exceed d.
        nonzeros: s per column of S; for ``"n:m"`` the pattern determines it.
        pattern: where non-zeros may lie.
        rounds: alternations of codes and dictionary.
        steps: gradient steps on S per round.
        polish: conjugate-gradient steps on the final support, before and after the last dictionary update.
        seed: of the atoms beyond d.
        start: dictionary (d, k) to start from; None: :func:`initial_dictionary`.

    Returns:
        factors with unit-norm atoms.
    """
    balanced = parse_pattern(pattern)
    energy = float((target.double() ** 2).sum()) or 1.0
    generator = torch.Generator().manual_seed(seed)
    dictionary = initial_dictionary(target, atoms, generator) if start is None else start
    vector = torch.randn(dictionary.shape[1], generator=generator).to(target)
    codes = torch.zeros(target.shape[1], dictionary.shape[1], dtype=target.dtype, device=target.device)
    before = codes
    losses: list[float] = []
    # Balanced runs are formed once it is known how often atoms are used.
    settled = 0 if balanced is None else int(FREE_SHARE * rounds)
    for number in range(rounds):
        current, count = tightening(number, rounds, atoms, nonzeros, pattern)
        if number < settled:
            current = "free"
        if balanced is not None and number == settled and number > 0:
            order = order_by_use(codes, balanced[1])
            dictionary, codes, before = dictionary[:, order].contiguous(), codes[:, order], before[:, order]
            vector = vector[order]
        gram = dictionary.T @ dictionary
        right = target.T @ dictionary
        if number == 0:
            codes = right * keep_largest(right, count, current, dim=1)
        lipschitz, vector = lipschitz_bound(gram, vector)
        travelling = len(losses) > 1 and losses[-1] <= losses[-2]  # after an overshoot, restart without momentum
        started = codes
        codes = gradient_steps(codes, gram, right, lipschitz, steps, count, current, before if travelling else None)
        if number == rounds - 1:
            mask = keep_largest(codes, count, current, dim=1)
            codes = restricted_least_squares(gram, right, codes * mask, mask, iterations=polish, dim=1)
        dictionary = least_squares_dictionary(target, codes.T, dtype=target.dtype)
        dictionary = _revive(dictionary, codes, target)
        norms = dictionary.norm(dim=0).clamp_min(1e-30)
        dictionary, codes, before = dictionary / norms, codes * norms, started * norms
        losses.append(float(((target - dictionary @ codes.T).double() ** 2).sum()) / energy)
    mask = keep_largest(codes, nonzeros if balanced is None else 0, pattern, dim=1)
    gram, right = dictionary.T @ dictionary, target.T @ dictionary
    codes = restricted_least_squares(gram, right, codes * mask, mask, iterations=polish, dim=1)
    losses.append(float(((target - dictionary @ codes.T).double() ** 2).sum()) / energy)
    return PursuitResult(dictionary, codes.T, mask.T, losses)
