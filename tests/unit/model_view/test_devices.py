import pytest
import torch
from torch import nn

from cospadi.errors import ResourceError
from cospadi.runtime.devices import move, placed
from cospadi.runtime.memory import guard_memory
from tiny import tiny_model


def test_placed_gives_back_the_very_same_tensors():
    model = tiny_model("qwen2", dtype=torch.bfloat16, tie_word_embeddings=True)
    before = {name: (t, t.data_ptr(), t.dtype) for name, t in (*model.named_parameters(), *model.named_buffers())}
    assert {dtype for _, _, dtype in before.values()} >= {torch.bfloat16, torch.float32}  # rotary frequencies
    with placed(model, "cpu", torch.float32) as wide:
        assert {p.dtype for p in wide.parameters()} == {torch.float32}
        assert wide.lm_head.weight is wide.model.embed_tokens.weight
        wide.model.norm.weight.data.zero_()
    after = dict((*model.named_parameters(), *model.named_buffers()))
    for name, (tensor, pointer, dtype) in before.items():
        assert after[name] is tensor and tensor.data_ptr() == pointer and tensor.dtype == dtype
    assert model.model.norm.weight.abs().min() > 0


def test_placed_restores_after_an_error_and_spares_integers():
    module = nn.Module()
    module.codes = nn.Parameter(torch.arange(5, dtype=torch.int32), requires_grad=False)
    module.wide = nn.Parameter(torch.ones(2, dtype=torch.float64))
    with pytest.raises(ZeroDivisionError), placed(module, "cpu", torch.float32):
        assert module.codes.dtype == torch.int32 and module.wide.dtype == torch.float64
        raise ZeroDivisionError
    assert module.codes.tolist() == [0, 1, 2, 3, 4]


def test_move_reaches_nested_tensors():
    marker = object()
    nested = {"a": (torch.zeros(2), [torch.ones(1), None]), "b": marker}
    moved = move(nested, "meta")
    assert moved["a"][0].device.type == moved["a"][1][0].device.type == "meta"
    assert moved["b"] is marker and moved["a"][1][1] is None


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_out_of_memory_becomes_one_line(error):
    with pytest.raises(ResourceError, match="while dancing; sit down"), guard_memory("dancing", "sit down"):
        raise error


def test_other_errors_pass():
    with pytest.raises(RuntimeError, match="shapes"), guard_memory("dancing", "sit down"):
        raise RuntimeError("shapes")
