"""Batched orthogonal matching pursuit against scikit-learn and on awkward dictionaries."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import orthogonal_mp_gram

from cospadi.solvers import omp
from cospadi.solvers.omp import batch_omp, exact_matmul


def problem(d, k, n, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    dictionary = torch.randn(d, k, generator=generator, dtype=torch.float64)
    target = torch.randn(d, n, generator=generator, dtype=torch.float64)
    return (dictionary / dictionary.norm(dim=0)).to(dtype), target.to(dtype)


@pytest.mark.parametrize(
    ("d", "k", "n", "s"), [(20, 31, 17, 7), (40, 25, 9, 13), (16, 16, 5, 1), (30, 64, 11, 30), (50, 20, 6, 20)]
)
def test_equals_scikit_learn(d, k, n, s):
    dictionary, target = problem(d, k, n, seed=d + k)
    codes = batch_omp(dictionary, target, s)
    gram, products = (dictionary.T @ dictionary).numpy(), (dictionary.T @ target).numpy()
    expected = np.stack([orthogonal_mp_gram(gram, products[:, j], n_nonzero_coefs=s) for j in range(n)], axis=1)
    assert ((codes.numpy() != 0) == (expected != 0)).all()
    np.testing.assert_allclose(codes.numpy(), expected, rtol=1e-8, atol=1e-9)


def test_batches_do_not_matter(monkeypatch):
    dictionary, target = problem(24, 36, 23, seed=1)
    whole = batch_omp(dictionary, target, 9)
    torch.testing.assert_close(batch_omp(dictionary, target, 9, batch=5), whole)
    monkeypatch.setattr(omp, "_CPU_BYTES", 1)
    torch.testing.assert_close(batch_omp(dictionary, target, 9), whole)


def test_float32_reaches_the_error_of_float64():
    dictionary, target = problem(96, 128, 40, seed=2)
    wide = batch_omp(dictionary, target, 64)
    narrow = batch_omp(dictionary.float(), target.float(), 64).double()
    error = [float((target - dictionary @ codes).square().sum()) for codes in (wide, narrow)]
    assert error[1] == pytest.approx(error[0], rel=0.02)


def test_duplicate_atoms_are_passed_over():
    dictionary, target = problem(12, 6, 8, seed=3)
    dictionary = torch.cat([dictionary, dictionary, -dictionary], dim=1)
    codes = batch_omp(dictionary, target, 6)
    # the six independent atoms, in whichever copy, give the projection onto their span
    best = dictionary[:, :6] @ torch.linalg.lstsq(dictionary[:, :6], target).solution
    torch.testing.assert_close(dictionary @ codes, best)
    assert (codes.view(3, 6, 8) != 0).sum(0).eq(1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_more_nonzeros_than_rank(dtype):
    dictionary, target = problem(5, 14, 7, seed=4, dtype=dtype)
    codes = batch_omp(dictionary, target, 9)
    assert codes.isfinite().all()
    assert ((codes != 0).sum(0) == 5).all()
    torch.testing.assert_close(dictionary @ codes, target, rtol=1e-3, atol=1e-3)


def test_zero_column_gives_zero_codes():
    dictionary, target = problem(10, 15, 3, seed=5)
    target[:, 1] = 0
    codes = batch_omp(dictionary, target, 4)
    assert (codes[:, 1] == 0).all()
    assert ((codes[:, [0, 2]] != 0).sum(0) == 4).all()


@pytest.mark.parametrize("s", [0, 16])
def test_impossible_number_of_nonzeros(s):
    dictionary, target = problem(10, 15, 3, seed=6)
    with pytest.raises(ValueError, match=f"cannot choose {s} of 15 atoms"):
        batch_omp(dictionary, target, s)


def test_leaves_inputs_alone():
    dictionary, target = problem(10, 15, 3, seed=7, dtype=torch.float32)
    copies = dictionary.clone(), target.clone()
    batch_omp(dictionary, target, 4)
    assert torch.equal(dictionary, copies[0]) and torch.equal(target, copies[1])


def test_exact_matmul_restores_the_setting_even_after_an_error():
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        with pytest.raises(KeyError), exact_matmul():
            assert torch.backends.cuda.matmul.fp32_precision == "ieee"
            raise KeyError
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
