"""Texts as people have them: files, directories, standard input, Python objects and hub datasets."""

from cospadi.calibration.texts.documents import Conversation, Texts
from cospadi.calibration.texts.read import ACCEPTED, TextSource, described, read_texts, short_name
from cospadi.calibration.texts.render import rendered

__all__ = ["ACCEPTED", "Conversation", "TextSource", "Texts", "described", "read_texts", "rendered", "short_name"]
