"""Projections whose weights are made of matrices shared by all layers, and how they replace those of a model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import initialization as init

from cospadi.errors import ModelError
from cospadi.layers import is_dense_linear
from cospadi.masa.models.coefficients import CoefficientNetwork, compose, spread_rows
from cospadi.masa.models.configuration import SharedAttentionConfig, assignment


class SharedMatrices(nn.Module):
    """The shared matrices of one projection type, for all layers.

    Parameters: ``atoms`` (S, d_out, d_in); for MASA also either ``network`` (in training) or ``coefficients`` (L, S).

    Args:
        shape: (d_out, d_in).
        config: of the model.
    """

    def __init__(self, shape: tuple[int, int], config: SharedAttentionConfig) -> None:
        super().__init__()
        layers, atoms = config.num_hidden_layers, config.num_atoms or 1
        self.assignment, self.start = assignment(config), config.coefficient_start
        self.stacked: tuple[Tensor, ...] | None = None  # while `composed_together` is active
        self.atoms = nn.Parameter(torch.empty(atoms, *shape))
        self.network: CoefficientNetwork | None = None
        self.coefficients: nn.Parameter | None = None
        if self.assignment is not None:
            return
        if config.folded:
            self.coefficients = nn.Parameter(torch.empty(layers, atoms))
        else:
            sizes = config.coefficient_embedding_size, config.coefficient_hidden_size
            rate, start = config.coefficient_rate, config.coefficient_start
            self.network = CoefficientNetwork(layers, atoms, *sizes, rate=rate, start=start)

    def forward(self, layer: int) -> Tensor:
        """The weight of one layer.

        Args:
            layer: index of the layer.

        Returns:
            (d_out, d_in), in the dtype of the atoms even under autocast, because coefficients rounded to 16 bits would
            change whole matrices.
        """
        if self.stacked is not None:
            return self.stacked[layer]
        if self.assignment is not None:
            return self.atoms[self.assignment[layer]]
        with torch.autocast(self.atoms.device.type, enabled=False) if self._autocast() else nullcontext():
            return compose(self.of_layer(layer), self.atoms)

    def _autocast(self) -> bool:
        kind = self.atoms.device.type
        return kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind)

    def weights(self) -> tuple[Tensor, ...]:
        """The weights of all layers at once: one product, and one gradient of the atoms, instead of L.

        Returns:
            L weights (d_out, d_in), equal to those of `forward` up to rounding. Under autocast they have its dtype and
            are rounded once, after the sum.
        """
        kind, active = self.atoms.device.type, self._autocast()
        with torch.autocast(kind, enabled=False) if active else nullcontext():
            if self.assignment is None:
                table = self.coefficients if self.network is None else self.network.all_layers()
                assert table is not None
                together = compose(table, self.atoms)
            else:
                together = self.atoms
            if active and together.dtype != torch.float64:  # autocast does not change float64
                together = together.to(torch.get_autocast_dtype(kind))
            # unbound rather than indexed: the gradient of each index would be as large as the whole
            parts = together.unbind(0)
        return parts if self.assignment is None else tuple(parts[which] for which in self.assignment)

    def of_layer(self, layer: int) -> Tensor:
        """Coefficients (S,) of one layer."""
        if self.network is not None:
            output: Tensor = self.network(layer)
            return output
        assert self.coefficients is not None
        return self.coefficients[layer]

    @torch.no_grad()
    def fold(self) -> None:
        """Replace the network by plain coefficients. The weights stay the same bit for bit."""
        if self.network is None:
            return
        self.coefficients = nn.Parameter(self.network.table())
        self.network = None

    @torch.no_grad()
    def initialise(self, std: float) -> None:
        """Initialise atoms like a dense layer, and plain coefficients with unit norm."""
        init.normal_(self.atoms, std=std)
        if self.coefficients is not None and not getattr(self.coefficients, "_is_hf_initialized", False):
            init.normal_(self.coefficients)
            if self.start == "spread":
                self.coefficients.copy_(spread_rows(*self.coefficients.shape))
            self.coefficients.div_(self.coefficients.norm(dim=1, keepdim=True))

    def extra_repr(self) -> str:
        """Sizes in one line."""
        return f"atoms={tuple(self.atoms.shape)}, folded={self.network is None}"


class SharedProjection(nn.Module):
    """A linear layer whose weight is made of shared matrices; only a bias, if any, is its own.

    Args:
        matrices: of its projection type; not registered as a submodule, so that they are stored once.
        layer: index of its layer.
        bias: its bias (d_out,), or None.
    """

    bias: nn.Parameter | None
    composed: Tensor | None

    def __init__(self, matrices: SharedMatrices, layer: int, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = matrices.atoms.shape[1:]
        self.layer = layer
        self._matrices = (matrices,)
        self.register_parameter("bias", bias)
        self.register_buffer("composed", None, persistent=False)

    @property
    def matrices(self) -> SharedMatrices:
        """The shared matrices that make the weight."""
        return self._matrices[0]

    @property
    def weight(self) -> Tensor:
        """(d_out, d_in), composed at every access unless `compose` was called."""
        # called as a module, so that the hooks that load offloaded parameters run
        return self.matrices(self.layer) if self.composed is None else self.composed

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to x (…, d_in); returns (…, d_out)."""
        return functional.linear(x, self.weight.to(x.device), self.bias)

    @torch.no_grad()
    def compose(self) -> None:
        """Compose the weight once and keep it. Matrices that are used unchanged stay shared."""
        if self.matrices.assignment is None:
            self.composed = self.matrices(self.layer)

    def release(self) -> None:
        """Undo `compose`: compose the weight at every access again."""
        self.composed = None

    def train(self, mode: bool = True) -> SharedProjection:
        """Set training mode, in which a composed weight would go stale and is therefore released."""
        if mode:
            self.release()
        return super().train(mode)

    def extra_repr(self) -> str:
        """Sizes in one line."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class LowRankProjection(nn.Module):
    """A linear layer of rank r: y = U V x + b.

    Args:
        d_in: inputs.
        d_out: outputs.
        rank: r.
        bias: its bias (d_out,), or None.
    """

    bias: nn.Parameter | None

    def __init__(self, d_in: int, d_out: int, rank: int, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.empty(rank, d_in))
        self.up = nn.Parameter(torch.empty(d_out, rank))
        self.register_parameter("bias", bias)

    @property
    def weight(self) -> Tensor:
        """(d_out, d_in), the product of both factors."""
        return self.up @ self.down

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to x (…, d_in); returns (…, d_out)."""
        return functional.linear(functional.linear(x, self.down), self.up, self.bias)

    @torch.no_grad()
    def initialise(self, std: float) -> None:
        """Initialise both factors alike, so that the entries of their product have the deviation of a dense layer.

        An entry is a sum of r products; its variance is r σ⁴ if the entries of the factors have variance σ².
        """
        each = math.sqrt(std / math.sqrt(len(self.down)))
        init.normal_(self.down, std=each)
        init.normal_(self.up, std=each)


