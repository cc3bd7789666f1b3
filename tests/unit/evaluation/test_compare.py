import json

import pytest
import torch

from cospadi import checkpoint
from cospadi.calibration import read_texts
from cospadi.engine.compress import compress
from cospadi.engine.journal import ROWS
from cospadi.errors import CalibrationError, ModelError, NumericalError, OutputError, RecipeError
from cospadi.evaluation import compare, comparison_row, perplexity
from cospadi.evaluation.compare import append_row, read_rows
from cospadi.format import Factors, GroupSpec
from cospadi.methods import METHODS, Problem, get_method, method
from cospadi.methods.sizing import low_rank_plan
from cospadi.model_view import open_model
from cospadi.recipe import Recipe
from tiny import save_tiny, tiny_text

RECIPE = Recipe(calibration={"samples": 6, "seq_len": 48})
CALIBRATION = [tiny_text(600, seed=1)]
TEXT = [tiny_text(700, seed=2)]
LAYERS, GROUPS = 3, 21  # of the tiny Llama, one group a matrix


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny", num_hidden_layers=LAYERS)


@pytest.fixture
def go(source, tmp_path):
    def run(out="out", **changes):
        settings = {"methods": ["svd"], "keeps": [0.8], "text": TEXT, "calibration": CALIBRATION, "recipe": RECIPE}
        settings |= {"references": (), "seq_len": 64} | changes
        return compare(source, tmp_path / out, **settings)

    return run


@pytest.fixture
def counting():
    """A registered method that counts its solves, and stops when `limit` are done."""
    plain = get_method("svd").solve

    class Count:
        solves, limit = 0, 10**6

    with METHODS.temporary():

        @method("counting", plan=low_rank_plan)
        def counting(problem: Problem, spec: GroupSpec) -> Factors:
            """Truncated SVD that counts."""
            if Count.solves == Count.limit:
                raise KeyboardInterrupt
            Count.solves += 1
            return plain(problem, spec)

        yield Count


@pytest.mark.parametrize("bfloat16_units", [True, False])
def test_rows_are_what_the_checkpoints_give(source, go, tmp_path, monkeypatch, bfloat16_units):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bfloat16_units)
    found = go(methods=["svd", "wanda"], keeps=[0.8, 0.6], references=["rtn"])
    assert [(r["method"], r["keep"]) for r in found["rows"]] == [
        ("svd", 0.8),
        ("wanda", 0.8),
        ("svd", 0.6),
        ("wanda", 0.6),
    ]
    model, tokenizer = open_model(source)
    dense = perplexity(model.float(), tokenizer, TEXT, seq_len=64)
    assert found["dense"]["perplexity"] == pytest.approx(dense.perplexity, rel=1e-6)
    for row in found["rows"]:
        place = tmp_path / f"{row['method']}{row['keep']}"
        report = compress(
            source, place, keep=row["keep"], method=row["method"], calibration=CALIBRATION, recipe=RECIPE
        ).report
        assert (row["bytes"], row["bytes_before"]) == (report["bytes_after"], report["bytes_before"])
        assert row["keep_actual"] == report["keep_actual"] <= row["keep"]
        stored = checkpoint.load(place, dtype=torch.float32)  # with its factors, not multiplied out
        measured = perplexity(stored, tokenizer, TEXT, seq_len=64)
        assert row["perplexity"] == pytest.approx(measured.perplexity, rel=1e-5)
        assert row["error"] > 0 and row["seconds"] > 0 and row["peak_memory_bytes"] > 10**6
        assert row["total_bytes"] - row["bytes"] == found["dense"]["total_bytes"] - found["dense"]["bytes"]
    bits = [r["options"]["bits"] for r in found["references"]]
    assert bits == [8, 4, 3]
    assert [r["keep"] for r in found["references"]] == sorted((r["keep"] for r in found["references"]), reverse=True)


