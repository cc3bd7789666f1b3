import pytest

from cospadi.calibration import token_blocks
from cospadi.calibration.begin import begin_ids, begin_text, prompt_ids
from cospadi.errors import CalibrationError, RecipeError
from cospadi.recipe import Recipe
from tiny import bos_tokenizer, byte_tokenizer, tiny_text

TEXT = tiny_text(500)


def test_the_tokenizer_decides_unless_told_otherwise():
    assert begin_ids(byte_tokenizer()) == () and begin_ids(byte_tokenizer(), "on") == (256,)
    assert begin_ids(bos_tokenizer()) == (257,) == begin_ids(bos_tokenizer(), "on")
    assert begin_ids(bos_tokenizer(), "off") == ()
    assert begin_text(bos_tokenizer(), (257,)) == "<bos>" and begin_text(byte_tokenizer(), ()) == ""


def test_several_tokens_before_a_text_all_count_and_tokens_after_it_do_not():
    tokenizer = bos_tokenizer()
    tokenizer.backend_tokenizer.post_processor = type(tokenizer.backend_tokenizer.post_processor)(
        single="<bos> <|endoftext|> $A <|endoftext|>", special_tokens=[("<bos>", 257), ("<|endoftext|>", 256)]
    )
    assert begin_ids(tokenizer) == (257, 256)
    assert prompt_ids("a", tokenizer) == [257, 256, 97, 256] == tokenizer("a").input_ids


def test_on_needs_a_token():
    tokenizer = byte_tokenizer()
    tokenizer.bos_token = None
    with pytest.raises(CalibrationError, match="has no BOS token"):
        begin_ids(tokenizer, "on")
    with pytest.raises(RecipeError, match="bos must be auto, on or off, not 'yes'"):
        begin_ids(tokenizer, "yes")


@pytest.mark.parametrize("bos, ids", [("auto", [257, 97]), ("on", [257, 97]), ("off", [97])])
def test_a_prompt_never_begins_with_two(bos, ids):
    assert prompt_ids("a", bos_tokenizer(), bos) == ids
    assert prompt_ids("<bos>a", bos_tokenizer(), bos) == [257, 97]
    assert prompt_ids("", bos_tokenizer(), bos) == ids[:-1]


def test_every_block_begins_with_it_and_the_text_has_the_rest():
    with pytest.warns(UserWarning, match="only 10 of the 99"):
        blocks = token_blocks([TEXT], bos_tokenizer(), samples=99, seq_len=50)
    assert blocks.ids.shape == (10, 50) and (blocks.ids[:, 0] == 257).all()
    assert bytes(blocks.ids[:, 1:].flatten().tolist()) == TEXT.encode()[: 10 * 49]
    told = {key: blocks.report[key] for key in ("bos", "begins_with", "tokens_used", "truncated_tokens", "seq_len")}
    assert told == {"bos": "auto", "begins_with": "<bos>", "tokens_used": 500, "truncated_tokens": 10, "seq_len": 50}
    off = token_blocks([TEXT], bos_tokenizer(), samples=10, seq_len=50, bos="off")
    assert bytes(off.ids.flatten().tolist()) == TEXT.encode() and off.report["begins_with"] == ""


def test_a_document_that_begins_with_it_does_not_give_two():
    blocks = token_blocks(["<bos>" + "x" * 18, "<bos>yy"], bos_tokenizer(), samples=1, seq_len=21)
    assert blocks.ids[0].tolist() == [257, *b"x" * 18, 256, *b"y"]


def test_blocks_without_it_are_what_they_always_were():
    texts = [tiny_text(700, seed=1), "short é", tiny_text(431, seed=2)]
    blocks = token_blocks(texts, byte_tokenizer(), samples=7, seq_len=50)
    assert blocks.sha256 == "f0c982011508706ddaeffde9dd55741dbc4ef805ff71eaf6e751222e0e6c5e01"
    assert token_blocks(texts, byte_tokenizer(), samples=7, seq_len=50, bos="on").sha256 != blocks.sha256


def test_the_embedded_model_has_none():
    from transformers import AutoTokenizer

    from cospadi.embedded import model_path

    texts = ["def main():\n    return 1\n" * 40, "import os\n" * 60]
    blocks = token_blocks(texts, AutoTokenizer.from_pretrained(model_path()), samples=8, seq_len=32, seed=1)
    assert blocks.sha256 == "ea9024f2e0a4358f10efc468c4bac3766325345f061d4a1d88dd26b7f8c7a391"


def test_yaml_reads_on_and_off_as_truth_values(tmp_path):
    (tmp_path / "r.yaml").write_text("calibration:\n  bos: off\n", encoding="utf-8")
    recipe = Recipe.load(tmp_path / "r.yaml")
    assert recipe.calibration.bos == "off"
    (tmp_path / "again.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    assert Recipe.load(tmp_path / "again.yaml") == recipe
    with pytest.raises(RecipeError, match=r"calibration\.bos cannot be 'never'"):
        Recipe(calibration={"bos": "never"})
