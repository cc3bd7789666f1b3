"""What a text is once it is read: documents in order, each plain or a conversation."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Conversation:
    """Messages that become text through a model's chat template.

    Attributes:
        messages: ``{"role", "content", …}`` in order.
        tools: that the template describes to the model, if any.
        where: the record's place, for messages.
    """

    messages: tuple[dict[str, Any], ...]
    tools: tuple[Any, ...] = ()
    where: str = ""

    def __len__(self) -> int:
        """Characters of all contents."""
        return sum(len(str(message.get("content") or "")) for message in self.messages)

    @property
    def json(self) -> str:
        """What it says, without its place."""
        return json.dumps([self.messages, self.tools], sort_keys=True, default=str)


@dataclass(frozen=True)
class Texts:
    """Documents in order.

    Attributes:
        documents: at least one; documents of only whitespace are left out.
        source: their origin, for reports.
        notes: remarks for the report.
        fields: of the records they were read from; empty for plain text.
    """

    documents: tuple[str | Conversation, ...]
    source: str
    notes: tuple[str, ...] = ()
    fields: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.documents)

    @property
    def plain(self) -> tuple[str, ...]:
        """The documents, none of which is a conversation any more."""
        assert all(isinstance(document, str) for document in self.documents)
        return tuple(map(str, self.documents))

    @property
    def sha256(self) -> str:
        """Of the documents and where each ends."""
        digest = hashlib.sha256()
        for document in self.documents:
            data = (document if isinstance(document, str) else document.json).encode()
            digest.update(len(data).to_bytes(8, "little") + data)
        return digest.hexdigest()
