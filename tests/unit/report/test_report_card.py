import re

import yaml

from cospadi.report import model_card
from cospadi.report.markdown import inline


def parts(card: str) -> tuple[dict, str]:
    empty, head, body = re.split(r"^---$", card, maxsplit=2, flags=re.MULTILINE)
    assert empty == ""
    return yaml.safe_load(head), body


def blocks(body: str) -> tuple[list[str], str]:
    """Code blocks and the rest, read as CommonMark does: a fence ends at one that is at least as long."""
    found, rest, fence = [], [], ""
    for line in body.split("\n"):
        ticks = re.match(r"`{3,}", line)
        if fence and re.fullmatch(r"`{3,}\s*", line) and len(line.rstrip()) >= len(fence):
            fence = ""
        elif fence:
            found[-1].append(line)
        elif ticks and "`" not in line[ticks.end() :]:
            fence = ticks[0]
            found.append([])
        else:
            rest.append(line)
    assert not fence
    return ["\n".join(lines) for lines in found], "\n".join(rest)


def test_front_matter_is_what_hubs_read(report):
    head, _ = parts(model_card(report))
    assert head["library_name"] == "transformers"
    assert head["base_model"] == "example-org/tiny-135m"
    assert head["tags"] == ["cospadi", "compression"]
    assert "license" not in head
    head, _ = parts(model_card({**report, "license": "apache-2.0"}))
    assert head["license"] == "apache-2.0"


def test_a_folder_name_is_no_base_model(report):
    for name in ("tiny-135m", "/home/someone/tiny-135m", "a/b/c", "x\ny/z"):
        head, body = parts(model_card({**report, "model": name}))
        assert "base_model" not in head
        assert "/home" not in body


def test_card_says_how_to_load_and_how_it_was_made(report):
    _, body = parts(model_card(report))
    code = re.search(r"```python\n(.*?)```", body, flags=re.DOTALL)[1]
    compile(code, "card", "exec")
    assert code.startswith("import cospadi") and "AutoModelForCausalLM.from_pretrained" in code
    assert yaml.safe_load(re.search(r"```yaml\n(.*?)```", body, flags=re.DOTALL)[1]) == report["recipe"]
    assert report["command"] in body
    for group in report["groups"]:
        assert f"| {group['name']} |" in body
    assert "17.23 → 21.37" in body
    assert "(assets/error_per_layer.png)" in body and "(assets/bytes_per_layer.png)" in body
    assert "assets/" not in model_card(report, pictures=())


def test_tables_have_as_many_cells_in_every_row(report):
    report["groups"][3]["name"] = "a|b\nc"
    for block in re.findall(r"(?:^\|.*\n)+", model_card(report), flags=re.MULTILINE):
        cells = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
        assert len(cells) == 1


def test_hostile_texts_stay_texts(report):
    hostile = "x\n---\nlicense: mit\n# head <script>a</script> | ![p](http://e.x/p.png) `` ``` ````\n```\n"
    report.update(model=hostile, command=hostile, method=hostile, warnings=[hostile], recipe={"a": hostile})
    report["groups"][0]["name"] = hostile
    card = model_card(report)
    head, body = parts(card)
    assert "license" not in head and "base_model" not in head
    code, outside = blocks(body)
    assert code[-1] == hostile.rstrip()
    assert yaml.safe_load(code[1]) == report["recipe"]
    assert "<script" not in outside
    assert not re.search(r"(?<!\\)\[p", outside)
    assert "# head" not in re.findall(r"^#.*", outside, flags=re.MULTILINE)
    assert outside.count("\n## ") == len(re.findall(r"^## ", outside, flags=re.MULTILINE)) == 7


def test_inline_keeps_words_and_kills_markup():
    assert inline("model.q_proj+k_proj") == "model.q_proj+k_proj"
    assert inline("_a_ *b*") == r"\_a\_ \*b\*"
    assert inline("# head") == r"\# head"
    assert inline("1. one") == r"1\. one"
    assert inline("+24.1%") == "+24.1%"
    assert inline("a < b & c") == "a &lt; b &amp; c"


def test_damaged_reports_give_a_card(damaged):
    for report in damaged:
        head, _ = parts(model_card(report))
        assert head["library_name"] == "transformers"
