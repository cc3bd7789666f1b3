"""What `cospadi benchmark` measures: shapes, budgets, timing, whole models; speeds themselves are not judged."""

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cospadi.checkpoint import file_bytes
from cospadi.checkpoint.formats.factored import FACTORED
from cospadi.errors import BudgetError, ModelError, NumericalError, OutputError, RecipeError
from cospadi.evaluation.speed import SHAPES, Settings, layers, loading, run, run_benchmark, timing, whole
from cospadi.evaluation.speed.layers import Bench, random_group, relative_error
from cospadi.evaluation.speed.shapes import (
    Subject,
    bitmask,
    low_rank,
    named_shape,
    of_model,
    planned,
    shape_of,
    variants,
)
from cospadi.evaluation.speed.timing import Timed, alternate, copies
from cospadi.evaluation.speed.whole import Decoder, measure_model, parameter_bytes, random_model
from cospadi.format import GroupSpec, MatrixSpec, Rotation, Trellis
from cospadi.model_view import LinearGroup
from tiny import save_tiny, tiny_config

CPU = torch.device("cpu")
WIDE = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}


def subject(architecture="llama", **overrides):
    config = tiny_config(architecture, **(WIDE | overrides))
    config.dtype = torch.bfloat16
    return Subject("tiny", config)


@pytest.mark.parametrize(
    ("name", "shapes", "parameters"),
    [
        ("llama-3-8b", {(4096, 6144), (4096, 4096), (4096, 28672), (14336, 4096)}, 8_030_261_248),
        ("llama-3.2-1b", {(2048, 3072), (2048, 2048), (2048, 16384), (8192, 2048)}, 1_235_814_400),
        ("qwen3-8b", {(4096, 6144), (4096, 4096), (4096, 24576), (12288, 4096)}, 8_190_735_360),
        ("smollm2-135m", {(576, 960), (576, 576), (576, 3072), (1536, 576)}, 134_515_008),
    ],
)
def test_shapes_are_those_of_the_published_models(name, shapes, parameters):
    model = named_shape(name)
    assert {shape_of(group) for group in model.groups} == shapes
    unique = {id(p): p.numel() for p in model.build().parameters()}
    assert sum(unique.values()) == parameters  # as the model cards count
    assert set(SHAPES) == {"llama-3-8b", "llama-3.2-1b", "qwen3-8b", "smollm2-135m"}


def test_fewer_layers():
    assert len(named_shape("qwen3-8b", 2).groups) == 2 * 4
    with pytest.raises(ModelError, match="has 30 decoder layers, not 31"):
        named_shape("smollm2-135m", 31)
    with pytest.raises(RecipeError, match="did you mean 'llama-3-8b'"):
        named_shape("llama3-8b")


def test_all_ways_spend_the_same_bytes():
    group = LinearGroup(("a.q", "a.k"), 0, 512, (640, 256))
    for keep in (0.6, 0.4):
        budget = int(keep * group.dense_bytes)
        for spec in (
            planned(group, keep, 16),
            planned(group, keep, 8),
            low_rank(group, budget),
            bitmask(group, budget),
        ):
            assert 0.98 * budget < spec.bytes <= budget
            assert spec.codes.rows == 896 and spec.d_in == 512
    free = bitmask(group, int(0.5 * group.dense_bytes))
    assert free.dictionary is None and free.codes.pattern == "free"
    assert bitmask(group, int(0.05 * group.dense_bytes)) is None
    with pytest.raises(BudgetError):
        planned(group, 1e-5, 16)


def test_variants_of_a_dense_model_and_of_a_checkpoint(tmp_path):
    dense = subject()
    found = variants(dense, ((0.8, 16), (0.8, 8), (0.5, 16), (0.5, 8)))
    assert [(way.keep, way.bits) for way in found] == [(0.8, 16), (0.8, 8), (0.5, 16), (0.5, 8)]
    assert all(found[1].of(group).codes.bits == 8 == found[1].of(group).dictionary.bits for group in dense.groups)
    specs = tuple(found[3].specs.values())
    [own] = variants(replace(dense, stored=specs), ((0.8, 16),))
    assert own.bits is None and own.specs == found[3].specs
    assert own.keep == pytest.approx(sum(s.bytes for s in specs) / sum(g.dense_bytes for g in dense.groups))
    with pytest.raises(ModelError, match="fits the groups"):
        variants(Subject("other", tiny_config("gpt_neox"), specs), ((0.8, 16),))


