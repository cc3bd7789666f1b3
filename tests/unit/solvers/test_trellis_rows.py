import pytest
import torch

from cospadi.solvers import trellis_rows as module
from cospadi.solvers.feedback import damped, feedback, sweep
from cospadi.solvers.quantise import quantise_rows
from cospadi.solvers.trellis import decode, encode, spread
from cospadi.solvers.trellis_rows import (
    STRETCH,
    Problem,
    TrellisCode,
    trellis_many,
)
from gram import correlated, loss, rand

CODE = TrellisCode(bits=2, state=8, inputs=4, outputs=16)


def solve(rows, hessian, code=CODE, **options):
    return trellis_many([Problem(rows, hessian)], code, **options)[0]


def decoded(made, code, rows, columns):
    """The matrix that symbols and scales stand for: value t of a tile is in its row t // inputs, column t % inputs."""
    down, across, _ = made.symbols.shape
    levels = decode(made.symbols, code.bits, code.state).view(down, across, code.outputs, code.inputs)
    whole = levels.transpose(1, 2).reshape(down * code.outputs, across * code.inputs)
    return whole[:rows, :columns] * made.scales[:, None]


def share(hessian, rows, values):
    return loss(hessian, rows, values) / loss(hessian, rows, 0 * rows)


@pytest.mark.parametrize("shape", [(33, 33), (16, 4), (1, 1), (50, 130), (17, 3)])
@pytest.mark.parametrize("code", [CODE, TrellisCode(4, 9, 16, 8), TrellisCode(1, 8, 1, 64), TrellisCode(3, 10, 64, 1)])
def test_symbols_and_scales_decode_to_the_matrix(shape, code):
    rows, hessian = rand(*shape, seed=2), correlated(shape[1], seed=3)
    made = solve(rows, hessian, code)
    assert made.symbols.shape == (-(-shape[0] // code.outputs), -(-shape[1] // code.inputs), code.inputs * code.outputs)
    assert made.symbols.dtype == torch.uint8 and made.symbols.max() < 2**code.bits
    assert torch.equal(made.matrix, decoded(made, code, *shape))
    assert torch.equal(made.scales, made.scales.bfloat16().float())
    assert share(hessian, rows, made.matrix) < 0.5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scales_are_those_that_are_stored(dtype):
    made = solve(0.02 * rand(20, 12, seed=4), correlated(12), dtype=dtype, rounds=2)
    assert torch.equal(made.scales, made.scales.to(dtype).float()) and made.scales.min() > 0


@pytest.mark.parametrize(("bits", "limit"), [(2, 0.62), (4, 0.62)])
def test_feedback_beats_encoding_alone_and_integers(bits, limit):
    rows, hessian = rand(64, 96, seed=5), correlated(96, seed=6, tokens=400)
    code = TrellisCode(bits, 10, 4, 64)
    made = solve(rows, hessian, code)
    alone = solve(rows, torch.eye(96).double(), code)
    integers = quantise_rows(rows, bits=bits, group=0, symmetric=False, hessian=hessian, search=20, sweeps=2)
    assert loss(hessian, rows, made.matrix) < limit * loss(hessian, rows, alone.matrix)
    assert loss(hessian, rows, made.matrix) < limit * loss(hessian, rows, integers.matrix)


class Recorder:
    """Stands in for the encoder: notes targets and weights, and rounds targets to whole levels."""

    def __init__(self, monkeypatch):
        self.targets, self.weights = [], []
        monkeypatch.setattr(module, "encode_finite", self.encode)
        monkeypatch.setattr(module, "decode", lambda symbols, *_: symbols.float() - 128)

    def encode(self, targets, bits, state, weights):
        self.targets.append(targets)
        self.weights.append(weights)
        return (targets.round() + 128).clamp(0, 255).to(torch.uint8)


def test_blocks_of_one_input_are_gptq(monkeypatch):
    rows, hessian = 12 * rand(64, 40, seed=7), correlated(40, seed=8)
    code = TrellisCode(2, 8, 1, 64)
    scales = (rows.square().mean(1).sqrt() * STRETCH[2] / spread(8)).bfloat16().float()
    Recorder(monkeypatch)
    monkeypatch.setattr(module._State, "fitted", lambda self, levels, scales: (scales, scales))
    made = solve(rows, hessian, code)
    expected = sweep(
        rows / scales[:, None],
        feedback(hessian),
        lambda target, step: (target.round() + 128).clamp(0, 255) - 128,
    )
    assert float((made.matrix / scales[:, None] == expected).float().mean()) > 0.995
    assert share(hessian, rows, made.matrix) == pytest.approx(
        share(hessian, rows, expected * scales[:, None]), rel=1e-3
    )


@pytest.mark.parametrize("columns", [24, 33, 150])
def test_targets_are_the_best_given_earlier_errors_and_the_rest_is_the_loss(columns, monkeypatch):
    """Against float64 with explicit inverses; 150 columns are more than one outer block."""
    rows, hessian = rand(16, columns, seed=9), correlated(columns, seed=10, tokens=300)
    recorder = Recorder(monkeypatch)
    monkeypatch.setattr(module._State, "fitted", lambda self, levels, scales: (scales, scales))
    made = solve(rows, hessian)
    whole, scales = damped(hessian, 0.01), made.scales.double()[:, None]
    errors = rows.double() - made.matrix.double()
    blocks = torch.arange(columns).split(4)
    # the block that is not full comes last
    order = sorted(range(len(blocks)), key=lambda b: (len(blocks[b]) < 4, -hessian.diagonal()[blocks[b]].mean()))
    total = torch.zeros(())
    for turn, block in enumerate(order):
        at = blocks[block]
        before = torch.cat([at[:0], *(blocks[b] for b in order[:turn])])
        after = torch.cat([at[:0], *(blocks[b] for b in order[turn + 1 :])])
        rest = torch.cat([at, after])
        # the errors of this and all later blocks that are best given the earlier ones
        wanted = -torch.linalg.solve(whole[rest][:, rest], whole[rest][:, before] @ errors[:, before].T).T
        target = rows[:, at].double() - wanted[:, : len(at)]
        width = len(at)
        asked = recorder.targets[turn].view(16, 4)[:, :width].double() * scales
        torch.testing.assert_close(asked, target, rtol=1e-4, atol=1e-4)
        cost = whole[at][:, at]
        if len(after):
            cost = cost - whole[at][:, after] @ torch.linalg.solve(whole[after][:, after], whole[after][:, at])
        missed = made.matrix[:, at].double() - target
        total = total + ((missed @ cost) * missed).sum()
        weight = recorder.weights[turn].view(16, 4)[:, :width].double()
        expected = scales.square() * cost.diagonal()
        torch.testing.assert_close(weight / weight.max(), expected / expected.max(), rtol=1e-3, atol=1e-6)
        assert not recorder.weights[turn].view(16, 4)[:, width:].any()
    direct = ((errors @ whole) * errors).sum()
    torch.testing.assert_close(total, direct, rtol=1e-4, atol=0)


def test_scales_are_the_best_for_the_levels():
    rows, hessian = rand(32, 24, seed=11), correlated(24, seed=12)
    made = solve(rows, hessian)
    whole = damped(hessian, 0.01)
    levels = (made.matrix / made.scales[:, None]).double()
    best = ((levels @ whole) * rows.double()).sum(1) / ((levels @ whole) * levels).sum(1)
    torch.testing.assert_close(made.scales, best.float(), rtol=2**-8, atol=0)


def test_rounds_and_sweeps_never_raise_the_loss_of_a_tile_row():
    rows, hessian = rand(50, 40, seed=13), correlated(40, seed=14)
    whole, before = damped(hessian, 0.01), None
    for rounds, sweeps in [(1, 0), (2, 0), (3, 0), (3, 1), (3, 2)]:
        miss = (rows - solve(rows, hessian, rounds=rounds, sweeps=sweeps).matrix).double()
        losses = torch.stack([part.sum() for part in ((miss @ whole) * miss).sum(1).split(16)])
        if before is not None:
            assert bool((losses <= before * (1 + 1e-5)).all())
            assert losses.sum() < before.sum()
        before = losses


def test_padding_does_not_count():
    rows, hessian = rand(33, 33, seed=17), correlated(33, seed=18)
    made = solve(rows, hessian)
    # rows below, and inputs that nothing depends on, do not change what is above and before them
    whole = torch.zeros(40, 40, dtype=torch.float64)
    whole[:33, :33] = hessian
    whole.diagonal()[33:] = 1e-12
    wider = solve(torch.nn.functional.pad(rows, (0, 0, 0, 15)), hessian)
    assert torch.equal(wider.matrix[:33], made.matrix) and torch.equal(wider.scales[:33], made.scales)
    assert not wider.matrix[33:].any()


def test_matrices_side_by_side_are_as_alone():
    problems = [
        Problem(rand(33, 21, seed=19), correlated(21, seed=20)),
        Problem(rand(16, 21, seed=21), correlated(21, seed=22)),
        Problem(rand(70, 21, seed=24), correlated(21, seed=25)),
    ]
    for turn, made in enumerate(trellis_many(problems, CODE, rounds=2, sweeps=1)):
        alone = trellis_many([problems[turn]], CODE, rounds=2, sweeps=1)[0]
        assert torch.equal(made.symbols, alone.symbols) and torch.equal(made.scales, alone.scales)
    assert trellis_many([], CODE) == []


def test_the_same_symbols_twice():
    rows, hessian = rand(40, 33, seed=26), correlated(33, seed=27)
    first, second = (solve(rows, hessian, rounds=2, sweeps=1) for _ in range(2))
    assert torch.equal(first.symbols, second.symbols) and torch.equal(first.scales, second.scales)


@pytest.mark.parametrize("kind", ["zero", "rank one", "few inputs"])
def test_deficient_hessians(kind):
    rows, inputs = rand(20, 18, seed=28), rand(3, 18, seed=29)
    inputs = {"zero": 0 * inputs, "rank one": inputs[:1], "few inputs": inputs * (torch.arange(18) < 5)}[kind]
    hessian = (inputs.T @ inputs).double()
    made = solve(rows, hessian, rounds=2, sweeps=1)
    assert bool(torch.isfinite(made.matrix).all())
    if kind == "zero":  # then all inputs count alike
        assert share(torch.eye(18).double(), rows, made.matrix) < 0.15
    else:
        assert share(hessian, rows, made.matrix) < 0.05


def test_zero_rows_stay_zero():
    rows = rand(20, 18, seed=30)
    rows[3:7] = 0
    made = solve(rows, correlated(18), rounds=2, sweeps=1)
    assert not made.matrix[3:7].any() and not made.scales[3:7].any()
    assert bool(made.scales[:3].all()) and bool(torch.isfinite(made.matrix).all())
    assert not solve(0 * rows, correlated(18)).matrix.any()


@pytest.mark.parametrize("size", [1e-12, 1e6])
def test_the_size_of_weights_does_not_matter(size):
    rows, hessian = rand(20, 16, seed=31), correlated(16)
    power = 2.0 ** round(torch.tensor(size).log2().item())
    assert torch.equal(solve(rows * power, hessian).symbols, solve(rows, hessian).symbols)


def test_columns_matter_by_their_pivots():
    """The weights of a tile's columns are worth something: without them the loss is larger."""
    rows, hessian = rand(16, 64, seed=32), correlated(64, seed=33, tokens=400)
    code = TrellisCode(2, 10, 16, 16)
    made = solve(rows, hessian, code)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "encode_finite", lambda targets, bits, state, weights: encode(targets, bits, state))
        plain = solve(rows, hessian, code)
    assert loss(hessian, rows, made.matrix) < 0.97 * loss(hessian, rows, plain.matrix)


def test_bad_input_is_refused():
    rows, hessian = rand(16, 8, seed=34), correlated(8)
    with pytest.raises(ValueError, match="weights to encode are not all finite"):
        solve(rows / 0, hessian)
    with pytest.raises(ValueError, match="positive semi-definite"):
        solve(rows, -hessian)
    with pytest.raises(ValueError, match="different widths"):
        trellis_many([Problem(rows, hessian), Problem(rows[:, :4], hessian[:4, :4])], CODE)
    with pytest.raises(ValueError, match="tile of 48"):
        TrellisCode(2, 8, 3, 16)


def test_the_stretch_suits_gaussian_values():
    targets = rand(150, 64, seed=35)
    for bits in (1, 2, 3, 4):
        missed = []
        for factor in (0.85, 1.0, 1.25):
            scale = factor * STRETCH[bits] / spread(10)
            values = decode(encode(targets / scale, bits, 10), bits, 10) * scale
            missed.append(float((values - targets).square().sum()))
        assert missed[1] < min(missed[0], missed[2])


@pytest.mark.parametrize("shape", [(33, 33), (64, 48)])
def test_a_checkpoint_decodes_to_the_same_matrix(shape):
    from cospadi.format import MatrixSpec, Stored, pack, unpack
    from cospadi.format.trellis import Trellis

    made = solve(rand(*shape, seed=36), correlated(shape[1]))
    spec = MatrixSpec(*shape, bits=2, trellis=Trellis(CODE.state, CODE.inputs, CODE.outputs))
    packed = pack(Stored(made.symbols, made.scales[:, None]), spec)
    assert torch.equal(unpack(packed, spec), made.matrix)
