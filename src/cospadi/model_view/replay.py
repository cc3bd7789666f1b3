"""Running a model one decoder layer at a time, without tracing, with exactly the results of its own forward.

The model's forward decides which arguments each layer receives besides the hidden states (masks, rotary embeddings);
they differ between layers in models that mix full and sliding attention. One pass in which every layer is the identity
records these arguments; afterwards each layer can be called by itself.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cospadi.errors import ModelError
from cospadi.model_view.view import ModelView, embedding_weight
from cospadi.runtime.devices import move

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class _Stop(Exception):
    """Ends the model's forward once everything is recorded."""


class LayerReplay:
    """Layer-by-layer execution of a model.

    Only the current layer is on `device`; the rest of the model stays where it is. Layers are looked up at every call,
    so replaced modules take effect.

        with LayerReplay(view, "cuda") as replay:
            hidden = replay.embed(ids)
            for index in range(len(view.layers)):
                hidden = replay.layer(index, hidden)

    Args:
        view: of a real model, which is put into eval mode.
        device: where the layers run.
    """

    def __init__(self, view: ModelView, device: torch.device | str = "cpu") -> None:
        self.view = view
        self.device = torch.device(device)
        self._recorded: dict[tuple[int, int], list[Arguments]] = {}
        self._resident: tuple[nn.Module, torch.device] | None = None
        view.model.train(False)

    def __enter__(self) -> "LayerReplay":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def embed(self, ids: Tensor) -> Tensor:
        """The input of the first decoder layer.

        Args:
            ids: token ids (batch, length), without padding.

        Returns:
            hidden states (batch, length, width) on `device`.

        Raises:
            ModelError: if the layers receive anything besides the hidden states that depends on the tokens.
        """
        shape = (int(ids.shape[0]), int(ids.shape[1]))
        if shape in self._recorded:
            hidden, _ = self._walk(ids, stop_at=0)
        else:
            hidden, arguments = self._walk(ids)
            vocabulary = len(embedding_weight(self.view.model))
            _, others = self._walk((ids + 1) % vocabulary)
            if not _same(arguments, others):
                raise ModelError(
                    f"{type(self.view.model).__name__}: its decoder layers need more than hidden states and positions; "
                    "this architecture is not supported"
                )
            self._recorded[shape] = [move(item, self.device) for item in arguments]
        return hidden.to(self.device)

    def layer(self, index: int, hidden: Tensor, *, grad: bool = False) -> Tensor:
        """Run one decoder layer of the model in its current state.

        Args:
            index: of the layer.
            hidden: its input (batch, length, width); `embed` must have been called with this batch size and length.
            grad: whether to record the operations for a backward pass.

        Returns:
            its output, same shape, on `device`.

        Raises:
            KeyError: if `embed` was not called with this shape.
        """
        args, kwargs = self._recorded[(int(hidden.shape[0]), int(hidden.shape[1]))][index]
        with torch.set_grad_enabled(grad):
            out = self.fetch(index)(hidden.to(self.device), *args, **kwargs)
        result: Tensor = out if self.view.extra_outputs is None else out[0]
        return result

    def logits(self, ids: Tensor, hidden: Tensor, *, grad: bool = False) -> Tensor:
        """The model's logits for an output of the last layer: final norm, head and everything else after the layers.

        Args:
            ids: token ids (batch, length); only their shape matters.
            hidden: output of the last decoder layer (batch, length, width).
            grad: whether to record the operations for a backward pass.

        Returns:
            logits (batch, length, vocabulary), on the device of the head.
        """
        last = len(self.view.layers) - 1

        def stub(index: int) -> Callable[..., Any]:
            return lambda x, *_, **__: self._wrap(hidden.to(x.device) if index == last else x)

        with self._stubbed(stub), torch.set_grad_enabled(grad):
            logits: Tensor = self.view.model(input_ids=self._at_embedding(ids), use_cache=False).logits
            return logits

    def fetch(self, index: int) -> nn.Module:
        """Move a layer to `device`, move the previous one back, and return the layer."""
        layer = self.view.layers[index]
        if self._resident is not None and self._resident[0] is layer:
            layer.to(self.device)  # it may contain new modules
            return layer
        self.release()
        first = next(layer.parameters(), None)
        if first is not None and first.device != self.device:
            self._resident = (layer, first.device)
            layer.to(self.device)
        return layer

    def release(self) -> None:
        """Move the layer on `device` back to its original device."""
        if self._resident is not None:
            layer, home = self._resident
            self._resident = None
            layer.to(home)

    def _at_embedding(self, ids: Tensor) -> Tensor:
        return ids.to(embedding_weight(self.view.model).device)

    def _wrap(self, hidden: Tensor) -> Any:
        extra = self.view.extra_outputs
        return hidden if extra is None else (hidden, *[None] * extra)

    @torch.no_grad()
    def _walk(self, ids: Tensor, stop_at: int | None = None) -> tuple[Tensor, list[Arguments]]:
        """Run the model's forward with identities as layers, up to layer `stop_at` (None: the last)."""
        stop = len(self.view.layers) - 1 if stop_at is None else stop_at
        seen: list[Tensor] = []
        arguments: list[Arguments] = []

        def stub(index: int) -> Callable[..., Any]:
            def identity(*args: Any, **kwargs: Any) -> Any:
                hidden = args[0] if args else kwargs.pop("hidden_states")
                seen.append(hidden)
                arguments.append((args[1:], kwargs))
                if index == stop:
                    raise _Stop
                return self._wrap(hidden)

            return identity

        with self._stubbed(stub):
            try:
                self.view.model(input_ids=self._at_embedding(ids), use_cache=False)
            except _Stop:
                pass
            else:
                raise ModelError(f"{type(self.view.model).__name__}: its forward skipped decoder layer {stop}")
        return seen[0], arguments

    @contextmanager
    def _stubbed(self, stub: Callable[[int], Callable[..., Any]]) -> Iterator[None]:
        """Replace the forward of every decoder layer temporarily."""
        layers = self.view.layers
        own = [layer.__dict__.get("forward") for layer in layers]
        try:
            for index, layer in enumerate(layers):
                layer.forward = stub(index)
            yield
        finally:
            for layer, forward in zip(layers, own, strict=True):
                if forward is None:
                    layer.__dict__.pop("forward", None)
                else:
                    layer.forward = forward


def _same(first: Any, second: Any) -> bool:
    """Whether nested arguments are equal, tensors by value; objects with hidden state never are."""
    if type(first) is not type(second):
        return False
    if isinstance(first, Tensor):
        return first.shape == second.shape and bool(torch.equal(first, second))
    if isinstance(first, tuple | list):
        return len(first) == len(second) and all(_same(a, b) for a, b in zip(first, second, strict=True))
    if type(first) is dict:
        return first.keys() == second.keys() and all(_same(first[key], second[key]) for key in first)
    return first is None or (isinstance(first, bool | int | float | str) and first == second)