def stored_apart(group):
    """Pruned layers of one group, the last apart from the others, as `auto` stores those that choose otherwise."""
    parts = [(group.modules[:-1], group.d_out[:-1]), (group.modules[-1:], group.d_out[-1:])]
    return tuple(
        GroupSpec(modules, group.d_in, d_out, MatrixSpec(sum(d_out), group.d_in, pattern))
        for (modules, d_out), pattern in zip(parts, ("16:32", "8:32"), strict=True)
    )


def test_layers_with_one_input_are_measured_as_they_are_stored():
    dense = subject()
    group = next(g for g in dense.groups if len(g.modules) == 3)
    specs = stored_apart(group)
    mixed = replace(dense, stored=specs)
    assert [g.modules for g in mixed.groups[:2]] == [group.modules[:-1], group.modules[-1:]]
    assert {m for g in mixed.groups for m in g.modules} == {m for g in dense.groups for m in g.modules}
    [own] = variants(mixed, ())
    assert [own.of(g) for g in mixed.groups] == [*specs, *[None] * (len(mixed.groups) - 2)]
    plain, model = (random_model(mixed, way, CPU, 0) for way in (None, own))
    saved = group.dense_bytes - sum(spec.bytes for spec in specs)
    assert parameter_bytes(plain) - parameter_bytes(model) == saved - 1  # a byte stands in for the first weight
    rows = [
        row for rows in layers.measure_layers([mixed], Bench(CPU, 2, 0, 1e9), {mixed.name: [own]}, [1]) for row in rows
    ]
    assert {row["group"]: row["bytes"] for row in rows} == {
        "+".join(m.rsplit(".", 1)[-1] for m in spec.modules): spec.bytes for spec in specs
    }


def test_layers_of_several_groups_are_part_of_the_whole_model():
    dense = subject()
    ends = [g for g in dense.groups if g.modules[0].endswith("o_proj")][:2]
    modules, d_out = tuple(g.modules[0] for g in ends), tuple(g.d_out[0] for g in ends)
    codes = MatrixSpec(sum(d_out), 16, "8:16")
    shared = GroupSpec(modules, ends[0].d_in, d_out, codes, MatrixSpec(16, ends[0].d_in))
    mixed = replace(dense, stored=(shared,))
    assert mixed.groups == dense.groups
    [own] = variants(mixed, ())
    plain, model = (random_model(mixed, way, CPU, 0) for way in (None, own))
    saved = sum(g.dense_bytes for g in ends) - shared.bytes
    assert parameter_bytes(plain) - parameter_bytes(model) == saved - 1  # a byte stands in for the first weight


def test_only_what_this_package_stores(tmp_path):
    path = save_tiny(tmp_path / "m")
    config = (path / "config.json").read_text()
    entry = '{"quantization_config": {"quant_method": "gptq", "bits": 4},'
    (path / "config.json").write_text(config.replace("{", entry, 1))
    with pytest.raises(ModelError, match="stored by 'gptq'"):
        of_model(path)


def test_variants_are_timed_in_turn_on_other_copies():
    seen = []
    calls = {name: [lambda n=name, i=i: seen.append((n, i)) for i in range(3)] for name in "ab"}
    timed = alternate(calls, CPU, 4)
    each = timing.CPU_CALLS
    assert [name for name, _ in seen] == (["a"] * each + ["b"] * each) * 5  # the first round warms up
    assert [i for name, i in seen if name == "a"] == [n % 3 for n in range(5 * each)]
    assert len(timed["a"].seconds) == 4


def test_times_are_seconds_a_call_and_ratios_are_of_rounds(monkeypatch):
    now = [0.0]

    def lasting(*seconds):
        turn = iter(seconds)
        return lambda: now.__setitem__(0, now[0] + next(turn))

    monkeypatch.setattr(timing, "CPU_CALLS", 2)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    # the first two calls warm up; in the last round the machine is four times slower
    slow, fast = lasting(9, 9, 2, 4, 2, 4, 8, 16), lasting(9, 9, 1, 1, 1, 1, 4, 4)
    timed = alternate({"slow": [slow], "fast": [fast]}, CPU, 3)
    assert timed["slow"].seconds == (3, 3, 12) and timed["fast"].seconds == (1, 1, 4)
    assert timed["slow"].median == 3 and timed["slow"].over(timed["fast"]) == 3
    assert Timed((1.0, 2.0, 40.0)).over(Timed((2.0, 4.0, 8.0))) == 0.5


