"""Refinement: what is tuned is what is stored, held-out text decides, and the checkpoint holds the result."""

import pytest
import torch
from safetensors.torch import load_file

from checkpoints.factory import random_rotation, random_symbols
from cospadi.engine.compress import compress
from cospadi.engine.tune import block as refine
from cospadi.engine.tune.block import block_error, refine_layer
from cospadi.engine.tune.streams import Streams
from cospadi.engine.tune.tunable import TunableGroup
from cospadi.errors import RecipeError
from cospadi.format import Factors, GroupSpec, MatrixSpec, Rotation, Stored, Trellis, part_of, split_codes, unpack
from cospadi.format.patterns import keep_largest
from cospadi.model_view import discover
from cospadi.recipe import Recipe, Refine
from cospadi.solvers.quantise import quantise_rows
from tiny import save_tiny, tiny_model, tiny_text, token_ids

CPU = torch.device("cpu")


def stored(spec, generator):
    matrix = torch.randn(spec.rows, spec.columns, generator=generator)
    mask = keep_largest(matrix, spec.nonzeros, spec.pattern, dim=1) if spec.sparse else None
    if mask is not None:
        matrix = matrix * mask
    if not spec.integer:
        return Stored(matrix, support=mask)
    grid = {"bits": spec.bits, "group": spec.group, "symmetric": spec.symmetric, "half": spec.half}
    found = quantise_rows(matrix, **grid, support=mask)
    return Stored(found.matrix, found.scales, found.zeros, mask)


SPECS = {
    "16 bits, balanced": ({"pattern": "16:32"}, {}),
    "14 bits, free": ({"pattern": "free", "nonzeros": 11, "bits": 14}, {"bits": 8}),
    "8 bits": ({"pattern": "4:8", "bits": 8, "group": 5}, {"bits": 8, "group": 4}),
    "4 bits": ({"pattern": "8:16", "bits": 4, "group": 8}, {"bits": 4}),
    "3 bits, asymmetric": ({"bits": 3, "group": 7, "symmetric": False}, {"bits": 3, "symmetric": False}),
    "2 bits, identity": ({"bits": 2, "group": 8, "symmetric": False}, None),
    "16 bits, pruned": ({"pattern": "5:8"}, None),
    "3 bits, half steps": ({"bits": 3, "group": 7, "symmetric": False, "half": True}, {"bits": 4, "half": True}),
    "trellis": ({"bits": 2, "trellis": Trellis(10, 4, 16)}, None),
    "trellis of a dictionary": ({"bits": 3, "trellis": Trellis(12, 8, 8)}, {"bits": 8}),
}
TURNED = {"3 bits, half steps": Rotation(16, scales=False), "trellis": Rotation(8)}


def made(kind, seed=0, d_in=22, atoms=37, d_out=(9, 5)):
    generator = torch.Generator().manual_seed(seed)
    codes_options, dictionary_options = SPECS[kind]
    atoms = d_in if dictionary_options is None else atoms
    dictionary = None if dictionary_options is None else MatrixSpec(atoms, d_in, **dictionary_options)
    codes = MatrixSpec(sum(d_out), atoms, **codes_options)
    spec = GroupSpec(("a", "b"), d_in, d_out, codes, dictionary, rotation=TURNED.get(kind))
    if codes.trellis is None:
        found = stored(codes, generator)
    else:
        found = random_symbols(codes, sum(spec.lengths("values")), generator, torch.bfloat16)
    rotation = None if spec.rotation is None else random_rotation(spec.rotation, d_in, generator, torch.bfloat16)
    factors = Factors(found, None if dictionary is None else stored(dictionary, generator), rotation=rotation)
    return spec, factors.pack(spec, torch.bfloat16), generator


