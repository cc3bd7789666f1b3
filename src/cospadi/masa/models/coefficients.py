"""Coefficients of matrix atoms: the small network that produces them in training, and the weight that they make.

MASA (arXiv 2508.04581): W_l = Σ_s c_ls A_s. In training, c_l is the output of a three-layer perceptron, shared by all
blocks, for a trainable embedding of block l. Afterwards only the table C (layers, atoms) is needed.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import initialization as init

STARTS = ("network", "spread")
"""Initial coefficients: the output of a random network, or coefficients that differ as much as possible per block."""
ROUNDS = 100
"""Iterations of `spread_rows`, after which the frame is tight to 1e-3, mostly to far less."""


class CoefficientNetwork(nn.Module):
    """One embedding per block and a three-layer perceptron that all blocks share: c_l = MLP(e_l).

    The activation is ReLU. Without biases, as at initialisation, the perceptron is positively homogeneous, so an
    embedding can be scaled to give coefficients of exactly unit norm (see `initialise`).

    Optimizers of the Adam family move every parameter by about the learning rate. A coefficient depends on thousands of
    parameters, which tend to move it in the same direction, and it scales a whole matrix: on the digits of
    examples/masa the coefficients changed by up to 8 % in one step. With a rate below 1 the parameters are stored
    divided by the rate. The function and its initial values are the same, but steps are smaller in proportion, as in
    StyleGAN's mapping network (arXiv 1812.04948), for the same reason.

    Args:
        layers: L, the number of blocks.
        atoms: S, the number of coefficients per block.
        embedding_size: width of an embedding.
        hidden_size: width of both hidden layers.
        rate: effective factor on the learning rate of an optimizer of the Adam family; weight decay is unchanged.
        start: one of `STARTS`.
    """

    def __init__(
        self,
        layers: int,
        atoms: int,
        embedding_size: int,
        hidden_size: int,
        *,
        rate: float = 1.0,
        start: str = "network",
    ) -> None:
        super().__init__()
        self.rate, self.start = rate, start
        # Parameters of this module itself, because transformers does not initialise a module without its own.
        self.embedding = nn.Parameter(torch.empty(layers, embedding_size))
        self.first_weight = nn.Parameter(torch.empty(hidden_size, embedding_size))
        self.first_bias = nn.Parameter(torch.empty(hidden_size))
        self.second_weight = nn.Parameter(torch.empty(hidden_size, hidden_size))
        self.second_bias = nn.Parameter(torch.empty(hidden_size))
        self.last_weight = nn.Parameter(torch.empty(atoms, hidden_size))
        self.last_bias = nn.Parameter(torch.empty(atoms))

    def forward(self, layer: int) -> Tensor:
        """Coefficients of one block.

        Args:
            layer: index of the block.

        Returns:
            (atoms,), in the dtype of the parameters.
        """
        return self._perceptron(self.embedding[layer])

    def all_layers(self) -> Tensor:
        """Coefficients of all blocks (layers, atoms) in one pass; their rounding differs from that of `forward`."""
        return self._perceptron(self.embedding)

    def _perceptron(self, embedding: Tensor) -> Tensor:
        return self._linear(self._hidden(embedding), self.last_weight, self.last_bias)

    def _hidden(self, embedding: Tensor) -> Tensor:
        hidden = functional.relu(self._linear(self._used(embedding), self.first_weight, self.first_bias))
        return functional.relu(self._linear(hidden, self.second_weight, self.second_bias))

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return functional.linear(x, self._used(weight), self._used(bias))

    def _used(self, stored: Tensor) -> Tensor:
        return stored if self.rate == 1 else stored * self.rate

    def table(self) -> Tensor:
        """Coefficients of all blocks (layers, atoms), exactly those of `forward`."""
        return torch.stack([self(layer) for layer in range(len(self.embedding))])

    @torch.no_grad()
    def initialise(self) -> None:
        """Draw random weights and embeddings such that ‖c_l‖ = 1 for every block.

        After two ReLU layers the hidden units of all blocks are alike, and so are the coefficients from a random last
        layer (start "network"). For "spread" the last layer is the one of least norm that yields `spread_rows`; with
        more blocks than hidden units it is the least-squares solution.

        If the entries of the atoms are independent with variance σ², those of W_l have variance ‖c_l‖² σ² = σ², like
        the entries of a dense layer. Does nothing if a parameter was read from a checkpoint.
        """
        if any(getattr(parameter, "_is_hf_initialized", False) for parameter in self.parameters()):
            return
        for weight in (self.first_weight, self.second_weight, self.last_weight):
            init.normal_(weight, std=math.sqrt(2 / weight.shape[1]) / self.rate)
        for bias in (self.first_bias, self.second_bias, self.last_bias):
            init.zeros_(bias)
        init.normal_(self.embedding, std=1 / self.rate)
        if self.start == "spread":
            inverse = torch.linalg.pinv(self._hidden(self.embedding).double())
            wanted = spread_rows(len(self.embedding), len(self.last_weight)).to(inverse)
            self.last_weight.copy_((inverse @ wanted).T / self.rate)
        self.embedding.div_(self.table().norm(dim=1, keepdim=True).clamp_min(1e-6))


def spread_rows(count: int, width: int) -> Tensor:
    """Random unit rows whose directions differ as much as possible: a tight frame.

    Args:
        count: number of rows.
        width: of a row; if `width` equals `count`, the rows are orthogonal.

    Returns:
        (count, width), float64; if `count` ≥ `width`, the columns are orthogonal and of equal norm.
    """
    rows = torch.randn(count, width, dtype=torch.float64)
    for _ in range(ROUNDS):  # alternate between equal singular values and rows of unit norm
        left, _, right = torch.linalg.svd(rows, full_matrices=False)
        rows = left @ right
        rows = rows / rows.norm(dim=1, keepdim=True)
    return rows


def compose(coefficients: Tensor, atoms: Tensor) -> Tensor:
    """The weight Σ_s c_s A_s (arXiv 2508.04581).

    Args:
        coefficients: (S,) of one layer, or (L, S) of all layers.
        atoms: (S, d_out, d_in).

    Returns:
        (d_out, d_in) or (L, d_out, d_in), in the dtype of the atoms.
    """
    weight: Tensor = torch.tensordot(coefficients.to(atoms.dtype), atoms, 1)
    return weight