def test_every_row_begins_with_the_dense_weights(go):
    recipes = {"anchored": RECIPE.merged({"method": "rtn", "anchor": True, "options": {"bits": 3}})}
    alone = go("a", methods=["svd"])["rows"][0]
    after = go("b", methods=["rtn"], recipes=recipes, options={"rtn": {"bits": 2}})
    both = go("c", methods=["rtn", "svd"], recipes=recipes, options={"rtn": {"bits": 2}})
    figures = {row["method"]: row["perplexity"] for row in both["rows"]}
    assert figures["svd"] == alone["perplexity"]
    assert figures["rtn"] == after["rows"][0]["perplexity"] and figures["anchored"] == after["rows"][1]["perplexity"]
    assert len(set(figures.values())) == 3
    assert both["dense"]["perplexity"] == go("d", recipes=recipes)["dense"]["perplexity"]


def test_statistics_are_collected_once_and_nothing_is_left_behind(go, tmp_path):
    phases = []
    go(methods=["svd", "svd_llm"], keeps=[0.8, 0.6], progress=lambda phase, done, *_: phases.append((phase, done)))
    assert [done for phase, done in phases if phase == "calibrate"] == list(range(1, LAYERS + 1))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {ROWS}


def test_a_row_that_cannot_be_made_does_not_stop_the_others(go):
    with METHODS.temporary():

        @method("broken", plan=low_rank_plan)
        def broken(problem: Problem, spec: GroupSpec) -> Factors:
            """Never works."""
            raise NumericalError("it never works")

        found = go(methods=["broken", "wanda"], keeps=[0.8, 0.001])["rows"]
    by = {(r["method"], r["keep"]): r for r in found}
    assert by["broken", 0.8]["reason"] == "it never works" and by["broken", 0.8]["perplexity"] is None
    assert "least possible" in by["wanda", 0.001]["reason"]
    assert by["wanda", 0.8]["perplexity"] > 1 and "reason" not in by["wanda", 0.8]


def test_finished_rows_are_not_made_again(go, counting):
    first = go(methods=["counting"], keeps=[0.8])
    assert counting.solves == GROUPS
    second = go(methods=["counting"], keeps=[0.8, 0.6])
    assert counting.solves == 2 * GROUPS and second["rows"][0] == first["rows"][0]
    for number, changes in enumerate(
        ({"text": [TEXT[0] + "more"]}, {"seq_len": 32}, {"max_blocks": 2}, {"recipe": RECIPE.merged({"seed": 1})}), 3
    ):
        go(methods=["counting"], keeps=[0.8], **changes)
        assert counting.solves == number * GROUPS, changes
    go(methods=["counting"], keeps=[0.8], fresh=True)
    assert counting.solves == 7 * GROUPS


def test_an_interrupted_comparison_goes_on_within_a_row(go, counting, tmp_path):
    whole = go("whole", methods=["counting"], keeps=[0.8, 0.6])["rows"]
    counting.solves, counting.limit = 0, GROUPS + 9
    with pytest.raises(KeyboardInterrupt):
        go(methods=["counting"], keeps=[0.8, 0.6])
    counting.limit = 10**6
    rows = go(methods=["counting"], keeps=[0.8, 0.6])["rows"]
    assert counting.solves == 2 * GROUPS
    assert [r["perplexity"] for r in rows] == [r["perplexity"] for r in whole]
    assert rows[1]["seconds"] > 0
    assert not (tmp_path / "out" / ".cospadi").exists()


