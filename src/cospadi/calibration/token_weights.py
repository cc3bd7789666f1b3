"""How much the loss minds an error of a linear layer's output, token by token: from one backward pass.

A token's weight at a layer is the mean over the layer's outputs of the squared gradient of the loss. The loss is the
negative log-likelihood of labels that are drawn from the model's own predictions, so weights are those of the true
Fisher information, not of how surprising the text is.

Backward passes need activations of every layer. So the text goes through in parts: of each part the input of every
layer is kept on the host, and from the last layer to the first a layer is run again from its input, and its gradients
are computed. The device holds one layer and its activations. A finished part is durable.
"""

import math
import warnings
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from cospadi.calibration.collect import REMEDY, sequences_per_batch
from cospadi.calibration.loss_gram import Weights
from cospadi.errors import OutputError, ResourceError
from cospadi.io import disk_errors, write_durably
from cospadi.model_view import LayerReplay, ModelView
from cospadi.progress import PhaseProgress
from cospadi.runtime.devices import deterministic, placed
from cospadi.runtime.fingerprints import derived_seed
from cospadi.runtime.memory import guard_memory

PART_TOKENS = 16_384
"""Tokens in a part: as many inputs of every layer are kept on the host."""
BACKWARD_TOKENS = 4096
"""Tokens of one backward pass through a layer."""
LOGITS = 1 << 27
"""Most logits at once."""
CLIPPED = 0.001
"""Share of a layer's tokens whose weights are clipped, the largest ones: a few tokens must not make up the Gram.
No fewer than one a sequence: where attention rests on the first token, a value projection's weights would, too."""
SCALE = 2.0**12
"""Gradients are multiplied by it before they are squared, so that the squares of small ones do not vanish."""
EFFECTIVE_PER_INPUT = 2
"""Tokens of equal weight that every input of a layer should have, at least."""


class TokenWeights:
    """Weights of all tokens at all linear layers, on disk.

    Args:
        directory: of the parts.
        parts: their number.
        lacking: why there are no weights; None where there are.
    """

    def __init__(self, directory: Path, parts: int, lacking: str | None = None) -> None:
        self.directory, self.parts, self.lacking = directory, parts, lacking

    def of(self, names: Iterable[str]) -> dict[str, Weights]:
        """Weights at some layers; a layer whose gradients vanish or overflow has none.

        Raises:
            OutputError: if a part is missing or damaged.
        """
        if self.lacking is not None:
            return {}
        raw: dict[str, list[Tensor]] = {name: [] for name in names}
        for number in range(self.parts):
            path = _part(self.directory, number)
            try:
                with safe_open(path, "pt") as file:
                    for name, seen in raw.items():
                        seen.append(file.get_tensor(name))
            except (SafetensorError, OSError) as error:
                raise OutputError(f"{path} is damaged ({error}): delete it, or use --fresh") from None
        found = {name: usable(torch.cat(seen)) for name, seen in raw.items()}
        return {name: weights for name, weights in found.items() if weights is not None}


def usable(raw: Tensor) -> Weights | None:
    """Squared gradients as weights: clipped, and of mean 1.

    Args:
        raw: squared gradient of every token, summed over the layer's outputs, float32 (sequences, length).

    Returns:
        the weights; None where all are zero, or one is NaN or Inf.
    """
    if not bool(raw.isfinite().all()):
        return None
    tokens = raw.reshape(-1)
    largest = max(len(raw), int(CLIPPED * len(tokens)))
    most = tokens.kthvalue(max(1, len(tokens) - largest)).values
    clipped = tokens.clamp_max(most).double()
    mean = float(clipped.mean())
    if not mean > 0:
        return None
    return Weights((clipped / mean).float(), mean)


