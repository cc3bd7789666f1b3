"""K-SVD: sparse coding alternates with sequential rank-1 updates of the atoms.

Reference: Aharon, Elad, Bruckstein, "K-SVD", 2006; with the power iteration and the defaults of CoSpaDi
(arXiv 2509.22075, Algorithm 1).
"""

import torch
from torch import Tensor

from cospadi.solvers.mod import least_squares_dictionary, unit_atoms
from cospadi.solvers.omp import batch_omp, exact_matmul


def random_atoms(target: Tensor, atoms: int, seed: int) -> Tensor:
    """Distinct random columns of the target, normalised; Gaussian vectors replace missing and zero columns.

    Args:
        target: Y (d, n).
        atoms: k.
        seed: of the choice, which is the same on every device.

    Returns:
        D (d, k), in the target's dtype and on its device.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(target.shape[1], generator=generator)[:atoms]
    dictionary = torch.randn(target.shape[0], atoms, generator=generator, dtype=torch.float64).to(target)
    columns = target[:, order.to(target.device)]
    nonzero = torch.linalg.vector_norm(columns, dim=0) > 0
    dictionary[:, : order.numel()] = torch.where(nonzero, columns, dictionary[:, : order.numel()])
    norms: Tensor = torch.linalg.vector_norm(dictionary, dim=0)
    return dictionary / norms


class AtomSweep:
    """One pass of rank-1 updates over all atoms.

    The support of an atom is a mask over all columns instead of an index list, and the atom's index lives on the
    device. Every update therefore has the same shapes and never synchronises. On CUDA one update is captured as a graph
    and replayed once per atom: launching its forty small kernels would take longer than running them.
    """

    def __init__(self, target: Tensor, atoms: int, power_iterations: int) -> None:
        """Allocate the state of a pass.

        Args:
            target: Y (d, n); only its shape, dtype and device matter.
            atoms: k.
            power_iterations: per atom. They start from the atom itself, so no update can raise the error.
        """
        rows, columns = target.shape
        self.atoms = atoms
        self.power_iterations = power_iterations
        self.dictionary = target.new_zeros(atoms, rows)
        self.codes = target.new_zeros(atoms, columns)
        self.residual = target.new_zeros(rows, columns)
        self.index = torch.zeros(1, dtype=torch.int64, device=target.device)
        self._graph: torch.cuda.CUDAGraph | None = self._capture() if target.is_cuda else None

    def __call__(self, target: Tensor, dictionary: Tensor, codes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Update every atom once, in order, with its coefficients.

        Args:
            target: Y (d, n).
            dictionary: D (d, k), unit-norm columns.
            codes: S (k, n); their zeros stay zeros.

        Returns:
            new D (d, k) with unit-norm columns (unused atoms unchanged), new S, and ‖Y − D S‖² (0-dim).
        """
        self.dictionary.copy_(dictionary.T)
        self.codes.copy_(codes)
        torch.addmm(target, dictionary, codes, alpha=-1, out=self.residual)
        self.index.zero_()
        for _ in range(self.atoms):
            if self._graph is None:
                self._update()
            else:
                self._graph.replay()
        return self.dictionary.T.clone(), self.codes.clone(), self.residual.square().sum()

    def _update(self) -> None:
        """Replace atom `index` and its coefficients by the leading rank-1 term of the residual without them."""
        atom = self.dictionary.index_select(0, self.index).squeeze(0)
        old = self.codes.index_select(0, self.index).squeeze(0)
        mask = (old != 0).to(old.dtype)
        self.residual.addr_(atom, old)  # on the support this is now the residual without the atom
        tiny = torch.finfo(atom.dtype).tiny
        direction = atom
        for _ in range(self.power_iterations):
            grown = torch.mv(self.residual, torch.mv(self.residual.T, direction) * mask)
            size = torch.linalg.vector_norm(grown)
            direction = torch.where(size > tiny, grown / size, direction)
        new = torch.mv(self.residual.T, direction) * mask
        self.residual.addr_(direction, new, alpha=-1)
        self.dictionary.index_copy_(0, self.index, direction.unsqueeze(0))
        self.codes.index_copy_(0, self.index, new.unsqueeze(0))
        self.index.add_(1)

    def _capture(self) -> torch.cuda.CUDAGraph:
        # All state is still zero, so these warm-up updates change nothing but the index.
        stream = torch.cuda.Stream(self.residual.device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(self.residual.device))
        with torch.cuda.device(self.residual.device), torch.cuda.stream(stream):
            for _ in range(2):
                self.index.zero_()
                self._update()
            self.index.zero_()
        torch.cuda.current_stream(self.residual.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.residual.device), torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._update()
        return graph


def ksvd(
    target: Tensor,
    atoms: int,
    nonzeros: int,
    *,
    rounds: int = 60,
    power_iterations: int = 8,
    tolerance: float = 0.0,
    seed: int = 0,
    update: str = "ksvd",
) -> tuple[Tensor, Tensor, list[float]]:
    """Factor Y ≈ D S with exactly `nonzeros` coefficients in every column of S.

    Args:
        target: Y (d, n), float32 or float64.
        atoms: k, columns of D.
        nonzeros: s, 0 < s <= k.
        rounds: maximum number of rounds of sparse coding and dictionary update.
        power_iterations: per atom and round.
        tolerance: stop once a round lowers the error by less than this share; 0: run all rounds.
        seed: of the initial dictionary, see :func:`random_atoms`.
        update: ``"ksvd"``: atom by atom; ``"mod"``: all atoms at once by least squares.

    Returns:
        D (d, k) with unit-norm columns, S (k, n), and ‖Y − D S‖² after each round.

    Raises:
        ValueError: if `update` is unknown, or `nonzeros` is not in 1 … k.
    """
    if update not in ("ksvd", "mod"):
        raise ValueError(f"update must be 'ksvd' or 'mod', not {update!r}")
    dictionary = random_atoms(target, atoms, seed)
    codes = target.new_zeros(atoms, target.shape[1])
    sweep = AtomSweep(target, atoms, power_iterations) if update == "ksvd" else None
    losses: list[float] = []
    for number in range(1, rounds + 1):
        codes = batch_omp(dictionary, target, nonzeros)
        with exact_matmul():
            if sweep is not None:
                dictionary, codes, error = sweep(target, dictionary, codes)
            else:
                dictionary, codes = unit_atoms(least_squares_dictionary(target, codes, fallback=dictionary), codes)
                error = (target - dictionary @ codes).square().sum()
        losses.append(float(error))
        if tolerance and number > 1 and losses[-2] - losses[-1] < tolerance * losses[-2]:
            break
    return dictionary, codes, losses
