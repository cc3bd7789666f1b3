"""The CUDA path from its entry on, on CPU tensors: kernels replaced by exact products, clocks by made-up times.

Which way is taken, and that it is looked for once only; the kernels themselves are run by interpreted.py.
"""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from cospadi.format import MatrixSpec, unpack
from cospadi.kernels import autotune as tuning
from cospadi.kernels import cuda, factored_linear, op, reference
from cospadi.kernels.synthetic import random_packed

launch = pytest.importorskip(
    "cospadi.kernels.triton.launch", reason="there is no Triton for this machine", exc_type=ImportError
)

DICTIONARY = MatrixSpec(64, 96, bits=8, group=32)
CODES = MatrixSpec(160, 64, "12:32", 0, 8, 8)


class Device:
    """What stands for a GPU: which kernels were launched, how long each takes, which do not run."""

    def __init__(self):
        self.launched, self.seconds, self.broken, self.capturing = [], {}, set(), False

    def kernel(self, name):
        def run(x, packed, spec, config, out_dtype, spaced=False):
            self.launched.append(f"{name} {config}")
            if name in self.broken:
                raise AssertionError("does not compile")
            plain = x if x.dim() == 2 else x[:, :, :32].reshape(1, -1)
            y = (plain.double() @ unpack(packed, spec, torch.float64).T).to(out_dtype)
            return launch.pitched(y) if spaced else y

        run.__name__ = name
        return run

    def time(self, run):
        before = len(self.launched)
        run()
        names = self.launched[before:]
        return min(
            (seconds for start, seconds in self.seconds.items() if names and names[0].startswith(start)), default=9
        )


@pytest.fixture
def device(monkeypatch):
    made = Device()
    for name in ("balanced", "walk", "sparse", "dense", "one_token", "few_tokens"):
        monkeypatch.setattr(launch, name, made.kernel(name))

    def unpacked(packed, spec, dtype):
        made.launched.append("unpacked")
        if "unpacked" in made.broken:
            raise AssertionError("does not compile")
        return unpack(packed, spec, dtype)

    monkeypatch.setattr(launch, "unpacked", unpacked)
    monkeypatch.setattr(tuning, "milliseconds", made.time)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: made.capturing)
    tuning.clear()
    yield made
    tuning.clear()
    tuning.set_tuning(True)


@pytest.fixture(scope="module")
def case():
    return random_packed(DICTIONARY, torch.float16), DICTIONARY, random_packed(CODES, torch.float16, seed=1), CODES


def cast(case, dtype):
    def change(packed):
        return {role: t.to(dtype) if t.is_floating_point() else t for role, t in packed.items()}

    return change(case[0]), case[1], change(case[2]), case[3]


def inputs(tokens, dtype=torch.float16):
    return torch.randn(tokens, 96, generator=torch.Generator().manual_seed(3)).to(dtype)


def check(case, tokens, dtype=torch.float16):
    x = inputs(tokens, dtype)
    y = cuda.cuda_forward(x, *case)
    exact = reference(x, *case)
    assert y.dtype == dtype and y.shape == exact.shape
    assert float((y.double() - exact).norm() / exact.norm()) < 4e-3


@pytest.mark.parametrize("tokens", [1, 3, 4, 16, 17, 64, 65, 70])
@pytest.mark.parametrize("tuned", [True, False])
def test_the_first_call_and_those_after_it_agree(device, case, tokens, tuned):
    tuning.set_tuning(tuned)
    for _ in range(3):
        check(case, tokens)
    assert tuning.failures() == {}


def test_the_fastest_is_timed_once_and_launched_alone_afterwards(device, case):
    device.seconds = {"one_token 4x64": 1.0, "walk 4x8": 1.0}
    check(case, 1)
    assert len(device.launched) > 4
    device.launched.clear()
    for _ in range(3):
        check(case, 1)
    chosen = [f"one_token {launch.ONE_TOKEN[1]}", f"walk {launch.WALK[1]}"]
    assert device.launched == chosen * 3
    assert sorted(tuning.choices().values()) == sorted(chosen)


def test_every_shape_number_of_tokens_and_dtype_has_a_choice_of_its_own(device, case):
    check(case, 1)
    assert set(tuning.choices()) == {(None, torch.float16, DICTIONARY, 1), (None, torch.float16, CODES, 1)}
    check(case, 4)
    assert len(tuning.choices()) == 4
    for tokens in (5, 6, 8):  # these share one
        check(case, tokens)
    assert len(tuning.choices()) == 6
    check(cast(case, torch.bfloat16), 1, torch.bfloat16)
    assert len(tuning.choices()) == 8
    alone = MatrixSpec(32, 64, "12:32", 0, 8, 8)
    packed = random_packed(alone, torch.float16)
    x = torch.randn(1, 64).half()
    y, exact = cuda.cuda_forward(x, None, None, packed, alone), reference(x, None, None, packed, alone)
    assert float((y.double() - exact).norm() / exact.norm()) < 4e-3
    assert len(tuning.choices()) == 9