def token_weights(
    view: ModelView,
    ids: Tensor,
    directory: Path,
    *,
    seed: int,
    device: torch.device | str = "cpu",
    progress: PhaseProgress | None = None,
) -> TokenWeights:
    """Compute the weights of all tokens at all linear layers, or take over what an interrupted run left.

    Args:
        view: of a real model; it is unchanged afterwards.
        ids: int64 (sequences, length), without padding.
        directory: for the parts; nothing else lies there.
        seed: of the labels.
        device: where layers run.
        progress: called as progress(parts done, parts, "gradients").

    Returns:
        the weights. Where the backward pass is not possible there are none, and `lacking` says why.

    Warns:
        UserWarning: if weights are lacking at all or some layers, or leave too few tokens for a layer's inputs.

    Raises:
        OutputError: if the disk is full or not writable.
    """
    size = sequences_per_batch(ids.shape[1], PART_TOKENS)
    parts = torch.split(ids, size)
    reason = directory / "lacking.txt"
    with disk_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
    lacking = reason.read_text(encoding="utf-8") if reason.exists() else None
    if lacking is None:
        try:
            _collect(view, parts, directory, seed, torch.device(device), progress)
        except (ResourceError, RuntimeError) as error:  # no memory; an operation without a derivative
            lacking = (str(error).strip().splitlines() or [type(error).__name__])[0]
            write_durably(reason, lacking)
    found = TokenWeights(directory, len(parts), lacking)
    _tell(view, found, ids)
    return found


def _part(directory: Path, number: int) -> Path:
    return directory / f"part-{number:05d}.safetensors"


def _tell(view: ModelView, found: TokenWeights, ids: Tensor) -> None:
    """Warn of what the weights cannot do."""
    if found.lacking is not None:
        warnings.warn(f"no gradients of the loss ({found.lacking}): all Grams are plain", stacklevel=3)
        return
    plain: list[str] = []
    needed, worst = 0, ""
    for group in view.groups:
        weights = found.of(group.modules)
        plain += [name for name in group.modules if name not in weights]
        for name, item in weights.items():
            tokens = math.ceil(EFFECTIVE_PER_INPUT * group.d_in * ids.numel() / item.effective)
            needed, worst = max((needed, worst), (tokens, name))
    if plain:
        others = f" and {len(plain) - 1} more" if len(plain) > 1 else ""
        warnings.warn(
            f"gradients of the loss vanish, overflow or belong to no single token at {plain[0]}{others}: "
            "the Grams there are plain",
            stacklevel=3,
        )
    if needed > ids.numel():
        warnings.warn(
            f"{ids.numel()} calibration tokens are few for loss-weighted Grams: {worst} needs about {needed}; give "
            f"--samples {math.ceil(needed / ids.shape[1])}, or --gram plain",
            stacklevel=3,
        )


def _collect(
    view: ModelView,
    parts: tuple[Tensor, ...],
    directory: Path,
    seed: int,
    device: torch.device,
    progress: PhaseProgress | None,
) -> None:
    missing = [number for number in range(len(parts)) if not _part(directory, number).exists()]
    if not missing:
        return
    with ExitStack() as stack:
        stack.enter_context(guard_memory("computing gradients", REMEDY))
        stack.enter_context(_frozen(view.model))
        for module in view.outside():
            stack.enter_context(placed(module, device))
        stack.enter_context(deterministic(device))
        replay = stack.enter_context(LayerReplay(view, device))
        first = 0  # of all sequences, the first of this part
        for number, part in enumerate(parts):
            if number in missing:
                seeds = [derived_seed(seed, f"labels {first + at}") for at in range(len(part))]
                found = squared_gradients(replay, part, seeds)
                write_durably(_part(directory, number), save(found))
            first += len(part)
            if progress:
                progress(number + 1, len(parts), "gradients")


