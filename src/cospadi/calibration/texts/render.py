"""From conversations to text, through the chat template of the model that is to read it."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import replace
from datetime import date
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from cospadi.calibration.texts.documents import Conversation, Texts
from cospadi.errors import CalibrationError

TODAY = date(2024, 7, 26)
"""What templates that ask for the date get, so that the same text gives the same tokens on any day."""
_DATE = re.compile(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)")


def rendered(texts: Texts, tokenizer: PreTrainedTokenizerBase) -> tuple[Texts, str]:
    """Texts without conversations, and the digest of the chat template if one was used.

    The end token of a template stands for the one that joins documents: it is left to that.

    Args:
        texts: documents.
        tokenizer: of the model.

    Returns:
        the same documents as plain text; the first 12 digits of the template's SHA-256, or an empty string.

    Raises:
        CalibrationError: if the tokenizer has no chat template, or it refuses a conversation (naming its place).
    """
    if all(isinstance(document, str) for document in texts.documents):
        return texts, ""
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        first = next(document for document in texts.documents if isinstance(document, Conversation))
        raise CalibrationError(
            f"{first.where} is a conversation, but the model's tokenizer has no chat template: use plain text, or copy "
            "chat_template.jinja from the model's chat version beside the tokenizer"
        )
    documents = tuple(
        document if isinstance(document, str) else _text(document, tokenizer) for document in texts.documents
    )
    digest = hashlib.sha256(json.dumps(template, sort_keys=True).encode()).hexdigest()
    return replace(texts, documents=documents), digest[:12]


def _text(conversation: Conversation, tokenizer: PreTrainedTokenizerBase) -> str:
    tools: Any = list(conversation.tools) or None
    try:
        template = _DATE.sub(lambda call: repr(TODAY.strftime(call[2])), tokenizer.get_chat_template(tools=tools))
        found = str(
            tokenizer.apply_chat_template(
                [dict(message) for message in conversation.messages],
                tools=tools,
                chat_template=template,
                tokenize=False,
            )
        )
    except (TemplateError, TypeError, KeyError, ValueError) as error:
        cause = " ".join(str(error).split()) or type(error).__name__
        raise CalibrationError(f"{conversation.where}: the model's chat template refuses it: {cause}") from None
    ended = found.rstrip()
    end = tokenizer.eos_token
    return ended.removesuffix(end) if end and ended.endswith(end) else found
