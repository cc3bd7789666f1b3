"""The layer of a block that takes a correction: the last linear layer of its residual branch."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from cospadi.errors import ModelError
from cospadi.layers import is_dense_linear
from cospadi.model_view import LayerReplay, ModelView

_PROBE = (1, 8)


@dataclass(frozen=True)
class Branch:
    """output = y + scale · m, where m is the output of one linear layer of the block.

    Attributes:
        block: index of the block.
        path: of the linear layer (``nn.Linear``, or GPT-2's ``Conv1D``) within the block.
        scale: factor by which the block multiplies m; 1 in most architectures.
    """

    block: int
    path: str
    scale: float

    def module(self, view: ModelView) -> nn.Module:
        """The linear layer."""
        return view.layers[self.block].get_submodule(self.path)

    def folded(self, view: ModelView, transform: Tensor) -> dict[str, Tensor]:
        """Weight and bias that make the layer compute m T instead of m.

        Args:
            view: of the model.
            transform: T (d, d).

        Returns:
            float64 tensors by parameter name in the model.
        """
        name = f"{view.layers_name}.{self.block}.{self.path}"
        module, wide = self.module(view), transform.to(torch.float64)
        weight = module.weight.detach().to(wide)  # type: ignore[operator]
        found = {f"{name}.weight": weight @ wide if isinstance(module, Conv1D) else wide.T @ weight}
        bias = getattr(module, "bias", None)
        if isinstance(bias, Tensor):
            found[f"{name}.bias"] = bias.detach().to(wide) @ wide
        return found

    def refitted(self, view: ModelView, step: Tensor) -> dict[str, Tensor]:
        """Weight and bias that make the layer compute a (W + D) instead of a W.

        Args:
            view: of the model.
            step: D (inputs, d); for a layer with a bias, one more row for it.

        Returns:
            float64 tensors by parameter name in the model.
        """
        name = f"{view.layers_name}.{self.block}.{self.path}"
        module, wide = self.module(view), step.to(torch.float64)
        bias = getattr(module, "bias", None)
        weight = module.weight.detach().to(wide)  # type: ignore[operator]
        inputs = len(wide) - isinstance(bias, Tensor)
        found = {f"{name}.weight": weight + (wide[:inputs] if isinstance(module, Conv1D) else wide[:inputs].T)}
        if isinstance(bias, Tensor):
            found[f"{name}.bias"] = bias.detach().to(wide) + wide[inputs]
        return found

    def run(
        self, replay: LayerReplay, hidden: Tensor, step: Tensor | None = None, *, of_inputs: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Run the block; with a step, its last layer's output is m + f D instead of m.

        Args:
            replay: of the model.
            hidden: input of the block (b, length, width).
            step: D (features, width).
            of_inputs: f is the input of the layer (with a 1 appended for its bias); otherwise f = m, its output.

        Returns:
            output of the block (b, length, width), and scale · f (b, length, features) before the step.
        """
        seen: list[Tensor] = []
        biased = isinstance(getattr(self.module(replay.view), "bias", None), Tensor)

        def look(_module: nn.Module, args: Any, out: Tensor) -> Tensor | None:
            features = args[0] if of_inputs else out
            if of_inputs and biased:
                features = torch.cat([features, torch.ones_like(features[..., :1])], dim=-1)
            seen.append(features)
            return None if step is None else (out + features @ step.to(out))

        with ExitStack() as stack:
            stack.callback(self.module(replay.view).register_forward_hook(look).remove)
            out = replay.layer(self.block, hidden)
        return out, self.scale * seen[0].reshape(*out.shape[:-1], -1)  # some blocks (OPT) flatten sequences


def find_branch(view: ModelView, block: int, replay: LayerReplay) -> Branch:
    """Find the last linear layer of a block and check that the block only adds its output to the residual stream.

    Args:
        view: of a real model.
        block: index.
        replay: of the model.

    Raises:
        ModelError: if something, such as a norm, comes between that layer and the residual sum.
    """
    layer = view.layers[block]
    hidden = replay.embed(torch.arange(_PROBE[1])[None])
    called: list[tuple[str, Tensor]] = []
    with ExitStack() as stack:
        for path, module in layer.named_modules():
            if is_dense_linear(module) or isinstance(module, Conv1D):

                def note(_module: nn.Module, _args: Any, out: Tensor, _path: str = path) -> None:
                    called.append((_path, out))

                stack.callback(module.register_forward_hook(note).remove)
        before = replay.layer(block, hidden)
    like = (hidden.shape[-1], hidden.numel())
    path, m = next(((p, out) for p, out in reversed(called) if (out.shape[-1], out.numel()) == like), ("", hidden))
    if path:
        generator = torch.Generator().manual_seed(0)
        shift = torch.randn(m.shape, generator=generator).to(m) * before.float().std().to(m)
        with ExitStack() as stack:
            module = layer.get_submodule(path)
            stack.callback(module.register_forward_hook(lambda _m, _a, out: out + shift).remove)
            change = (replay.layer(block, hidden) - before).float()
        shift = shift.float().reshape(change.shape)
        scale = float((change * shift).sum() / shift.square().sum())
        off = float((change - scale * shift).norm() / change.norm().clamp_min(1e-30))
        if abs(scale) > 1e-3 and off < 0.05:
            return Branch(block, path, 1.0 if abs(scale - 1) < 0.01 else scale)
    kind = type(layer).__name__
    raise ModelError(
        f"{kind}: its residual branch does not end in a linear layer that can take the transform (a norm follows it, "
        "or it mixes experts); use --set separate=true, which keeps the transform as a block of its own, or another "
        "method"
    )
