"""K-SVD: each rank-1 update is a rank-1 update, errors never rise, and the state stays valid."""

from itertools import pairwise

import pytest
import torch

from cospadi.solvers.ksvd import AtomSweep, ksvd, random_atoms
from cospadi.solvers.mod import least_squares_dictionary, unit_atoms
from cospadi.solvers.omp import batch_omp


def matrix(d, n, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(d, d, generator=generator, dtype=torch.float64) * torch.logspace(0, -1, d)
    return (left @ torch.randn(d, n, generator=generator, dtype=torch.float64)).to(dtype)


def loss(target, dictionary, codes):
    return float((target - dictionary @ codes).square().sum())


def reference_sweep(target, dictionary, codes, iterations):
    """The update as the paper writes it: error on the support, by index, one atom after the other."""
    dictionary, codes = dictionary.clone(), codes.clone()
    for atom in range(dictionary.shape[1]):
        support = codes[atom].nonzero().squeeze(1)
        if not len(support):
            continue
        others = [i for i in range(dictionary.shape[1]) if i != atom]
        error = target[:, support] - dictionary[:, others] @ codes[others][:, support]
        u = dictionary[:, atom]
        for _ in range(iterations):
            u = error @ (error.T @ u)
            u = u / u.norm()
        dictionary[:, atom], codes[atom, support] = u, error.T @ u
    return dictionary, codes


def test_sweep_equals_the_papers_update():
    target = matrix(18, 33, seed=0)
    dictionary = random_atoms(target, 21, seed=1)
    codes = batch_omp(dictionary, target, 6)
    codes[4] = 0
    new, coefficients, error = AtomSweep(target, 21, 5)(target, dictionary, codes)
    expected = reference_sweep(target, dictionary, codes, 5)
    torch.testing.assert_close(new, expected[0])
    torch.testing.assert_close(coefficients, expected[1])
    assert float(error) == pytest.approx(loss(target, new, coefficients))


@pytest.mark.parametrize("iterations", [1, 8])
def test_updates_never_raise_the_error(iterations):
    target = matrix(24, 40, seed=2)
    dictionary = random_atoms(target, 30, seed=3)
    codes = batch_omp(dictionary, target, 7)
    sweep = AtomSweep(target, 30, iterations)
    errors = [loss(target, dictionary, codes)]
    for _ in range(4):
        support = codes != 0
        dictionary, codes, error = sweep(target, dictionary, codes)
        errors.append(float(error))
        assert ((codes != 0) <= support).all()
        torch.testing.assert_close(dictionary.norm(dim=0), torch.ones(30, dtype=torch.float64))
    assert all(later < earlier * (1 + 1e-12) for earlier, later in pairwise(errors))
    assert errors[-1] < 0.9 * errors[0]


def test_many_iterations_reach_the_leading_singular_pair():
    target = matrix(15, 22, seed=4)
    dictionary, codes = random_atoms(target, 1, seed=5), torch.ones(1, 22, dtype=torch.float64)
    new, _, error = AtomSweep(target, 1, 400)(target, dictionary, codes)
    u, s, _ = torch.linalg.svd(target)
    assert abs(float(u[:, 0] @ new[:, 0])) == pytest.approx(1, abs=1e-9)
    assert float(error) == pytest.approx(float(s[1:].square().sum()))


def test_unused_atoms_and_zero_columns_stay_valid():
    target = matrix(12, 20, seed=6)
    target[:, 7] = 0
    dictionary = random_atoms(target, 16, seed=7)
    codes = batch_omp(dictionary, target, 3)
    codes[[2, 9]] = 0
    new, coefficients, _ = AtomSweep(target, 16, 8)(target, dictionary, codes)
    torch.testing.assert_close(new[:, [2, 9]], dictionary[:, [2, 9]], rtol=0, atol=0)
    assert new.isfinite().all() and coefficients.isfinite().all()
    assert (coefficients[:, 7] == 0).all()


def test_float32_sweep_follows_float64():
    target = matrix(48, 80, seed=8)
    dictionary = random_atoms(target, 40, seed=9)
    codes = batch_omp(dictionary, target, 10)
    wide = AtomSweep(target, 40, 8)(target, dictionary, codes)
    narrow = AtomSweep(target.float(), 40, 8)(target.float(), dictionary.float(), codes.float())
    for one, other in zip(wide, narrow, strict=True):
        torch.testing.assert_close(one, other.double(), rtol=1e-3, atol=1e-3)


def test_float32_reaches_the_error_of_float64():
    target = matrix(48, 80, seed=8)
    losses = [ksvd(target.to(dtype), 40, 10, rounds=6, seed=9)[2] for dtype in (torch.float32, torch.float64)]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)  # near-ties are decided by rounding, no closer


