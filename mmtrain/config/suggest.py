"""The nearest valid name, for the end of an error message."""

from collections.abc import Iterable
from difflib import get_close_matches


def nearest(word: str, choices: Iterable[str]) -> str:
    """` (did you mean X?)` for the choice most like `word`, or an empty string when none is alike."""
    found = get_close_matches(word, list(choices), n=1, cutoff=0.5)
    return f" (did you mean {found[0]}?)" if found else ""
