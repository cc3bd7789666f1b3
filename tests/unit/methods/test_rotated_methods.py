"""Trellis codes and integers on rotated weights: what is stored decodes to what was solved, and it pays."""

import pytest
import torch

from cospadi.engine.factorise import output_error, solve
from cospadi.format import GroupShape
from cospadi.methods.auto import auto_plan, solved_by
from cospadi.methods.base import Problem, get_method
from cospadi.methods.trellis import trellis_plan
from gram import correlated

QUICK = {"trellis": {"state": 8}, "rotated": {}}


def problem(widths=(64, 50), d=96, seed=0, grams=1):
    generator = torch.Generator().manual_seed(seed)
    weights = tuple(torch.randn(d, n, generator=generator) * 0.05 for n in widths)
    weights[0][7] *= 12  # an input that stands out
    return Problem("p", weights, tuple(correlated(d, seed=i, tokens=400) for i in range(grams)), seed=3)


def solved(name, options, made):
    shape = GroupShape(tuple(f"m{i}" for i in range(len(made.weights))), len(made.weights[0]), tuple(
        weight.shape[1] for weight in made.weights
    ))  # fmt: skip
    spec = get_method(name).spec(shape, 10**9, QUICK.get(name, {}) | options)
    packed = solve(spec, QUICK.get(name, {}) | options, made)
    assert sum(t.numel() * t.element_size() for t in packed.values()) == spec.bytes
    missed, energy = output_error(torch.cat(made.weights, 1), spec.weight(packed), made.grams[0])
    return spec, packed, missed / energy


@pytest.mark.parametrize("name", ["trellis", "rotated"])
def test_more_bits_less_error(name):
    errors = [solved(name, {"bits": bits}, problem())[2] for bits in (2, 3, 4)]
    assert errors[0] > 2.5 * errors[1] > 6 * errors[2]


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_trellis_codes_beat_integers_of_more_bytes(bits):
    made = problem()
    trellis, _, error = solved("trellis", {"bits": bits}, made)
    integers, _, other = solved("gptq", {"bits": bits, "group": 64}, made)
    assert trellis.codes.bytes < integers.codes.bytes and error < 0.85 * other


def test_the_rotation_is_worth_it():
    made = problem()
    rotated = solved("rotated", {"bits": 3}, made)[2]
    assert rotated < 0.8 * solved("gptq", {"bits": 3, "group": 0, "symmetric": True}, made)[2]


@pytest.mark.parametrize("name", ["trellis", "rotated"])
def test_modules_may_have_grams_of_their_own(name):
    made = problem(grams=2)
    _, packed, _ = solved(name, {"bits": 3}, made)
    alone = Problem("p", made.weights[:1], made.grams[:1], seed=3)
    for key, tensor in solved(name, {"bits": 3}, alone)[1].items():
        if key.startswith("codes") and name == "rotated":  # input scales look at all modules
            assert tensor.shape[1:] == packed[key].shape[1:]
    assert packed["rotation.signs"].numel() == 3


@pytest.mark.parametrize("name", ["trellis", "rotated"])
def test_the_same_numbers_twice(name):
    first, second = (solved(name, {"bits": 2}, problem(widths=(33,), d=70))[1] for _ in range(2))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_the_plan_takes_the_most_bits_that_fit():
    shape = GroupShape(("a",), 576, (1536,))
    sizes = {bits: trellis_plan(shape, 10**9, bits=bits).bytes for bits in (1, 2, 3, 4)}
    for bits in (2, 3, 4):
        assert trellis_plan(shape, sizes[bits]).codes.bits == bits
        assert trellis_plan(shape, sizes[bits] - 1).codes.bits == max(2, bits - 1)
    assert sizes[2] * 8 / (576 * 1536) < 2.05
    assert trellis_plan(shape, 10**9).codes.trellis.inputs == 4
    assert trellis_plan(GroupShape(("a",), 1536, (576,)), 10**9).codes.trellis.inputs == 8


def test_auto_knows_how_its_choices_are_solved():
    shape = GroupShape(("a", "b"), 576, (576, 192))
    sizes = {2: 0.135, 3: 0.2, 4: 0.27}
    for bits, keep in sizes.items():
        spec = auto_plan(shape, int(keep * shape.dense_bytes))
        assert spec.codes.trellis is not None and spec.codes.bits <= bits and solved_by(spec)[0] == "trellis"
        fast = auto_plan(shape, int(1.3 * keep * shape.dense_bytes), favour="speed")
        assert fast.codes.trellis is None and solved_by(fast)[0] == "gptq"


@pytest.mark.parametrize("name", ["trellis", "auto"])
def test_a_processor_takes_a_shorter_state_unless_told_otherwise(name):
    method = get_method(name)
    assert method.check(method.options_on("cpu", {}))["state"] == 10
    assert method.check(method.options_on("cpu", {"state": 12}))["state"] == 12
    assert method.check(method.options_on("cuda", {}))["state"] == 16


def test_auto_favours_speed_on_a_processor_and_size_on_a_gpu():
    method = get_method("auto")
    assert method.check(method.options_on("cpu", {}))["favour"] == "speed"
    assert method.check(method.options_on("cpu", {"favour": "size"}))["favour"] == "size"
    assert method.check(method.options_on("cuda", {}))["favour"] == "size"
