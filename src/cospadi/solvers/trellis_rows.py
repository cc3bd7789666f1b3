"""Matrices as trellis codes: scales, error feedback between blocks of inputs, scales refitted under the Gram.

A tile holds `inputs` columns of `outputs` rows, and its values are decided together. The blocks of `inputs` columns are
encoded one after another, and the target of a block contains what earlier errors ask of it. With H = U D Uᵀ, U unit
upper triangular in the order of the blocks, the loss of a row's error e is Σ_J δ_Jᵀ M_J δ_J with M_J = U_JJ D_J U_JJᵀ
and δ_J = e_J + U_JJ^-ᵀ Σ_{I<J} U_IJᵀ e_I. So the target of a block is w_J plus that sum (block LDL, as in QuIP#,
arXiv 2402.04396), and missing it costs M_J.

The diagonal of M_J and the squares of the rows' scales weight the errors within a tile. Its values share its bits: a
row of small weights leaves more of them to a row of large ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from cospadi.solvers.feedback import Feedback, damped, feedback
from cospadi.solvers.trellis import check_code, decode, encode_finite, spread

STRETCH = {1: 0.90, 2: 1.02, 3: 1.07, 4: 1.10}
"""Standard deviation of the scaled levels, as a multiple of the row's RMS, that leaves independent Gaussian values the
smallest error: measured at L = 10, 12 and 16 (10 prefers 1.03, 1.12, 1.16 at 2, 3, 4 bits; the minimum is flat)."""
COLUMNS = 128
"""Columns whose feedback from all columns before them is one matrix product."""


@dataclass(frozen=True)
class TrellisCode:
    """How a matrix is stored.

    Attributes:
        bits: K, bits a value.
        state: L, bits of a state.
        inputs: columns of a tile.
        outputs: rows of a tile.
    """

    bits: int
    state: int
    inputs: int
    outputs: int

    def __post_init__(self) -> None:
        check_code(self.bits, self.state, self.inputs * self.outputs)


@dataclass(frozen=True)
class TrellisRows:
    """A matrix in trellis codes.

    Attributes:
        symbols: uint8 (ceil(d_out / outputs), ceil(d_in / inputs), inputs · outputs). Value t of a tile belongs to its
            row t // inputs and its column t % inputs.
        scales: float32 (d_out,), exact in the dtype they are stored in.
        matrix: float32 (d_out, d_in), what the two decode to.
    """

    symbols: Tensor
    scales: Tensor
    matrix: Tensor


@dataclass(frozen=True)
class Problem:
    """A matrix to encode.

    Attributes:
        rows: (d_out, d_in) float.
        hessian: H (d_in, d_in) of its inputs: the loss of a row's error e is eᵀ H e.
    """

    rows: Tensor
    hessian: Tensor


def trellis_many(
    problems: Sequence[Problem],
    code: TrellisCode,
    *,
    damping: float = 0.01,
    rounds: int = 1,
    sweeps: int = 0,
    dtype: torch.dtype = torch.bfloat16,
) -> list[TrellisRows]:
    """Encode matrices of equal width side by side, so that many tiles are encoded at a time.

    Results do not depend on which matrices are side by side.

    Args:
        problems: the matrices.
        code: of all.
        damping: of the Hessians, as a share of their mean diagonal.
        rounds: of error feedback and of refitting scales. A further round starts from the scales of the one before, and
            each row of tiles keeps the best result.
        sweeps: of coordinate descent afterwards: every tile in turn is encoded again, given all others.
        dtype: in which scales are stored.

    Returns:
        the codes of each problem. No further round or sweep raises the loss under the damped Hessian.

    Raises:
        ValueError: if widths differ, rows are not finite, or a Hessian is not positive semi-definite.
    """
    if len({problem.rows.shape[1] for problem in problems}) > 1:
        raise ValueError("matrices of different widths cannot be encoded side by side")
    work = [_State(problem, code, damping, dtype) for problem in problems]
    plans = [_plan(item, damping) for item in work] if rounds else []
    for _ in range(rounds):
        _encode_blocks([_Sweep(item, plan) for item, plan in zip(work, plans, strict=True)], code)
    for _ in range(sweeps):
        _encode_blocks([_Descent(item) for item in work], code)
    return [TrellisRows(item.symbols, item.scales, item.values()) for item in work]


class _State:
    """What is known about a matrix between passes.

    Attributes:
        rows: float32 (d_out, d_in).
        curvature: float32 (d_in, d_in), the damped Hessian.
        scales: float32 (d_out,).
        levels: float32 (d_out, d_in) of the symbols.
        symbols: uint8 (row tiles, column tiles, T).
        loss: float32 (row tiles,).
    """

    def __init__(self, problem: Problem, code: TrellisCode, damping: float, dtype: torch.dtype) -> None:
        self.code, self.dtype, self.rows = code, dtype, problem.rows.float()
        if not bool(torch.isfinite(self.rows).all()):
            raise ValueError("the weights to encode are not all finite")
        count, self.columns = self.rows.shape
        self.down, self.across = -(-count // code.outputs), -(-self.columns // code.inputs)
        device = self.rows.device
        self.hessian = problem.hessian.to(device)
        self.curvature = damped(self.hessian, damping).float()
        self.scales = self.stored(self.rows.square().mean(1).sqrt() * (STRETCH[code.bits] / spread(code.state)))
        self.levels = torch.zeros_like(self.rows)
        size = code.inputs * code.outputs
        self.symbols = torch.zeros(self.down, self.across, size, dtype=torch.uint8, device=device)
        self.loss = torch.full((self.down,), torch.inf, device=device)

    def stored(self, scales: Tensor) -> Tensor:
        """Scales as a checkpoint holds them."""
        return scales.to(self.dtype).float()

    def slice(self, block: int) -> slice:
        """The columns of a block."""
        return slice(block * self.code.inputs, min((block + 1) * self.code.inputs, self.columns))

    def values(self) -> Tensor:
        """The matrix (d_out, d_in) as it stands."""
        return self.levels * self.scales[:, None]

    def padded(self, rows: Tensor) -> Tensor:
        """Rows (d_out, …) with as many rows of zeros as the last row of tiles lacks."""
        missing = self.down * self.code.outputs - len(rows)
        return torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])]) if missing else rows

    def normalised(self, rows: Tensor) -> Tensor:
        """Rows (d_out, n) in units of levels, padded."""
        return self.padded(rows / torch.where(self.scales > 0, self.scales, 1.0)[:, None])

    def row_weights(self) -> Tensor:
        """What the squared error of one level costs in each row, (row tiles · outputs, 1); only ratios count."""
        relative = self.scales / self.scales.amax().clamp_min(torch.finfo(torch.float32).tiny)
        return self.padded(relative.square()[:, None])

    def per_tile(self, losses: Tensor) -> Tensor:
        """Sums (row tiles,) of the losses of rows (d_out,)."""
        padding = self.down * self.code.outputs - len(losses)
        return torch.nn.functional.pad(losses, (0, padding)).view(self.down, -1).sum(1)

    def spread(self, chosen: Tensor) -> Tensor:
        """Rows (d_out, 1) of some row tiles, bool."""
        return chosen.repeat_interleave(self.code.outputs)[: len(self.rows), None]

    def fitted(self, levels: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
        """The best scales for levels, where better than the given ones, and the losses (d_out,)."""
        image = levels @ self.curvature
        right, norm = (image * self.rows).sum(1), (image * levels).sum(1)
        best = self.stored(torch.where((right > 0) & (norm > 0), right / norm, scales))
        after, before = (self.losses(self.rows - levels * choice[:, None]) for choice in (best, scales))
        better = after <= before
        return torch.where(better, best, scales), torch.where(better, after, before)

    def losses(self, errors: Tensor) -> Tensor:
        """Losses (d_out,) of errors (d_out, d_in)."""
        return ((errors @ self.curvature) * errors).sum(1)

    def keep_better(self, levels: Tensor, symbols: Tensor) -> None:
        """Adopt row tiles of new levels and symbols where their loss, with scales fitted, is smaller."""
        scales, losses = self.fitted(levels, self.scales)
        loss = self.per_tile(losses)
        better = loss < self.loss
        self.loss = torch.where(better, loss, self.loss)
        rows = self.spread(better)
        self.levels = torch.where(rows, levels, self.levels)
        self.scales = torch.where(rows[:, 0], scales, self.scales)
        self.symbols = torch.where(better[:, None, None], symbols, self.symbols)


class _Pass(Protocol):
    """One visit to every block of a matrix.

    Targets, weights and levels are those of all rows of all tiles, padding included, and targets are in units of
    levels: rows (row tiles · outputs, inputs) are tiles already when they are viewed as (row tiles, T).
    """

    state: _State

    def ask(self, turn: int) -> tuple[Tensor, Tensor]:
        """Targets of the block of this turn, and the weights of their squared errors, of which only ratios count."""

    def take(self, turn: int, symbols: Tensor, levels: Tensor) -> None:
        """The symbols (row tiles, T) of that block and their levels."""

    def done(self) -> None:
        """All blocks are encoded."""


@dataclass(frozen=True)
class _Plan:
    """Error feedback between blocks.

    Attributes:
        order: the block of each turn.
        starts: where the columns of each turn start in processing order, and where the last ends.
        places: (d_in,) the columns in processing order.
        factor: U, float32 (d_in, d_in), in processing order.
        inverses: U_JJ⁻¹ of every turn.
        costs: diagonal of M_J of every turn.
    """

    order: list[int]
    starts: list[int]
    places: Tensor
    factor: Tensor
    inverses: list[Tensor]
    costs: list[Tensor]


def _plan(state: _State, damping: float) -> _Plan:
    """Blocks by falling mean diagonal: the most important are encoded while most others can still compensate.

    A block with fewer columns than the others, at the end of the matrix, is the last one.
    """
    columns, each = state.columns, state.code.inputs
    whole = columns // each
    diagonal = state.hessian.diagonal().double()
    means = diagonal[: whole * each].view(whole, each).mean(1)
    order = means.argsort(descending=True, stable=True)
    places = torch.arange(columns, device=diagonal.device)
    chosen = places[: whole * each].view(whole, each)[order].flatten()
    places = torch.cat([chosen, places[whole * each :]])
    found: Feedback = feedback(state.hessian, damping, places, torch.float64)
    unit = found.coupling + torch.eye(columns, dtype=torch.float64, device=diagonal.device)
    inverses: list[Tensor] = []
    costs: list[Tensor] = []
    for start, stop, width in ((0, whole * each, each), (whole * each, columns, columns % each)):
        if start == stop:
            continue
        near = unit[start:stop, start:stop].view(-1, width, (stop - start) // width, width)
        near = near.diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        eye = torch.eye(width, dtype=torch.float64, device=near.device).expand_as(near)
        inverses += torch.linalg.solve_triangular(near, eye, upper=True).float().unbind()
        costs += (near.square() @ found.cost[start:stop].view(-1, width, 1))[:, :, 0].float().unbind()
    blocks = [*order.tolist(), *([whole] if columns % each else [])]
    starts = [*range(0, whole * each, each), *([whole * each] if columns % each else []), columns]
    return _Plan(blocks, starts, places, unit.float(), inverses, costs)


class _Sweep:
    """Error feedback from block to block, in units of levels and with the columns in processing order."""

    def __init__(self, state: _State, plan: _Plan) -> None:
        self.state, self.plan = state, plan
        self.per = max(1, COLUMNS // state.code.inputs)
        self.rows, self.weights = state.normalised(state.rows[:, plan.places]), state.row_weights()
        self.errors, self.levels = torch.zeros_like(self.rows), torch.empty_like(self.rows)
        self.symbols: list[Tensor] = []

    def ask(self, turn: int) -> tuple[Tensor, Tensor]:
        plan, starts = self.plan, self.plan.starts
        first = turn // self.per * self.per
        begin, at = starts[first], slice(starts[turn], starts[turn + 1])
        if turn == first:
            last = starts[min(first + self.per, len(plan.order))]
            self.pending = self.errors[:, :begin] @ plan.factor[:begin, begin:last]
        near = torch.addmm(
            self.pending[:, at.start - begin : at.stop - begin],
            self.errors[:, begin : at.start],
            plan.factor[begin : at.start, at],
        )
        return torch.addmm(self.rows[:, at], near, plan.inverses[turn]), self.weights * plan.costs[turn]

    def take(self, turn: int, symbols: Tensor, levels: Tensor) -> None:
        at = slice(self.plan.starts[turn], self.plan.starts[turn + 1])
        levels = levels[:, : at.stop - at.start]
        torch.sub(self.rows[:, at], levels, out=self.errors[:, at])
        self.levels[:, at] = levels
        self.symbols.append(symbols)

    def done(self) -> None:
        plan, count = self.plan, len(self.state.rows)
        levels, symbols = torch.empty_like(self.state.rows), torch.empty_like(self.state.symbols)
        levels[:, plan.places] = self.levels[:count]
        symbols[:, torch.tensor(plan.order, device=symbols.device)] = torch.stack(self.symbols, 1)
        self.state.keep_better(levels, symbols)


class _Descent:
    """Coordinate descent: every tile is encoded again, given all others, and kept if that lowers the loss."""

    def __init__(self, state: _State) -> None:
        self.state, self.per = state, max(1, COLUMNS // state.code.inputs)
        self.errors, self.weights = state.rows - state.values(), state.row_weights()

    def ask(self, turn: int) -> tuple[Tensor, Tensor]:
        state, at = self.state, self.state.slice(turn)
        first = turn // self.per * self.per
        self.begin = state.slice(first).start
        if turn == first:
            last = state.slice(min(first + self.per, state.across) - 1).stop
            self.slope = self.errors @ state.curvature[:, self.begin : last]
        near = state.curvature[at, at]
        slope = self.slope[:, at.start - self.begin : at.stop - self.begin]
        # no check, for which the host would wait: a damped Hessian is regular
        step = torch.linalg.solve_ex(near.double(), slope.T.double())[0].T.float()
        self.targets = state.levels[:, at] * state.scales[:, None] + step
        return state.normalised(self.targets), self.weights * near.diagonal()

    def take(self, turn: int, symbols: Tensor, levels: Tensor) -> None:
        state, at = self.state, self.state.slice(turn)
        levels = levels[: len(state.rows), : at.stop - at.start]
        near, losses = state.curvature[at, at], []
        for choice in (levels, state.levels[:, at]):
            missed = choice * state.scales[:, None] - self.targets
            losses.append(state.per_tile(((missed @ near) * missed).sum(1)))
        better = losses[0] < losses[1]
        new = torch.where(state.spread(better), levels, state.levels[:, at])
        change = (new - state.levels[:, at]) * state.scales[:, None]
        state.levels[:, at] = new
        state.symbols[:, turn] = torch.where(better[:, None], symbols, state.symbols[:, turn])
        self.errors[:, at] -= change
        self.slope[:, at.stop - self.begin :] -= (
            change @ state.curvature[at, at.stop : self.begin + self.slope.shape[1]]
        )

    def done(self) -> None:
        """Fit the scales to the new levels."""
        state = self.state
        state.scales, losses = state.fitted(state.levels, state.scales)
        state.loss = state.per_tile(losses)


def _encode_blocks(passes: Sequence[_Pass], code: TrellisCode) -> None:
    """Take all matrices through their blocks, the tiles of one block of each at a time.

    A turn is a dozen operations for each matrix and as many for all of them: the host must not be what a GPU waits for.
    """
    size = code.inputs * code.outputs
    counts = [item.state.down for item in passes]
    for turn in range(passes[0].state.across if passes else 0):
        asked = [item.ask(turn) for item in passes]
        missing = code.inputs - asked[0][0].shape[1]
        if missing:
            pad = torch.nn.functional.pad
            asked = [(pad(targets, (0, missing)), pad(weights, (0, missing))) for targets, weights in asked]
        targets, weights = (torch.cat([pair[i].view(-1, size) for pair in asked]) for i in (0, 1))
        symbols = encode_finite(targets, code.bits, code.state, weights)
        levels = decode(symbols, code.bits, code.state)
        pieces = zip(passes, torch.split(symbols, counts), torch.split(levels, counts), strict=True)
        for item, part, found in pieces:
            item.take(turn, part, found.view(-1, code.inputs))
    for item in passes:
        item.done()