@pytest.mark.parametrize("kind", SPECS)
def test_untouched_parameters_pack_to_the_same_bytes(kind):
    spec, tensors, _ = made(kind)
    group = TunableGroup(spec, tensors, torch.bfloat16, CPU)
    packed = group.packed()
    assert packed.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert torch.equal(packed[key], tensor), key
    assert torch.allclose(torch.cat(group.weights()).double().T, spec.weight(tensors), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", SPECS)
def test_moved_parameters_compute_exactly_what_they_pack_to(kind):
    spec, tensors, generator = made(kind)
    group = TunableGroup(spec, tensors, torch.bfloat16, CPU)
    with torch.no_grad():
        for k in group.knobs:
            k.tensor.add_(0.4 * k.unit * torch.randn(k.tensor.shape, generator=generator))
    packed = group.packed()
    for index, codes in enumerate(split_codes(spec, part_of(packed, "codes"))):
        rows = torch.cat([part.matrix() for part in group.codes]).detach().split(list(spec.d_out))[index]
        assert torch.equal(unpack(codes, spec.module_codes(index)), rows)
    moved = {key for key in tensors if not torch.equal(packed[key], tensors[key])}
    assert "codes.scales" in moved or not spec.codes.integer
    assert ("codes.values" in moved) == (spec.codes.trellis is None)
    assert ("rotation.scales" in moved) == (spec.rotation is not None and spec.rotation.scales)
    assert not moved & {"codes.mask", "codes.zeros", "dictionary.zeros", "rotation.signs"}
    weight = torch.cat(group.weights()).detach().double().T
    assert torch.allclose(weight, spec.weight(packed), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", SPECS)
def test_everything_gets_a_gradient_and_clipped_levels_none(kind):
    spec, tensors, generator = made(kind)
    group = TunableGroup(spec, tensors, torch.bfloat16, CPU)
    codes = group.codes[0].knobs[0].tensor
    levels = spec.codes.integer and spec.codes.trellis is None
    if levels:
        with torch.no_grad():
            codes[0, 0] = 1e3  # beyond the largest level
    torch.cat(group.weights()).mul(torch.randn(14, spec.d_in, generator=generator)).sum().backward()
    for k in group.knobs:
        assert k.tensor.grad is not None and bool(k.tensor.grad.any())
    if levels:
        assert codes.grad[0, 0] == 0


def layer_setup(architecture="llama", keep=0.5, count=24, layer=1, noise=0.1):
    """A tiny model's layer in low-rank form, its streams apart."""
    model = tiny_model(architecture)
    view = discover(model)
    streams = Streams(view, token_ids(count, 17), CPU)
    for index in range(layer):
        streams.original = streams.run(index, streams.original)
    generator = torch.Generator().manual_seed(5)
    streams.compressed = streams.original + noise * torch.randn(streams.original.shape, generator=generator)
    groups = []
    for group in view.of_layer(layer):
        weight = torch.cat([view.weight(name) for name in group.modules], 1)
        left, values, right = torch.linalg.svd(weight)
        rank = max(1, int(keep * len(values)))
        spec = GroupSpec(
            group.modules, group.d_in, group.d_out, MatrixSpec(sum(group.d_out), rank), MatrixSpec(rank, group.d_in)
        )
        factors = Factors(Stored((values[:rank, None] * right[:rank]).T), Stored(left[:, :rank].T))
        groups.append((spec, factors.pack(spec, torch.bfloat16)))
    return streams, groups, streams.run(layer, streams.original)


def dense(streams, groups, packed, layer=1):
    out = {}
    for (spec, _), tensors in zip(groups, packed, strict=True):
        parts = spec.weight(tensors).T.float().split(spec.d_out)
        out |= {f"{streams.relative(layer, m)}.weight": p for m, p in zip(spec.modules, parts, strict=True)}
    return out


def refined(streams, groups, targets, *, seed=0, **options):
    return refine_layer(streams, 1, groups, targets, Refine(**options), seed=seed, dtype=torch.bfloat16)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma3_text", "opt", "gpt_neox"])
def test_refinement_lowers_the_error_of_the_output(architecture):
    streams, groups, targets = layer_setup(architecture)
    weights = {name: streams.view.weight(name).clone() for name in streams.view.module_names}
    found = refined(streams, groups, targets, steps=40)
    before = block_error(streams, 1, dense(streams, groups, [t for _, t in groups]), targets)
    after = block_error(streams, 1, dense(streams, groups, found.packed) | found.others, targets)
    assert after < 0.9 * before
    assert found.info["held_out_after"] < 0.95 * found.info["held_out_before"]
    layer = dict(streams.view.layers[1].named_parameters())
    assert found.others and all(layer[name].ndim == 1 for name in found.others)
    assert any(not torch.equal(layer[name], tensor) for name, tensor in found.others.items())
    assert all(torch.equal(streams.view.weight(name), weight) for name, weight in weights.items())  # model untouched


def test_the_same_seed_gives_the_same_bytes_and_another_does_not():
    first, second, other = (refined(*layer_setup(), steps=10, seed=seed).packed for seed in (1, 1, 2))
    pairs = [(a[key], b[key], c[key]) for a, b, c in zip(first, second, other, strict=True) for key in a]
    assert all(torch.equal(a, b) for a, b, _ in pairs)
    assert any(not torch.equal(a, c) for a, _, c in pairs)


def test_a_layer_never_gets_worse(monkeypatch):
    monkeypatch.setattr(refine, "FIRST_RATE", 1e4)  # every step does harm, and so do those of a 27th of that
    streams, groups, targets = layer_setup()
    found = refined(streams, groups, targets, steps=10)
    assert found.info["rate"] is None and found.info["steps"] > 0
    assert found.info["held_out_after"] == found.info["held_out_before"]
    for packed, (_, tensors) in zip(found.packed, groups, strict=True):
        assert all(torch.equal(packed[key], tensor) for key, tensor in tensors.items())
    layer = dict(streams.view.layers[1].named_parameters())
    assert all(torch.equal(layer[name], tensor) for name, tensor in found.others.items())


def test_held_out_sequences_are_never_trained_on():
    streams, groups, targets = layer_setup(count=16)
    first = refined(streams, groups, targets, steps=6, held_out=0.25, seed=3)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(3))
    targets[order[:4]] += 50.0  # moves their error by so much that nothing can look like an improvement but by chance
    trained = []
    replay = streams.replay.layer_with

    def note(index, hidden, tensors, *, grad=False):
        if grad:
            trained.extend(h for h in hidden)
        return replay(index, hidden, tensors, grad=grad)

    streams.replay.layer_with = note
    refined(streams, groups, targets, steps=6, held_out=0.25, seed=3)
    assert first.info["steps"] > 0 and trained
    held = [streams.compressed[i] for i in order[:4]]
    assert not any(torch.equal(one, other) for one in held for other in trained)


def test_one_sequence_is_too_little_to_refine():
    streams, groups, targets = layer_setup(count=1)
    found = refined(streams, groups, targets, steps=10)
    assert found.info["steps"] == 0
    assert torch.equal(found.packed[0]["codes.values"], groups[0][1]["codes.values"])


@pytest.mark.parametrize("options", [{"value_bits": 4, "dictionary_bits": 4, "group": 16}, {}])
def test_the_checkpoint_holds_the_refined_layers_and_norms(tmp_path, options):
    source = save_tiny(tmp_path / "m", "qwen3", dtype=torch.float32, max_shard_size="5GB")
    recipe = Recipe(method="pursuit", calibration={"samples": 32, "seq_len": 24}, options=options | {"rounds": 3})
    results = {}
    for name, change in {"plain": None, "refined": {"steps": 20}}.items():
        out = tmp_path / name
        results[name] = compress(
            source, out, recipe=recipe, keep=0.5, calibration=[tiny_text(2000)], device="cpu", refine=change,
            allocation="uniform",
        )  # fmt: skip
    original, plain, tuned = (load_file(tmp_path / name / "model.safetensors") for name in ("m", "plain", "refined"))
    norms = [name for name in original if "layers" in name and "norm" in name]
    assert norms and all(torch.equal(plain[name], original[name]) for name in norms)
    assert any(not torch.equal(tuned[name], original[name]) for name in norms)
    assert tuned.keys() == plain.keys()
    assert {k: (v.shape, v.dtype) for k, v in tuned.items()} == {k: (v.shape, v.dtype) for k, v in plain.items()}
    report = results["refined"].report
    assert report["bytes_after"] == results["plain"].report["bytes_after"]
    assert report["seconds"]["refine"] > 0
    for layer in report["layers"]:
        assert layer["refine"]["held_out_after"] <= layer["refine"]["held_out_before"]
    assert sum(x["block_error"] for x in report["layers"]) < sum(x["block_error_before"] for x in report["layers"])


def test_the_recipe_takes_a_word_or_a_section():
    assert Recipe().refine is None and not Recipe().anchor
    assert Recipe().merged({"refine": True}).refine == Refine()
    assert Recipe().merged({"refine": {"steps": 7}}).refine == Refine(steps=7)
    assert Recipe().merged({"refine": {"steps": 7}}).merged({"refine": False}).refine is None
    with pytest.raises(RecipeError, match="did you mean 'steps'"):
        Recipe().merged({"refine": {"step": 7}})
