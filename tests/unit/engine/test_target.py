"""What stands beside the tensors, against files that were really written."""

from pathlib import Path

import pytest

from cospadi.checkpoint import factor_bytes, format_for, save
from cospadi.engine.plan.plan import make_plan, target_keep
from cospadi.engine.plan.target import side_bytes
from cospadi.errors import BudgetError
from cospadi.kernels.synthetic import random_packed
from cospadi.model_view import discover, open_model
from cospadi.recipe import Recipe
from tiny import save_tiny


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "opt"])
@pytest.mark.parametrize("changes", [{}, {"options": {"value_bits": 4, "dictionary_bits": 8}}, {"method": "svd"}])
def test_a_close_upper_bound(tmp_path: Path, architecture, changes):
    model, tokenizer = open_model(save_tiny(tmp_path / "m", architecture))
    plan = make_plan(discover(model), Recipe(method="pursuit", keep=0.8).merged(changes))
    specs = [group.spec for group in plan.groups]
    bound = side_bytes(model, specs, plan.bytes_after + plan.other_bytes)
    format_for(specs).replace(model, specs)
    for spec in specs:
        parts = {"codes": spec.codes} | ({"dictionary": spec.dictionary} if spec.dictionary else {})
        packed = {f"{part}.{role}": t for part, matrix in parts.items() for role, t in random_packed(matrix).items()}
        format_for(specs).install(model, spec, packed)
    save(model, tokenizer, tmp_path / "out", specs)
    files = sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    beside = files - factor_bytes(tmp_path / "out") - plan.other_bytes
    assert beside <= bound <= 1.25 * beside + 1000


def test_target_keep():
    assert target_keep(700, 1000, 200) == 0.5
    for target in (200, 100):
        with pytest.raises(BudgetError, match=f"{target} bytes is below.*200 bytes"):
            target_keep(target, 1000, 200)
    with pytest.raises(BudgetError, match=r"already fits.*1,200"):
        target_keep(1200, 1000, 200)
