"""Names typed by people: the choices are listed and the nearest is suggested."""

from collections.abc import Iterable
from difflib import get_close_matches

from .errors import KnobError


def choose(given: str, choices: Iterable[str], what: str) -> str:
    """`given` if it is one of `choices`, else a `KnobError` that lists them."""
    choices = list(choices)
    if given in choices:
        return given
    near = get_close_matches(given, choices, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise KnobError(f"unknown {what} {given!r}: choose one of {', '.join(choices)}{hint}")