@contextmanager
def composed_together(model: nn.Module, layers: nn.ModuleList, shared: nn.ModuleDict) -> Iterator[None]:
    """Compose the weights of all layers together at the start of a training step's forward pass.

    Does nothing in evaluation, where composing one layer at a time saves memory, nor with gradient checkpointing, which
    runs layers again after the forward pass.

    Args:
        model: the model whose forward pass runs.
        layers: its layers.
        shared: its `SharedMatrices`.
    """
    matrices = [module for module in shared.values() if isinstance(module, SharedMatrices)]
    if not model.training or getattr(layers[0], "gradient_checkpointing", False):
        matrices = []
    try:
        for module in matrices:
            module.stacked = module.weights()
        yield
    finally:
        for module in matrices:
            module.stacked = None


def share_attention(attentions: Sequence[nn.Module], config: SharedAttentionConfig) -> nn.ModuleDict:
    """Replace the attention projections of all layers by those of the configured design.

    Args:
        attentions: attention modules of the layers, in order; each has ``q_proj``, ``k_proj``, ``v_proj``, ``o_proj``.
        config: of the model.

    Returns:
        `SharedMatrices` by projection type, to be held by the model; empty for designs without shared matrices.

    Raises:
        ModelError: if a projection is missing, or differs in shape between layers.
    """
    shared = nn.ModuleDict()
    if config.attention_sharing in ("dense", "gqa"):
        return shared
    for name in config.shared_types:
        linears = [getattr(attention, f"{name}_proj", None) for attention in attentions]
        if not all(is_dense_linear(linear) for linear in linears):
            raise ModelError(f"an attention layer has no linear layer {name}_proj; leave {name!r} out of shared_types")
        dense = [linear for linear in linears if is_dense_linear(linear)]
        _check_equal_shapes(name, dense)
        rows, columns = dense[0].weight.shape
        if config.attention_sharing != "low_rank":
            shared[name] = SharedMatrices((rows, columns), config)
        for layer, (attention, linear) in enumerate(zip(attentions, dense, strict=True)):
            new: nn.Module
            if name in shared:
                matrices = shared[name]
                assert isinstance(matrices, SharedMatrices)
                new = SharedProjection(matrices, layer, linear.bias)
            else:
                new = LowRankProjection(columns, rows, config.attention_rank or 1, linear.bias)
            setattr(attention, f"{name}_proj", new)
    return shared


def _check_equal_shapes(name: str, linears: Sequence[nn.Linear]) -> None:
    first = tuple(linears[0].weight.shape)
    for layer, linear in enumerate(linears):
        shape = tuple(linear.weight.shape)
        if shape != first:
            raise ModelError(
                f"the {name} projections cannot share matrices: layer {layer} has {shape}, layer 0 has {first}; "
                f"leave {name!r} out of shared_types"
            )
