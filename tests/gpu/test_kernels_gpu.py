"""The operation on CUDA against float64: every kernel, prefill, graphs, compiled programs. Needs a CUDA device."""

import pytest
import torch

from cospadi.format import GroupSpec, MatrixSpec, Rotation, Trellis, unpack
from cospadi.format.rotation import rotated
from cospadi.kernels import autotune as tuning
from cospadi.kernels import cuda, factored_linear, reference
from cospadi.kernels.precompile import compile_ahead
from cospadi.kernels.synthetic import random_packed, random_rotation

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CODES = [
    ("16:32", 0, 16, 0, True),
    ("12:32", 0, 8, 64, True),
    ("8:16", 0, 4, 16, True),
    ("5:8", 0, 8, 0, True),
    ("free", 301, 16, 0, True),
    ("free", 301, 4, 8, True),
    ("free", 301, 8, 8, False),
    ("16:32", 0, 14, 0, True),
    ("dense", 0, 4, 64, False),
]
DICTIONARIES = [None, (16, 0, True), (8, 64, True), (8, 0, False), (4, 64, True), (2, 7, True), (3, 32, False)]
TOKENS = (1, 4, 16, 33, 300)
SIZES = [(384, 640, 515), (200, 609, 77)]
# Both factors of the layers that plans make, and of some they do not: every kernel and all its configurations.
CANDIDATES = [
    (MatrixSpec(515, 640, "16:32", 0, 16), (1, 4, 16)),
    (MatrixSpec(515, 608, "12:32", 0, 8, 64), (1, 2, 16)),
    (MatrixSpec(77, 640, "8:32", 0, 8, 64), (1,)),
    (MatrixSpec(77, 640, "8:16", 0, 4, 16), (1, 3)),
    (MatrixSpec(77, 609, "free", 301, 16), (1, 16)),
    (MatrixSpec(608, 640, bits=8, group=64), (1, 4, 16)),
    (MatrixSpec(610, 656, bits=8), (1, 7)),
    (MatrixSpec(77, 640, bits=4, group=64, symmetric=False), (1, 4)),
    (MatrixSpec(77, 640, bits=2, group=64), (1, 4)),
    (MatrixSpec(77, 609, bits=8, group=7), (1, 4)),
    (MatrixSpec(77, 609, bits=16), (1,)),
    (MatrixSpec(77, 1280, bits=2, group=64, symmetric=False, half=True), (1, 4)),
    (MatrixSpec(77, 640, bits=4, half=True), (1, 4)),
    (MatrixSpec(77, 640, bits=8, group=64, half=True), (1, 4)),
    (MatrixSpec(77, 609, bits=4, group=7, symmetric=False, half=True), (1, 4)),
]


def make(d_in, atoms, rows, codes, dictionary, dtype=torch.bfloat16):
    pattern, nonzeros, bits, group, symmetric = codes
    atoms = d_in if dictionary is None else atoms
    codes_spec = MatrixSpec(rows, atoms, pattern, nonzeros, bits, group, symmetric)
    packed = random_packed(codes_spec, dtype, "cuda")
    if dictionary is None:
        return None, None, packed, codes_spec
    bits, group, symmetric = dictionary
    spec = MatrixSpec(atoms, d_in, bits=bits, group=group, symmetric=symmetric)
    return random_packed(spec, dtype, "cuda", 1), spec, packed, codes_spec


def check(case, tokens, dtype=torch.bfloat16, limit=None):
    d_in = (case[1] or case[3]).columns
    x = torch.randn(tokens, d_in, device="cuda").to(dtype)
    y = factored_linear(x, *case)
    assert y.dtype == dtype
    exact = reference(x, *case)
    error = float((y.double() - exact).norm() / exact.norm())
    limits = {torch.bfloat16: 4e-3, torch.float16: 6e-4, torch.float32: 2e-6, torch.float64: 1e-12}
    assert error < (limit or limits[dtype]), (tokens, error)


@pytest.fixture(scope="module", autouse=True)
def compiled_ahead():
    """Compiling one kernel after the other would take most of the time of these tests."""
    todo = [(spec, count, None) for spec, tokens in CANDIDATES for count in tokens]
    for sizes in SIZES:
        for codes in CODES:
            spec = make(*sizes, codes, (16, 0, True))[3]
            todo += [(spec, count, None) for count in TOKENS if codes[2] != 14]
    compile_ahead(todo, torch.bfloat16)


