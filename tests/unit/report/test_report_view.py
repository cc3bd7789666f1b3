import pytest

from cospadi.report.view import by_kind, headlines, model_facts, read_groups


def groups(*modules: tuple[str, ...]) -> dict:
    return {"groups": [{"modules": list(names), "name": names[0], "error": 0.1 * i} for i, names in enumerate(modules)]}


def kinds(*modules: tuple[str, ...]) -> list[str]:
    return [row.kind for row in read_groups(groups(*modules))]


def test_kinds_are_short_and_the_same_in_all_layers():
    layer = "model.layers.{}.self_attn."
    siblings = [tuple(layer.format(i) + name for name in ("q_proj", "k_proj", "v_proj")) for i in (0, 11)]
    assert kinds(*siblings, (layer.format(0) + "o_proj",)) == ["q+k+v", "q+k+v", "o"]


def test_kinds_that_would_be_confused_get_longer_names():
    names = kinds(
        ("transformer.h.0.attn.c_proj",),
        ("transformer.h.0.mlp.c_proj",),
        ("transformer.h.1.mlp.c_proj",),
        ("transformer.h.0.mlp.c_fc",),
    )
    assert names == ["attn.c_proj".replace("_proj", ""), "mlp.c", "mlp.c", "c_fc"]
    deep = kinds(("m.layers.0.a.out.dense",), ("m.layers.0.b.out.dense",))
    assert len(set(deep)) == 2


def test_experts_are_one_kind_and_shared_experts_another():
    names = kinds(
        ("model.layers.3.mlp.experts.0.up_proj",),
        ("model.layers.3.mlp.experts.17.up_proj",),
        ("model.layers.3.mlp.shared_expert.up_proj",),
    )
    assert names[0] == names[1] != names[2]


def test_layers_come_from_names_where_they_are_not_given():
    rows = read_groups(groups(("model.layers.12.mlp.up_proj",), ("lm_head",)))
    assert [row.layer for row in rows] == [12, None]
    assert rows[1].kind == "lm_head"


def test_kinds_add_up(report):
    rows = read_groups(report)
    table = by_kind(rows)
    assert [kind.groups for kind in table] == [9] * 4
    assert sum(kind.bytes for kind in table) == report["bytes_after"]
    assert sum(kind.bytes_before for kind in table) == report["bytes_before"]
    for kind in table:
        errors = [row.error for row in rows if row.kind == kind.kind]
        assert kind.mean_error == pytest.approx(sum(errors) / len(errors))
        assert kind.worst.error == max(errors)


def test_bits_and_patterns_are_told_in_full():
    report = {
        "groups": [
            {"name": "a", "bits": {"dictionary": 8, "values": 4}, "pattern": "2:4", "nonzeros": 128},
            {"name": "b", "bits": {"dictionary": None, "values": 4}, "pattern": "dense"},
            {"name": "c", "bits": 16, "pattern": "free", "nonzeros": 1200},
        ]
    }
    rows = read_groups(report)
    assert [row.bits for row in rows] == ["8 / 4", "4", "16"]
    assert [row.sparsity for row in rows] == ["128 (2:4)", "–", "1,200"]


def test_headlines_leave_out_what_is_not_known(report):
    facts = {fact.label: fact for fact in headlines(report)}
    assert facts["Perplexity"].value == "17.23 → 21.37"
    assert "+24.1%" in facts["Perplexity"].note
    assert facts["Bytes kept"].note == "60.0% requested"
    del report["evaluation"], report["keep_actual"]
    facts = {fact.label: fact for fact in headlines(report)}
    assert "Perplexity" not in facts
    expected = 100 * report["bytes_after"] / report["bytes_before"]
    assert facts["Bytes kept"].value == f"{expected:.1f}%"
    assert headlines({}) == []


def test_phases_are_told_in_the_order_of_a_run():
    seconds = {"allocate": 1.0, "calibrate": 2.0, "factorise": 3.0, "read": 4.0, "save": 5.0, "total": 15.0}
    (fact,) = (fact for fact in model_facts({"seconds": seconds}) if fact.label == "Time by phase")
    told = " ".join(step.split()[0] for step in fact.value.split(", "))
    assert told == "read calibrate allocate factorise save"