def test_enough_copies_to_empty_the_cache(monkeypatch):
    monkeypatch.setattr(timing, "cache_bytes", lambda device: 100)
    assert copies(40, CPU) == 5 and copies(1000, CPU) == 2 and copies(1, CPU) == timing.MOST_COPIES


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3_text"])
def test_random_models_are_made_in_their_final_form(architecture):
    model_of = subject(architecture, tie_word_embeddings=True)
    [way] = variants(model_of, ((0.7, 8),))
    model = random_model(model_of, way, CPU, 3)
    expected = [spec for group in model_of.groups if (spec := way.of(group))]
    assert [layer.group for _, layer in FACTORED.layers(model)] == [s for s in expected for _ in s.modules]
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    dense = random_model(model_of, None, CPU, 3)
    saved = sum(spec.dense_bytes - spec.bytes for spec in expected)
    assert parameter_bytes(dense) - parameter_bytes(model) == saved - 1  # one byte is the guard
    again = random_model(model_of, way, CPU, 3)
    for (name, one), (_, other) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(one, other), name
        assert not one.requires_grad
    with torch.no_grad():
        logits = model(torch.arange(12).unsqueeze(0)).logits.float()
    assert bool(logits.isfinite().all()) and float(logits.std()) > 0


def test_buffers_are_those_of_a_model_built_in_the_usual_way():
    from transformers import AutoModelForCausalLM

    model_of = subject()
    built = dict(AutoModelForCausalLM.from_config(model_of.config).named_buffers())
    for name, buffer in random_model(model_of, None, CPU, 0).named_buffers():
        assert torch.equal(buffer, built[name]), name


