"""The prompt of an evaluation that asks for phrases: a text with `PHRASE` where the phrase goes."""

from __future__ import annotations

from vlabs.data.preprocessing import Preprocessing
from vlabs.errors import UserError


def check_prompt(prompt: str) -> None:
    """Raise a UserError if a prompt has no place for the phrase."""
    if "PHRASE" not in prompt:
        raise UserError(f"task.prompt={prompt} must say where the phrase goes, such as 'is there a PHRASE?'")


def with_phrase(prompt: str, phrase: str, preprocessing: Preprocessing, where: str) -> str:
    """The text that asks for a phrase.

    Args:
        prompt: the prompt.
        phrase: the phrase.
        preprocessing: of the model that reads the text.
        where: what names the phrase, for the message.

    Raises:
        UserError: the model reads fewer tokens, so that the text ends before the phrase does.
    """
    text = prompt.replace("PHRASE", phrase)
    if preprocessing.characters_read(text) < prompt.index("PHRASE") + len(phrase.rstrip()):
        raise UserError(
            f"{where}: the model reads {preprocessing.max_length} tokens, so of task.prompt={prompt:.60} with the "
            f"phrase '{phrase:.60}' it does not see the end of the phrase: pass a shorter one"
        )
    return text
