"""Matrix PCA against the explicit principal components of the flattened matrices."""

import pytest
import torch

from cospadi.masa.retrofit.matrix_pca import inner_products, matrix_pca, mix, principal_mixtures


def matrices(count, shape=(7, 5), seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(shape, generator=generator, dtype=torch.float64)
    return [(common + torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype) for _ in range(count)]


def gram(size, seed=1):
    x = torch.randn(3 * size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.T @ x / len(x)


@pytest.mark.parametrize("rows", [3, 256, 300])
def test_inner_products(rows):
    weights = matrices(4, (rows, 3), seed=rows)
    flat = torch.stack([w.flatten() for w in weights])
    torch.testing.assert_close(inner_products(weights), flat @ flat.T, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rows", [6, 300])
def test_inner_products_under_a_gram(rows):
    weights, g = matrices(3, (rows, 4)), gram(rows)
    expected = torch.stack([torch.stack([torch.trace(a.T @ g @ b) for b in weights]) for a in weights])
    torch.testing.assert_close(inner_products(weights, g), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("atoms", [1, 2, 4])
def test_principal_components_of_the_flattened_matrices(atoms):
    weights = matrices(5)
    found, coefficients = matrix_pca(weights, atoms)
    flat = torch.stack([w.flatten() for w in weights])
    _, values, directions = torch.linalg.svd(flat, full_matrices=False)
    explicit = flat @ directions[:atoms].T @ directions[:atoms]
    rebuilt = torch.einsum("ls,sij->lij", coefficients, found).flatten(1)
    torch.testing.assert_close(rebuilt, explicit, rtol=1e-10, atol=1e-10)
    missed = float((flat - rebuilt).square().sum())
    assert missed == pytest.approx(float(values[atoms:].square().sum()), rel=1e-10)


@pytest.mark.parametrize("atoms", [1, 3, 6])
def test_atoms_are_orthonormal_and_coefficients_their_inner_products(atoms):
    weights = matrices(6, seed=3)
    found, coefficients = matrix_pca(weights, atoms)
    assert found.dtype == coefficients.dtype == torch.float64 and found.shape == (atoms, 7, 5)
    torch.testing.assert_close(inner_products(list(found)), torch.eye(atoms, dtype=torch.float64), rtol=0, atol=1e-12)
    for layer, weight in enumerate(weights):
        for index, atom in enumerate(found):
            assert float(coefficients[layer, index]) == pytest.approx(float(torch.trace(atom.T @ weight)), abs=1e-11)


def test_first_atoms_do_not_depend_on_how_many_there_are():
    weights = matrices(5, seed=4)
    few, many = matrix_pca(weights, 2)[0], matrix_pca(weights, 5)[0]
    torch.testing.assert_close(few, many[:2], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_exact_with_as_many_atoms_as_layers(dtype):
    weights = matrices(6, (9, 4), seed=5, dtype=dtype)
    atoms, coefficients = matrix_pca(weights, 6)
    rebuilt = torch.einsum("ls,sij->lij", coefficients, atoms)
    torch.testing.assert_close(rebuilt, torch.stack(weights).double(), rtol=0, atol=1e-11)


def test_nearly_dependent_matrices_still_give_orthonormal_atoms():
    first, second, third = matrices(3, (20, 20), seed=6)
    weights = [first, first + 1e-4 * second, first - 1e-4 * third]
    atoms, coefficients = matrix_pca(weights, 3)
    assert len(atoms) == 3
    # eigenvalues that differ by 1e8 magnify the rounding of K by as much
    torch.testing.assert_close(inner_products(list(atoms)), torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-6)
    rebuilt = torch.einsum("ls,sij->lij", coefficients, atoms)
    torch.testing.assert_close(rebuilt, torch.stack(weights), rtol=0, atol=1e-9)


def test_dependent_matrices_give_fewer_atoms_and_are_still_exact():
    first, second = matrices(2, seed=7)
    weights = [first, second, first - 2 * second, first]
    atoms, coefficients = matrix_pca(weights, 4)
    assert len(atoms) == 2
    torch.testing.assert_close(
        torch.einsum("ls,sij->lij", coefficients, atoms), torch.stack(weights), rtol=0, atol=1e-11
    )


def test_zero_matrices_have_no_atoms():
    atoms, coefficients = matrix_pca([torch.zeros(3, 2)] * 3, 2)
    assert atoms.shape == (0, 3, 2) and coefficients.shape == (3, 0)


def test_orthonormal_in_the_inner_product_given():
    weights, g = matrices(4, seed=8), gram(7)
    products = inner_products(weights, g)
    mixtures = principal_mixtures(products)
    atoms = [mix(weights, column) for column in mixtures.T]
    torch.testing.assert_close(inner_products(atoms, g), torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-11)


def test_bad_input():
    with pytest.raises(ValueError, match="unequal shapes"):
        inner_products([torch.ones(2, 3), torch.ones(3, 2)])
    for atoms in (-1, 4):
        with pytest.raises(ValueError, match=f"{atoms} atoms of 3 matrices"):
            matrix_pca(matrices(3), atoms)