def test_a_decode_step_attends_to_the_cache(monkeypatch):
    model_of = subject()
    model = random_model(model_of, None, CPU, 0).float()
    monkeypatch.setattr("cospadi.evaluation.speed.whole.CACHE_TOKENS", 12)
    monkeypatch.setattr("cospadi.evaluation.speed.whole.SEEN_TOKENS", 5)
    decoder = Decoder(model, CPU)
    tokens = torch.randint(0, 256, (1, 6), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(tokens, use_cache=False).logits[:, -1]
        for position in range(5):  # steps that fill the cache, then the one at the position that is timed
            decoder.position.fill_(position)
            decoder.token.copy_(tokens[:, position])
            decoder.mask = (torch.arange(12) <= position).view(1, 1, 1, -1)
            decoder.step()
        last = Decoder(model, CPU)
        decoder.position.copy_(last.position)
        decoder.mask = last.mask
        decoder.token.copy_(tokens[:, 5])
        assert torch.allclose(decoder.step()[:, -1], expected, atol=1e-4)


def test_compiled_models_are_compiled_before_anything_is_timed(monkeypatch):
    """In whole programs, and none anew while a clock runs or a graph is captured."""
    counted, programs = [], []

    def backend(program, _):
        programs.append(program)
        return program.forward

    def timed(calls, *_, **__):
        before = len(programs)
        for (call,) in calls.values():
            for _ in range(3):
                call()
        counted.append((before, len(programs) - before))
        return {name: Timed((1.0,)) for name in calls}

    monkeypatch.setattr(whole, "compiled_model", lambda model: torch.compile(model, backend=backend))
    monkeypatch.setattr(whole, "alternate", timed)
    model_of = subject()
    way = variants(model_of, [(0.8, 16)])[0]
    dense, ours = measure_model(model_of, [way], Bench(CPU, 1, 0, 1.0), 8, compiled=True)
    assert dense["compiled"] and ours["decode_eager_of_dense"] == 1
    assert [made for _, made in counted] == [0, 0]
    assert counted[0][0] >= 2 and counted[1][0] >= counted[0][0] + 2
    torch.compiler.reset()


class _Synchronising(TorchDispatchMode):
    """Notes operations that a CUDA graph cannot hold: they bring a value to the host, or numbers of the host along."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(name in str(function) for name in ("_local_scalar_dense", "nonzero", "lift_fresh", "masked_select")):
            self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_a_decode_step_fits_a_cuda_graph(architecture):
    model_of = subject(architecture)
    for way in (None, *variants(model_of, ((0.8, 8),))):
        decoder = Decoder(random_model(model_of, way, CPU, 0), CPU)
        decoder.step()  # lays out the cache
        with _Synchronising() as mode:
            decoder.step()
        assert mode.seen == []
    with _Synchronising() as mode:
        bool(torch.ones(()))
    assert mode.seen


def test_a_wrong_kernel_is_not_timed(monkeypatch):
    spec = GroupSpec(("a",), 32, (16,), MatrixSpec(16, 32, "free", 9))
    stored = random_group(spec, CPU, 0)
    x = torch.randn(3, 32).bfloat16()
    assert relative_error(stored, x) < 4e-3
    monkeypatch.setattr(layers, "factored_linear", lambda x, *_: torch.full((len(x), 16), float("nan")))
    with pytest.raises(NumericalError, match=r"3 tokens .* is wrong by nan"):
        relative_error(stored, x)


@pytest.mark.parametrize("d_out", [(32, 16), (20, 30)])
@pytest.mark.parametrize("dictionary", [None, MatrixSpec(24, 40, bits=8)])
def test_rotated_groups_of_trellis_codes_are_right(dictionary, d_out):
    """With whole tiles of every module, and with tiles that end in padding."""
    codes = MatrixSpec(sum(d_out), 40 if dictionary is None else 24, bits=2, trellis=Trellis(12, 4, 16))
    spec = GroupSpec(("a", "b"), 40, d_out, codes, dictionary, rotation=Rotation(32))
    stored = random_group(spec, CPU, 0)
    assert sum(t.numel() * t.element_size() for t in stored.packed().values()) == spec.bytes
    x = torch.randn(3, 40).bfloat16()
    assert relative_error(stored, x) < 1e-2
    torch.testing.assert_close(stored.exact(x), x.double() @ spec.weight(stored.packed()))
    if dictionary is not None:
        torch.testing.assert_close(stored.combine(stored.coordinates(x)), stored(x))


def test_loading_leaves_nothing_behind(tmp_path, monkeypatch):
    model_of, out = subject(), tmp_path / "new"
    [way] = variants(model_of, ((0.6, 16),))
    monkeypatch.setattr(loading, "TURNS", 1)
    sizes = {}
    real = loading.timed_load

    def noting(folder, device, checked):
        sizes[folder.name] = file_bytes(folder)
        return real(folder, device, checked)

    monkeypatch.setattr(loading, "timed_load", noting)
    row = loading.measure_loading(model_of, way, CPU, 0, out)
    assert sizes == {"dense": row["dense_file_bytes"], "compressed": row["file_bytes"]}
    assert row["file_bytes"] < row["dense_file_bytes"]
    assert row["of_dense"] == row["seconds"] / row["dense_seconds"] > 0 < row["checked_seconds"]
    assert list(out.iterdir()) == []
    monkeypatch.setattr(loading.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10}))
    with pytest.raises(OutputError, match="GB are free"):
        loading.measure_loading(model_of, way, CPU, 0, out)
    assert list(out.iterdir()) == []


def test_equal_shapes_of_several_models_are_measured_once():
    bench = Bench(CPU, 1, 0, 1e9)
    one, other = subject(), Subject("twin", subject("qwen3").config)
    ways = {s.name: variants(s, ((0.7, 16),)) for s in (one, other)}
    rows = [row for part in layers.measure_layers([one, other], bench, ways, [1, 70]) for row in part]
    assert len(rows) == len({shape_of(group) for group in one.groups}) * 2
    assert all(row["shapes"] == ["tiny", "twin"] for row in rows)
    for row in rows:
        assert row["error"] < 4e-3
        assert row["of_copy"] == pytest.approx(row["bytes"] / (row["us"] * 1e-6) / 1e9)
        assert ("codes_us" in row) == (row["tokens"] == 1)


def test_defaults_suit_the_device():
    gpu = Settings().filled(torch.device("cuda"))
    assert gpu.shapes[0] == "llama-3-8b" and len(gpu.shapes) == 3 and gpu.tokens == (1, 4, 16, 2048)
    assert gpu.prompt == 2048
    quick = Settings(quick=True).filled(torch.device("cuda"))
    assert quick.shapes == ("llama-3-8b",) and quick.tokens == (1, 2048)
    assert Settings(model="m", tokens=(3,), prompt=7).filled(CPU) == Settings(model="m", tokens=(3,), prompt=7)


def test_wrong_devices():
    with pytest.raises(RecipeError, match="is not a device"):
        run_benchmark(Settings(device="gpu7"))


def test_kernels_are_compiled_ahead_for_all_that_is_timed(monkeypatch):
    ahead = pytest.importorskip("cospadi.kernels.precompile")
    asked = []
    monkeypatch.setattr(ahead, "compile_ahead", lambda products, dtype, jobs: asked.extend(products))
    settings = Settings(ways=((0.6, 8),), tokens=(1, 4), prompt=64)
    model_of = subject()
    run.compile_kernels(settings, [model_of], {model_of.name: variants(model_of, settings.ways)})
    spec = planned(model_of.groups[0], 0.6, 8)
    for count in (1, 4, 64):
        assert (spec.dictionary, count, spec.codes) in asked
        assert (spec.codes, count, None) in asked
    assert any(matrix.pattern == "free" and matrix.bits == 16 for matrix, _, _ in asked)
