"""What layers with one input and one dictionary share: the product x D, or on a GPU the outputs of the whole group.

The first layer of the group owns the dictionary. There are three ways to share, by what may be known when:

* `memo`: in eager mode. x D is computed once and remembered until every sibling has used it.
* `joined`: in eager mode without gradients, for a few tokens on a GPU. The codes of all siblings lie behind each other
  in one storage, and one product computes the outputs of the whole group, which are remembered in the same way.
* `traced`: in programs of `torch.compile` and `torch.export`, which are traced so that they do the same.
"""

from __future__ import annotations

from collections.abc import Sequence

from cospadi.layers.factor_tensors import FactorTensors
from cospadi.layers.siblings.joined import JoinedCodes
from cospadi.layers.siblings.memo import Memo, own_product
from cospadi.layers.siblings.traced import Traced

__all__ = ["Siblings", "own_product"]


class Siblings:
    """The members of a group, the first being the owner of the dictionary.

    A plain object, not a module: a sibling reaches the owner without registering the owner's parameters again.

    Attributes:
        members: all layers of the group, in order.
        joined: their codes in one storage.
        memo: their outputs in eager mode.
        traced: their outputs in a program that is being traced.
    """

    def __init__(self, members: Sequence[FactorTensors]) -> None:
        self.members = tuple(members)
        self.joined = JoinedCodes(self.members)
        self.memo = Memo(self.members, self.joined)
        self.traced = Traced(self.members, self.joined)

    @property
    def owner(self) -> FactorTensors:
        """The member that holds the dictionary."""
        return self.members[0]

    def parameters_moved(self) -> None:
        """Drop everything that was derived from the parameters; they have moved, as by ``module.to``."""
        self.joined.drop()
        self.memo.held = self.traced.held = None
