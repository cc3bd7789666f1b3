"""What a tokenizer puts before every text: the begin token (BOS), where it adds one.

Models trained with it have only ever seen sequences that begin with it. Without it their first token takes its place as
the attention sink, and their hidden states are others: Gemma 3 270M has a perplexity of 24 on WikiText-2 with its BOS
and of 70 without.
"""

from transformers import PreTrainedTokenizerBase

from cospadi.aliases import canonical_bos
from cospadi.errors import CalibrationError

_PROBE = "a"


def begin_ids(tokenizer: PreTrainedTokenizerBase, bos: str = "auto") -> tuple[int, ...]:
    """The token ids that every sequence begins with.

    Args:
        tokenizer: of the model.
        bos: ``"auto"``: whatever the tokenizer itself puts before a text, usually one token or none; ``"on"``: the
            same, or the BOS token of a tokenizer that has one but does not add it; ``"off"``: nothing.

    Raises:
        RecipeError: if `bos` is something else.
        CalibrationError: if it is ``"on"`` and the tokenizer has no BOS token.
    """
    bos = canonical_bos(bos)
    if bos == "off":
        return ()
    added = _added(tokenizer)
    if bos == "on" and not added:
        if tokenizer.bos_token_id is None:
            raise CalibrationError("bos is on, but the model's tokenizer has no BOS token: leave the option out")
        return (int(tokenizer.bos_token_id),)
    return added


def begin_text(tokenizer: PreTrainedTokenizerBase, begin: tuple[int, ...]) -> str:
    """The same as text; empty for no token."""
    return "".join(tokenizer.convert_ids_to_tokens(list(begin)))


def prompt_ids(prompt: str, tokenizer: PreTrainedTokenizerBase, bos: str = "auto") -> list[int]:
    """Token ids of a prompt as the tokenizer gives them, but never with a second BOS.

    A prompt made by a chat template often begins with the BOS already.

    Args:
        prompt: any text.
        tokenizer: of the model.
        bos: see :func:`begin_ids`.

    Raises:
        RecipeError, CalibrationError: see :func:`begin_ids`.
    """
    begin = begin_ids(tokenizer, bos)
    there = begin_text(tokenizer, begin)
    twice = bool(there) and prompt.startswith(there)
    if canonical_bos(bos) == "auto" and not twice:
        return list(tokenizer(prompt, verbose=False).input_ids)
    rest = prompt.removeprefix(there)
    return [*begin, *tokenizer(rest, add_special_tokens=False, verbose=False).input_ids]


def _added(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The ids that a tokenizer puts before a text, found by asking it: settings and templates need not agree."""
    plain = list(tokenizer(_PROBE, add_special_tokens=False).input_ids)
    whole = list(tokenizer(_PROBE).input_ids)
    for at in range(len(whole) - len(plain) + 1):
        if whole[at : at + len(plain)] == plain:
            return tuple(whole[:at])
    return tuple(whole[:1]) if whole[0] == tokenizer.bos_token_id else ()
