"""Which order of the two products is cheaper, counted in floating-point operations.

For T tokens the two orders of ``x D S`` cost, in multiply-adds,

* two steps, ``(x D) S``:   T · atoms · (d_in + rows);
* rebuilt, ``x (D S)``:     rows · atoms · d_in + T · d_in · rows.

Unpacking the factors costs the same in both. Rebuilding pays only for very many tokens, and only where the two factors
together hold more numbers than W.
"""

from cospadi.format import MatrixSpec


def rebuild_pays(tokens: int, dictionary: MatrixSpec | None, codes: MatrixSpec) -> bool:
    """Whether ``x (D S)`` needs fewer multiply-adds than ``(x D) S``.

    Args:
        tokens: rows of x.
        dictionary: spec of Dᵀ; None for the identity, with which there is nothing to rebuild.
        codes: spec of Sᵀ.
    """
    if dictionary is None:
        return False
    d_in, atoms, rows = dictionary.columns, dictionary.rows, codes.rows
    two_steps = tokens * atoms * (d_in + rows)
    rebuilt = rows * atoms * d_in + tokens * d_in * rows
    return rebuilt < two_steps