def test_checkpoints_are_written_on_demand_and_measured_again_without_work(source, go, counting, tmp_path):
    row = go(methods=["counting"], save=True, references=["rtn"])["rows"][0]
    assert row["directory"] == "counting-0.8" and not list((tmp_path / "out").glob("rtn*"))
    place = tmp_path / "out" / "counting-0.8"
    assert json.loads((place / "report.json").read_text())["bytes_after"] == row["bytes"]
    data = (place / "model.safetensors").read_bytes()
    checkpoint.validate(place, deep=True)
    again = go(methods=["counting"], save=True, text={"x": TEXT, "y": CALIBRATION})["rows"][0]
    assert counting.solves == GROUPS and (place / "model.safetensors").read_bytes() == data
    assert again["perplexity"] == pytest.approx(row["perplexity"], rel=1e-6)
    assert set(again["texts"]) == {"x", "y"} and again["texts"]["y"]["perplexity"] != again["perplexity"]
    assert {k: again[k] for k in ("bytes", "keep_actual", "error")} == {
        k: row[k] for k in ("bytes", "keep_actual", "error")
    }


def test_rows_measured_before_are_written_when_asked_for(go, counting, tmp_path):
    plain = go(methods=["counting"])["rows"][0]
    saved = go(methods=["counting"], save=True)["rows"][0]
    assert counting.solves == 2 * GROUPS and (tmp_path / "out" / "counting-0.8" / "config.json").exists()
    assert saved["perplexity"] == plain["perplexity"]


def test_the_models_own_arithmetic_is_coarser(go):
    fine, coarse = go(arithmetic="float32"), go("b", arithmetic="model")
    assert fine["measured"] != coarse["measured"]
    ratio = coarse["dense"]["perplexity"] / fine["dense"]["perplexity"]
    assert ratio != 1 and ratio == pytest.approx(1, abs=0.02)
    assert coarse["rows"][0]["perplexity"] == pytest.approx(fine["rows"][0]["perplexity"], rel=0.02)


def test_a_line_that_was_cut_off_is_no_row(tmp_path):
    path = tmp_path / ROWS
    assert list(read_rows(path)) == []
    append_row(path, "a", {"x": 1})
    with path.open("a") as file:
        file.write('{"fingerprint": "b", "row": {"x"')
    append_row(path, "c", {"x": 3})
    append_row(path, "d", {"x": 4})
    assert dict(read_rows(path)) == {"a": {"x": 1}, "c": {"x": 3}, "d": {"x": 4}}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"methods": ["sdv"]}, RecipeError, "did you mean 'svd'"),
        ({"methods": []}, RecipeError, "nothing to compare"),
        ({"keeps": []}, RecipeError, "no size given"),
        ({"options": {"svd": {"rnk": 3}}}, RecipeError, "no option 'rnk'"),
        ({"options": {"rtn": {"bits": 4}}}, RecipeError, "not among the methods"),
        ({"recipes": {"svd": RECIPE}}, RecipeError, "rename the recipe"),
        ({"calibration": None, "methods": ["asvd"]}, CalibrationError, "--calibration"),
        ({"text": {}}, CalibrationError, "pass --text"),
        ({"arithmetic": "float8"}, RecipeError, "float32 or model"),
        ({"references": ["rtm"]}, RecipeError, "did you mean 'rtn'"),
        ({"tasks": ["none.jsonl"]}, CalibrationError, "no such task file"),
    ],
)
def test_mistakes_come_to_light_before_the_work(go, tmp_path, changes, error, message):
    with pytest.raises(error, match=message):
        go(**changes)
    assert not (tmp_path / "out" / ROWS).exists()