@pytest.fixture(autouse=True)
def forget():
    """Candidates are timed where a test says so only: timing is not what most are about."""
    tuning.clear()
    tuning.set_tuning(False)
    yield
    failed = tuning.failures()
    tuning.clear()
    tuning.set_tuning(True)
    assert not failed


@pytest.mark.parametrize("case", CANDIDATES, ids=str)
def test_every_candidate(case):
    """Each kernel on its own, with every configuration, where only its own arithmetic counts."""
    spec, tokens = case
    packed = random_packed(spec, torch.bfloat16, "cuda")
    exact = unpack(packed, spec, torch.float64)
    launch = cuda.launch
    for count in tokens:
        x = torch.randn(count, spec.columns, device="cuda", dtype=torch.bfloat16)
        wanted = x.double() @ exact.T
        for kernel, config in launch.options(spec, count):
            y = kernel(x, packed, spec, config, torch.bfloat16)
            error = float((y.double() - wanted).norm() / wanted.norm())
            assert error < 4e-3, (kernel.__name__, str(config), count, error)
    if spec.bits != 16 or spec.sparse:
        made = launch.unpacked(packed, spec, torch.bfloat16).double()
        assert float((made - exact).norm() / exact.norm()) < 4e-3


@pytest.mark.parametrize("codes", CODES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_codes_of_every_kind(sizes, codes):
    case = make(*sizes, codes, (16, 0, True))
    for tokens in TOKENS:
        # weights of other than 16 bits are rounded to bfloat16 where they are unpacked
        check(case, tokens, limit=5e-3)


@pytest.mark.parametrize("dictionary", DICTIONARIES, ids=str)
def test_dictionaries_of_every_kind(dictionary):
    case = make(640, 384, 515, ("16:32", 0, 16, 0, True), dictionary)
    for tokens in (1, 4, 300):
        check(case, tokens, limit=6e-3 if dictionary and dictionary[0] == 3 else 5e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_other_dtypes(dtype):
    case = make(384, 640, 515, ("16:32", 0, 16, 0, True), (16, 0, True), dtype)
    torch.backends.cuda.matmul.allow_tf32 = False
    for tokens in (1, 4, 300):
        check(case, tokens, dtype)


def test_more_tokens_than_rebuilding_costs():
    case = make(64, 640, 128, ("16:32", 0, 16, 0, True), (16, 0, True))
    check(case, 4000, limit=5e-3)


def test_the_choice_is_timed_once_and_kept():
    case = make(384, 640, 512, ("16:32", 0, 16, 0, True), (8, 64, True))
    tuning.set_tuning(True)
    check(case, 1)
    chosen = tuning.choices()
    assert len(chosen) == 2
    check(case, 1)
    assert tuning.choices() == chosen


@pytest.mark.parametrize("tuned", [True, False])
def test_captured_in_a_graph(tuned):
    case = make(384, 640, 512, ("16:32", 0, 16, 0, True), (8, 64, True))
    x = torch.randn(1, 384, device="cuda", dtype=torch.bfloat16)
    tuning.set_tuning(tuned)
    factored_linear(x, *case)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = factored_linear(x, *case)
    for seed in range(3):
        x.copy_(torch.randn(1, 384, generator=torch.Generator().manual_seed(seed)))
        graph.replay()
        exact = reference(x, *case)
        assert float((y.double() - exact).norm() / exact.norm()) < 4e-3


def test_a_kernel_that_does_not_fit_is_ruled_out(monkeypatch):
    from triton.runtime.errors import OutOfResources

    case = make(640, 640, 512, ("16:32", 0, 16, 0, True), None)

    def too_large(*_):
        raise OutOfResources(300_000, 232_448, "shared memory")

    monkeypatch.setattr(cuda.launch, "balanced", too_large)
    options = cuda.launch.options
    monkeypatch.setattr(
        cuda.launch, "options", lambda s, t: [*options(s, t), (cuda.launch.sparse, cuda.launch.SPARSE_ONE[0])]
    )
    check(case, 1)
    assert tuning.failures()
    tuning.clear()


def test_without_any_kernel_that_runs(monkeypatch):
    case = make(384, 640, 512, ("12:32", 0, 8, 64, True), (8, 64, True))

    def fails(*_, **__):
        raise AssertionError("the compiler's own")

    monkeypatch.setattr(cuda.launch, "options", lambda *_: [(fails, cuda.launch.Config(1, 1, 1))])
    monkeypatch.setattr(cuda.launch, "unpacked", fails)
    for tokens in (1, 4):
        check(case, tokens, limit=6e-3)
    assert tuning.failures()
    tuning.clear()


def test_without_triton(monkeypatch, caplog):
    monkeypatch.setattr(cuda, "launch", None)
    monkeypatch.setattr(cuda, "no_triton", "not on this GPU")
    case = make(384, 640, 512, ("16:32", 0, 8, 0, True), (8, 0, True))
    check(case, 1, limit=6e-3)
    check(case, 40, limit=6e-3)
    assert caplog.text.count("Triton cannot be imported") == 1


def test_gradients_match_those_on_cpu():
    case = make(96, 128, 80, ("16:32", 0, 8, 0, True), (16, 0, True), torch.float32)
    x = torch.randn(5, 96)
    grads = []
    for device in ("cuda", "cpu"):
        packed = [{r: t.to(device).detach() for r, t in p.items()} for p in (case[0], case[2])]
        leaves = [packed[0]["values"], packed[1]["scales"], x.to(device)]
        for leaf in leaves:
            leaf.requires_grad_()
        factored_linear(leaves[2], packed[0], case[1], packed[1], case[3]).square().sum().backward()
        grads.append([leaf.grad.cpu() for leaf in leaves])
    for a, b in zip(*grads, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-4)


def test_compiled():
    case = make(384, 640, 512, ("16:32", 0, 16, 0, True), (8, 0, True))
    compiled = torch.compile(lambda x: factored_linear(x, *case) * 2, fullgraph=True)
    x = torch.randn(1, 384, device="cuda", dtype=torch.bfloat16)
    assert torch.equal(compiled(x), factored_linear(x, *case) * 2)


def test_the_next_row_is_not_read():
    """Rows end at the right place: a NaN in every other row stays there."""
    spec = MatrixSpec(64, 96, "free", 37)
    packed = random_packed(spec, torch.bfloat16, "cuda")
    packed["values"][::2] = float("nan")
    for tokens in (1, 16):
        y = factored_linear(torch.randn(tokens, 96, device="cuda", dtype=torch.bfloat16), None, None, packed, spec)
        assert bool(y[:, ::2].isnan().all())
        assert bool(y[:, 1::2].isfinite().all())


@pytest.mark.parametrize("state", [10, 12, 16])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_trellis_codes_are_decoded_as_on_the_cpu(bits, state):
    """Bit for bit, in every dtype."""
    spec = MatrixSpec(515, 609, bits=bits, trellis=Trellis(state, 4, 64))
    packed = random_packed(spec, torch.bfloat16, "cuda")
    on_cpu = {role: tensor.cpu() for role, tensor in packed.items()}
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(unpack(packed, spec, dtype).cpu(), unpack(on_cpu, spec, dtype))
    for tokens in (1, 4, 300):
        check((None, None, packed, spec), tokens, limit=5e-3)


def test_rotations_are_computed_as_on_the_cpu():
    """Sums, differences and one product per entry: the same on both, bit for bit."""
    rotation = Rotation(128)
    packed = random_rotation(GroupSpec(("a",), 609, (8,), MatrixSpec(8, 609), rotation=rotation), device="cuda")
    assert packed is not None
    x = torch.randn(5, 609, device="cuda")
    on_cpu = {role: tensor.cpu() for role, tensor in packed.items()}
    assert torch.equal(rotated(x, packed, rotation).cpu(), rotated(x.cpu(), on_cpu, rotation))


def test_trellis_codes_in_a_graph():
    spec = MatrixSpec(512, 384, bits=2, trellis=Trellis(16, 4, 64))
    case = (None, None, random_packed(spec, torch.bfloat16, "cuda"), spec)
    x = torch.randn(1, 384, device="cuda", dtype=torch.bfloat16)
    compiled = torch.compile(lambda x: factored_linear(x, *case), mode="reduce-overhead", fullgraph=True)
    for _ in range(4):  # without an eager call before: nothing may be left in the graph's memory
        assert torch.allclose(compiled(x), factored_linear(x, *case), rtol=1e-2, atol=1e-2)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = factored_linear(x, *case)
    for seed in range(3):
        x.copy_(torch.randn(1, 384, generator=torch.Generator().manual_seed(seed)))
        graph.replay()
        exact = reference(x, *case)
        assert float((y.double() - exact).norm() / exact.norm()) < 5e-3