@pytest.mark.parametrize("update", ["ksvd", "mod"])
def test_ksvd_learns(update):
    target = matrix(32, 70, seed=10)
    dictionary, codes, losses = ksvd(target, 36, 6, rounds=8, seed=11, update=update)
    assert losses[-1] == pytest.approx(loss(target, dictionary, codes))
    assert len(losses) == 8
    untrained = random_atoms(target, 36, seed=11)
    assert losses[-1] < 0.7 * loss(target, untrained, batch_omp(untrained, target, 6))
    torch.testing.assert_close(dictionary.norm(dim=0), torch.ones(36, dtype=torch.float64))
    assert ((codes != 0).sum(0) <= 6).all()


def test_recovers_a_planted_dictionary():
    generator = torch.Generator().manual_seed(12)
    planted = torch.randn(20, 24, generator=generator, dtype=torch.float64)
    planted /= planted.norm(dim=0)
    codes = torch.zeros(24, 600, dtype=torch.float64)
    for column in range(600):
        codes[torch.randperm(24, generator=generator)[:2], column] = torch.randn(2, generator=generator).double()
    learnt, _, losses = ksvd(planted @ codes, 24, 2, rounds=40, seed=13)
    assert losses[-1] < 0.1 * losses[0]
    assert ((planted.T @ learnt).abs().amax(1) > 0.99).double().mean() > 0.8


def test_tolerance_stops_and_zero_does_not():
    target = matrix(16, 30, seed=14)
    assert len(ksvd(target, 12, 3, rounds=7, seed=0)[2]) == 7
    stopped = ksvd(target, 12, 3, rounds=50, tolerance=0.02, seed=0)[2]
    assert 1 < len(stopped) < 50
    assert stopped[-2] - stopped[-1] < 0.02 * stopped[-2]


def test_initial_atoms():
    target = matrix(9, 6, seed=15)
    target[:, 3] = 0
    atoms = random_atoms(target, 10, seed=16)
    torch.testing.assert_close(atoms.norm(dim=0), torch.ones(10, dtype=torch.float64))
    cosines = (atoms.T @ (target / target.norm(dim=0).clamp_min(1e-30))).abs()
    assert ((cosines > 1 - 1e-9).sum(0) == torch.tensor([1, 1, 1, 0, 1, 1])).all()
    assert torch.equal(atoms, random_atoms(target, 10, seed=16))
    assert not torch.equal(atoms, random_atoms(target, 10, seed=17))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_captured_updates_equal_eager_ones():
    target = matrix(40, 70, seed=20)
    dictionary = random_atoms(target, 50, seed=21)
    codes = batch_omp(dictionary, target, 9)
    codes[[0, 7]] = 0
    on_device = [x.cuda() for x in (target, dictionary, codes)]
    torch.testing.assert_close(batch_omp(on_device[1], on_device[0], 9)[1:7].cpu(), codes[1:7])
    eager, captured = AtomSweep(target, 50, 8), AtomSweep(on_device[0], 50, 8)
    for _ in range(2):  # the graph serves every pass
        for one, other in zip(eager(target, dictionary, codes), captured(*on_device), strict=True):
            torch.testing.assert_close(one, other.cpu(), rtol=1e-8, atol=1e-8)


def test_wrong_update():
    with pytest.raises(ValueError, match="'ksvd' or 'mod'"):
        ksvd(matrix(4, 5, seed=0), 3, 1, update="svd")


def test_mod_is_least_squares_and_keeps_unused_atoms():
    target = matrix(14, 50, seed=18)
    dictionary = random_atoms(target, 10, seed=19)
    codes = batch_omp(dictionary, target, 4)
    codes[6] = 0
    new = least_squares_dictionary(target, codes, fallback=dictionary, ridge=1e-13)
    used = [i for i in range(10) if i != 6]
    torch.testing.assert_close(new[:, used], torch.linalg.lstsq(codes[used].T, target.T).solution.T)
    assert torch.equal(new[:, 6], dictionary[:, 6])
    scaled, inverse = unit_atoms(new, codes)
    torch.testing.assert_close(scaled @ inverse, new @ codes)