def test_a_directory_of_something_else_and_one_in_use(go, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(OutputError, match="not empty"):
        go("other")
    seen = []

    def during(phase, *_):
        if phase == "factorise" and not seen:
            with pytest.raises(OutputError, match="another run is working") as caught:
                go()
            seen.append(caught)

    go(progress=during)
    assert seen


def test_comparisons_and_checkpoints_do_not_mix(source, go, tmp_path):
    settings = {"keep": 0.8, "method": "svd", "calibration": CALIBRATION, "recipe": RECIPE}
    compress(source, tmp_path / "small", **settings)
    before = sorted(path.name for path in (tmp_path / "small").iterdir())
    with pytest.raises(OutputError, match="holds a checkpoint"):
        go("small")
    assert sorted(path.name for path in (tmp_path / "small").iterdir()) == before
    go("table")
    with pytest.raises(OutputError, match="holds a comparison"):
        compress(source, tmp_path / "table", **settings)


def test_a_compressed_model_is_refused(source, go, tmp_path):
    compress(source, tmp_path / "small", keep=0.8, method="svd", calibration=CALIBRATION, recipe=RECIPE)
    with pytest.raises(ModelError, match="already compressed"):
        compare(
            tmp_path / "small",
            tmp_path / "out",
            methods=["svd"],
            keeps=[0.5],
            text=TEXT,
            calibration=CALIBRATION,
            recipe=RECIPE,
        )


def test_tasks_are_scored_for_every_row(go, tmp_path):
    words = [word[:4] for word in tiny_text(800, seed=5).split()]
    pairs = [
        {"task": "t", "good": " ".join(words[i : i + 3]), "bad": " ".join(words[i + 9 : i + 12])} for i in range(8)
    ]
    (tmp_path / "minimal.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    found = go(tasks=[str(tmp_path / "minimal.jsonl")], limit=5)
    for row in (found["dense"], *found["rows"]):
        assert row["tasks"]["minimal"]["samples"] == 5 and 0 <= row["tasks"]["minimal"]["acc"] <= 1
    assert found["dense"]["harness"]["limit"] == 5


def test_peak_memory_of_a_row_does_not_hold_that_of_earlier_ones(monkeypatch):
    from cospadi.evaluation import yardstick

    cpu = torch.device("cpu")
    yardstick.reset_peak(cpu)
    before = yardstick.peak(cpu)["peak_memory_bytes"]
    block = torch.ones(64 << 20, dtype=torch.uint8)
    high = yardstick.peak(cpu)["peak_memory_bytes"]
    assert high >= before + (48 << 20)
    del block
    yardstick.reset_peak(cpu)
    low = yardstick.peak(cpu)["peak_memory_bytes"]
    assert low < high - (32 << 20) or low == high  # where the system cannot forget a peak, it stays


def test_texts_are_told_apart_by_their_documents():
    one, two = (comparison_row.Yardstick({"t": read_texts(d)}) for d in (["ab", "c"], ["a", "bc"]))
    assert one.fingerprint() != two.fingerprint()


def test_rows_that_compress_different_layers_are_told_apart(go):
    assert go("same", methods=["svd", "svd_llm"])["warnings"] == []
    found = go("differ", methods=["masa", "svd"], keeps=[0.7], references=["rtn"])
    assert len(found["warnings"]) == 1
    for word in ("masa: 12 of 21", "svd, rtn: 21 of 21", "--only"):
        assert word in found["warnings"][0]
    rows = {row["method"]: row for row in found["rows"]}
    assert rows["masa"]["bytes_before"] < rows["svd"]["bytes_before"] == found["dense"]["bytes"]
    alike = go("only", methods=["masa", "svd"], keeps=[0.7], recipe=RECIPE.merged({"only": ["self_attn"]}))
    assert alike["warnings"] == []
    assert len({row["bytes_before"] for row in alike["rows"]} | {alike["dense"]["bytes"]}) == 1


def test_learned_positions_must_suffice(tmp_path):
    learned = save_tiny(tmp_path / "opt", "opt", max_position_embeddings=40)
    settings = {"methods": ["svd"], "keeps": [0.8], "text": TEXT, "calibration": CALIBRATION, "references": ()}
    with pytest.raises(CalibrationError, match="--seq-len 40"):
        compare(learned, tmp_path / "out", recipe=RECIPE, seq_len=32, **settings)
    fitting = RECIPE.merged({"calibration": {"seq_len": 32}})
    with pytest.raises(CalibrationError, match="--seq-len 40"):
        compare(learned, tmp_path / "out", recipe=fitting, seq_len=64, **settings)
