"""Conversations become text through the model's chat template."""

import pytest

from cospadi.calibration import read_texts, token_blocks
from cospadi.calibration.texts import rendered
from cospadi.errors import CalibrationError
from tiny import bos_tokenizer, byte_tokenizer

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if tools %}{{ tools[0].name }}{% endif %}"
)
RECORD = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes é"}]}


def with_template(tokenizer, template=TEMPLATE):
    tokenizer.chat_template = template
    return tokenizer


def test_the_template_of_the_model_is_used():
    texts, digest = rendered(
        read_texts([RECORD, "plain", RECORD | {"tools": [{"name": "f"}]}]), with_template(bos_tokenizer())
    )
    assert texts.documents == (
        "<bos>user: hi\nassistant: yes é\n", "plain", "<bos>user: hi\nassistant: yes é\nf"
    )  # fmt: skip
    assert len(digest) == 12 and rendered(texts, byte_tokenizer()) == (texts, "")
    other = rendered(read_texts([RECORD]), with_template(bos_tokenizer(), TEMPLATE + " "))[1]
    assert other != digest


def test_blocks_never_begin_with_two_and_the_report_names_fields_and_template():
    blocks = token_blocks([RECORD, RECORD], with_template(bos_tokenizer()), samples=1, seq_len=50)
    chat = "user: hi\nassistant: yes é\n".encode()
    assert blocks.ids[0].tolist() == [257, *([*chat, 256, *chat][:49])]
    assert blocks.report["fields"] == ["messages"] and len(blocks.report["chat_template"]) == 12
    plain = token_blocks(["x" * 50], bos_tokenizer(), samples=1, seq_len=50)
    assert plain.report["fields"] == [] and plain.report["chat_template"] == ""


def test_a_template_that_ends_with_the_end_token_does_not_give_two():
    tokenizer = with_template(byte_tokenizer(), "{{ messages[0].content }}<|endoftext|>\n")
    blocks = token_blocks([RECORD, RECORD, "x"], tokenizer, samples=1, seq_len=7)
    assert blocks.ids[0].tolist() == [*b"hi", 256, *b"hi", 256, *b"x"]


def test_the_date_of_a_template_is_always_the_same():
    tokenizer = with_template(byte_tokenizer(), "{{ strftime_now('%d %b %Y') }}{{ strftime_now( \"%Y\" ) }}")
    assert rendered(read_texts([RECORD]), tokenizer)[0].documents == ("26 Jul 20242024",)


@pytest.mark.parametrize(
    "template, words",
    [
        (None, "item 2 is a conversation, but the model's tokenizer has no chat template"),
        (
            "{{ raise_exception('roles must alternate') }}",
            "item 2: the model's chat template refuses it: roles must alt",
        ),
        ("{{ messages[9].content.x }}", "item 2: the model's chat template refuses it"),
        ("{% if %}", "the model's chat template refuses it"),
    ],
)
def test_what_cannot_be_rendered(template, words):
    with pytest.raises(CalibrationError) as caught:
        token_blocks(["a", RECORD], with_template(byte_tokenizer(), template), samples=1, seq_len=8)
    assert words in str(caught.value) and "\n" not in str(caught.value)
