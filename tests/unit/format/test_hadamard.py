"""The Walsh–Hadamard transform in blocks."""

import pytest
import torch

from cospadi.format.hadamard import block_sizes, hadamard


@pytest.mark.parametrize(
    ("n", "block", "sizes"),
    [
        (576, 128, [128, 128, 128, 128, 64]),
        (84, 128, [64, 16, 4]),
        (84, 64, [64, 16, 4]),
        (128, 128, [128]),
        (7, 2, [2, 2, 2, 1]),
        (1, 128, [1]),
        (3, 1, [1, 1, 1]),
        (0, 128, []),
    ],
)
def test_blocks_cover_every_entry(n: int, block: int, sizes: list[int]) -> None:
    assert block_sizes(n, block) == sizes


@pytest.mark.parametrize("block", [0, -2, 3, 96])
def test_a_block_that_is_no_power_of_two_is_refused(block: int) -> None:
    with pytest.raises(ValueError, match="power of two"):
        block_sizes(100, block)


def _matrix(n: int, block: int) -> torch.Tensor:
    """B from its definition: entry (i, j) of a block of b is (−1)^(number of common bits of i and j) / √b."""
    blocks = []
    for size in block_sizes(n, block):
        signs = [[(-1.0) ** (i & j).bit_count() for j in range(size)] for i in range(size)]
        blocks.append(torch.tensor(signs, dtype=torch.float64) / size**0.5)
    return torch.block_diag(*blocks)


@pytest.mark.parametrize(("n", "block"), [(128, 128), (84, 128), (84, 16), (37, 8), (1, 128), (5, 1)])
def test_the_transform_is_the_product_with_the_matrix_and_its_own_inverse(n: int, block: int) -> None:
    x = torch.randn(3, 2, n, dtype=torch.float64)
    y = hadamard(x, block)
    torch.testing.assert_close(y, x @ _matrix(n, block))
    torch.testing.assert_close(hadamard(y, block), x)


def test_no_rows_and_no_columns() -> None:
    assert hadamard(torch.empty(0, 12), 8).shape == (0, 12)
    assert hadamard(torch.empty(4, 0), 8).shape == (4, 0)


def test_autocast_does_not_touch_it() -> None:
    x = torch.randn(4, 84)
    with torch.autocast("cpu", torch.bfloat16):
        y = hadamard(x, 64)
    assert torch.equal(y, hadamard(x, 64))


def test_gradient() -> None:
    x = torch.randn(2, 13, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: hadamard(t, 8), (x,))