def test_one_choice_serves_readers_that_want_other_outputs(device, case):
    dictionary = case[0]
    check(case, 1)
    alone = cuda.packed_linear(inputs(1), dictionary, DICTIONARY, torch.float16)
    assert alone.shape == (1, 64) and alone.dtype == torch.float16
    spaced = cuda.packed_linear(inputs(1), dictionary, DICTIONARY, torch.float16, CODES)
    assert spaced.dim() == 4 and spaced.dtype == torch.float32
    free = MatrixSpec(160, 64, "free", 30)
    plain = cuda.packed_linear(inputs(1), dictionary, DICTIONARY, torch.float16, free)
    assert plain.shape == (1, 64) and plain.dtype == torch.float32
    assert len(tuning.choices()) == 2


@pytest.mark.parametrize("tuned", [True, False])
def test_what_is_ruled_out_never_comes_back(device, case, tuned):
    tuning.set_tuning(tuned)
    device.broken = {"one_token", "walk", "balanced"} if tuned else {"one_token", "balanced"}
    for _ in range(2):
        check(case, 1)
    assert tuning.failures()
    device.launched.clear()
    for _ in range(3):
        check(case, 1)
    assert not any(name.split(" ")[0] in device.broken for name in device.launched)


@pytest.mark.parametrize("tokens", [1, 4, 70])
def test_where_nothing_runs_the_dense_path_is_left(device, case, tokens):
    device.broken = {"one_token", "few_tokens", "dense", "walk", "balanced", "sparse", "unpacked"}
    for _ in range(3):
        check(case, tokens)
    count = len(device.launched)
    check(case, tokens)
    assert len(device.launched) == count


def test_a_capture_chooses_nothing_for_good(device, case):
    device.seconds = {"one_token 8x64": 1.0, "balanced 4x32": 1.0}
    device.capturing = True
    for _ in range(2):
        check(case, 1)
    first = [f"one_token {launch.ONE_TOKEN[0]}", f"balanced {launch.BALANCED_ONE[0]}"]
    assert device.launched == first * 2 and tuning.choices() == {}
    device.capturing = False
    check(case, 1)
    device.launched.clear()
    device.capturing = True
    check(case, 1)
    assert device.launched == [f"one_token {launch.ONE_TOKEN[2]}", f"balanced {launch.BALANCED_ONE[1]}"]


def test_timing_switched_on_later_still_happens_and_off_keeps_the_choice(device, case):
    device.seconds = {"one_token 8x64": 1.0}
    tuning.set_tuning(False)
    check(case, 1)
    assert tuning.choices() == {}
    tuning.set_tuning(True)
    check(case, 1)
    chosen = tuning.choices()
    tuning.set_tuning(False)
    check(case, 1)
    assert tuning.choices() == chosen and f"one_token {launch.ONE_TOKEN[2]}" in chosen.values()
    tuning.clear()
    device.launched.clear()
    check(case, 1)
    assert device.launched[0] == f"one_token {launch.ONE_TOKEN[0]}"


def test_full_memory_is_not_held_against_a_kernel(device, case, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("full")

    with monkeypatch.context() as patch:
        patch.setattr(launch, "options", lambda *_: [(full, launch.ONE_TOKEN[0])])
        with pytest.raises(torch.OutOfMemoryError):
            cuda.cuda_forward(inputs(1), *case)
    assert tuning.failures() == {}


def test_empty_batches_other_dtypes_and_no_triton(device, case, monkeypatch):
    assert cuda.cuda_forward(inputs(0), *case).shape == (0, 160)
    wide = cast(case, torch.float32)
    check(wide, 1, torch.float32)
    check(wide, 40, torch.float32)
    assert device.launched == []
    monkeypatch.setattr(cuda, "launch", None)
    monkeypatch.setattr(cuda, "no_triton", "not there")
    check(case, 1)
    check(case, 70)
    assert device.launched == []


def test_through_the_operation_with_gradients_and_without(device, case, monkeypatch):
    monkeypatch.setitem(op.FORWARDS, "cpu", cuda.cuda_forward)
    x = inputs(1).view(1, 1, 96)
    with torch.no_grad():
        quiet = factored_linear(x, *case)
    with torch.inference_mode():
        assert torch.equal(factored_linear(x, *case), quiet)
    assert quiet.shape == (1, 1, 160) and not quiet.requires_grad
    loud = factored_linear(x.requires_grad_(), *case)
    assert loud.requires_grad and torch.equal(loud, quiet)
    with torch.no_grad():
        assert not factored_linear(x, *case).requires_grad


def test_each_device_chooses_for_itself_and_is_entered_where_it_is_not_the_current_one(device, monkeypatch):
    entered, made = [], []

    @contextmanager
    def enter(where):
        entered.append(where.index)
        yield

    def prepared(index, *_):
        made.append(index)
        return lambda x, packed: index

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", enter)
    monkeypatch.setattr(cuda, "prepared_product", prepared)
    for index in (0, 1, 0, 1):
        x = SimpleNamespace(shape=(1, 64), dtype=torch.float16, device=SimpleNamespace(index=index))
        x.contiguous = lambda x=x: x
        assert cuda.cuda_forward(x, None, None, {}, CODES) == index
    assert entered == [1, 1] and made == [0, 1]