def squared_gradients(replay: LayerReplay, ids: Tensor, seeds: list[int]) -> dict[str, Tensor]:
    """Squared gradient of the loss, summed over the outputs, of every token at every linear layer.

    Args:
        replay: of the model, whose parameters need no gradients; what belongs to no layer is on its device.
        ids: int64 (sequences, length).
        seeds: of the labels of every sequence.

    Returns:
        by module name, float32 (sequences, length) on the CPU, times `SCALE`²; NaN, or zero everywhere, where a layer
        does not have one output for every token.
    """
    view = replay.view
    size = sequences_per_batch(ids.shape[1], BACKWARD_TOKENS)
    inputs = [[replay.embed(part).cpu() for part in torch.split(ids, size)]]
    for index in range(len(view.layers)):
        inputs.append([replay.layer(index, part).cpu() for part in inputs[-1]])
    replay.release()
    gradients = [
        _of_the_head(replay, *part)
        for part in zip(torch.split(ids, size), inputs.pop(), _chunks(seeds, size), strict=True)
    ]
    found: dict[str, list[Tensor]] = {name: [] for name in view.module_names}
    for index in reversed(range(len(view.layers))):
        for at, hidden in enumerate(inputs.pop()):
            gradients[at], squares = _of_a_layer(replay, index, hidden, gradients[at])
            for name, square in squares.items():
                found[name].append(square)
    return {name: torch.cat(squares) for name, squares in found.items()}


def _chunks(items: list[int], size: int) -> Iterator[list[int]]:
    return (items[at : at + size] for at in range(0, len(items), size))


def sampled(probabilities: Tensor, seed: int) -> Tensor:
    """A label for every token, drawn from the model's predictions.

    Args:
        probabilities: float32 (tokens, vocabulary).
        seed: of the draw.

    Returns:
        int64 (tokens,).
    """
    generator = torch.Generator(probabilities.device).manual_seed(seed)
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0]


def _of_the_head(replay: LayerReplay, ids: Tensor, hidden: Tensor, seeds: list[int]) -> Tensor:
    """Gradient of the loss, summed over tokens, with respect to the last layer's output; on the CPU."""
    vocabulary = int(replay.view.model.config.get_text_config().vocab_size)
    size = max(1, LOGITS // (ids.shape[1] * vocabulary))
    found = []
    for part, states, own in zip(torch.split(ids, size), torch.split(hidden, size), _chunks(seeds, size), strict=True):
        states = states.to(replay.device).requires_grad_(True)
        logits = replay.logits(part, states, grad=True)
        wanted = logits.detach().float().softmax(-1)  # minus 1 at the label it is the gradient of the loss
        if not bool(wanted.isfinite().all()):
            found.append(torch.full_like(states, math.nan).detach().cpu())
            continue
        tokens = torch.arange(wanted.shape[1], device=wanted.device)
        for number, seed in enumerate(own):
            wanted[number, tokens, sampled(wanted[number], seed)] -= 1
        (gradient,) = torch.autograd.grad(logits, states, wanted.to(logits.dtype))
        found.append(gradient.cpu())
    return torch.cat(found)


def _of_a_layer(replay: LayerReplay, index: int, hidden: Tensor, gradient: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """One layer backwards.

    Args:
        replay: of the model.
        index: of the layer.
        hidden: its input (batch, length, width).
        gradient: of the loss with respect to its output.

    Returns:
        that with respect to its input, on the CPU; squared gradients, summed over the outputs of its linear layers.
    """
    names = [name for group in replay.view.of_layer(index) for name in group.modules]
    squares = {name: torch.zeros(hidden.shape[:2]) for name in names}
    calls = dict.fromkeys(names, 0)

    def square(of: Tensor, *, name: str) -> None:
        if of.shape[:-1].numel() == hidden.shape[:2].numel():
            squares[name] = (of.float() * SCALE).square().sum(-1).reshape(hidden.shape[:2]).cpu()

    def follow(_module: nn.Module, _args: tuple[Tensor, ...], out: Tensor, *, name: str) -> None:
        calls[name] += 1
        out.register_hook(partial(square, name=name))  # type: ignore[no-untyped-call]

    with ExitStack() as stack:
        for name in names:
            hook = replay.view.module(name).register_forward_hook(partial(follow, name=name))
            stack.callback(hook.remove)
        start = hidden.to(replay.device).requires_grad_(True)
        out = replay.layer(index, start, grad=True)
        (found,) = torch.autograd.grad(out, start, gradient.to(out.device))
    for name in names:
        if calls[name] != 1:
            squares[name] = torch.full(hidden.shape[:2], math.nan)
    return found.cpu(), squares


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No parameter needs a gradient meanwhile."""
    required = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, flag in required.items():
            parameter.requires_grad_(flag)
