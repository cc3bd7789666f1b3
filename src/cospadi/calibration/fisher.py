"""Mean squared gradients of the loss per weight, the importance that FWSVD (arXiv 2207.00112) uses."""

import torch
from torch import Tensor
from torch.nn import functional

from cospadi.errors import NumericalError
from cospadi.model_view import ModelView
from cospadi.progress import PhaseProgress
from cospadi.runtime.devices import placed
from cospadi.runtime.memory import guard_memory

REMEDY = "give fewer --samples, a shorter --seq-len, or --device cpu"


def fisher(
    view: ModelView, ids: Tensor, *, device: torch.device | str = "cpu", progress: PhaseProgress | None = None
) -> dict[str, Tensor]:
    """Empirical Fisher information of every weight of every group.

    For sequences z: F = mean over z of (∂ℓ(z)/∂W)², ℓ the mean next-token loss of the sequence (FWSVD). The
    model runs whole on `device`, in float32; one weight's gradient exists at a time.

    Args:
        view: of a real model; it is unchanged afterwards.
        ids: int64 (sequences, length), length at least 2.
        device: where to run.
        progress: called as progress(sequences done, sequences, "gradients").

    Returns:
        by module name, float32 (d_in, d_out) on the CPU.

    Raises:
        NumericalError: on NaN or Inf in a gradient (names the layer).
        ResourceError: if the memory does not suffice.
    """
    model = view.model
    required = {parameter: parameter.requires_grad for parameter in model.parameters()}
    training = model.training
    handles = []
    model.train(False)
    try:
        with (
            guard_memory("computing gradients", REMEDY),
            placed(model, device, torch.float32),
            torch.enable_grad(),
        ):
            model.requires_grad_(False)
            sums: dict[str, Tensor] = {}
            for name in view.module_names:
                weight = view.module(name).weight
                assert isinstance(weight, Tensor)
                sums[name] = torch.zeros_like(weight, dtype=torch.float32)

                def square(parameter: Tensor, _sum: Tensor = sums[name]) -> None:
                    assert parameter.grad is not None
                    _sum.addcmul_(parameter.grad, parameter.grad)
                    parameter.grad = None

                weight.requires_grad_(True)
                handles.append(weight.register_post_accumulate_grad_hook(square))  # type: ignore[no-untyped-call]
            for done, sequence in enumerate(ids, 1):
                sequence = sequence.to(device)
                logits = model(input_ids=sequence[None], use_cache=False).logits[0, :-1]
                functional.cross_entropy(logits.float(), sequence[1:]).backward()  # type: ignore[no-untyped-call]
                if progress:
                    progress(done, len(ids), "gradients")
            for name, total in sums.items():
                if not bool(total.isfinite().all()):
                    raise NumericalError(f"{name}: NaN or Inf in the gradient of the loss")
            return {name: (total / len(ids)).T.contiguous().cpu() for name, total in sums.items()}
    finally:
        for handle in handles:
            handle.remove()
        for parameter, flag in required.items():
            parameter.requires_grad_(flag)
            parameter.grad = None
        model.train(training)
