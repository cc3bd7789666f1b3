"""What tests of the engine share: the context of a run on the CPU, and a journal of its own."""

import torch

from cospadi.engine.context import RunContext
from cospadi.engine.journal import Journal

CPU = torch.device("cpu")


def run_context(view, store, ids, *, seen=None, **changes) -> RunContext:
    """A context; events of progress are added to `seen`."""
    progress = (lambda *event: seen.append(event)) if seen is not None else (lambda *_: None)
    fields = {"device": CPU, "dtype": torch.bfloat16, "seed": 0, "progress": progress} | changes
    return RunContext(view, store, ids, **fields)


def journal_in(folder) -> Journal:
    """The journal of some run in a folder; asked again it goes on."""
    journal = Journal(folder, {"run": "of a test"})
    journal.close()
    return journal
