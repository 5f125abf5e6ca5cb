"""Which techniques which families of pipelines take, as `scripts/support_matrix.py` found it out."""

import json
from importlib.resources import files

from .suggest import choose


def support() -> dict[str, dict[str, dict[str, str]]]:
    """By family and technique: `takes` ("yes", "approximately" or "no") and `why`, a sentence or "".

    "yes": on a tiny random model the technique engaged, and its exact setting was dense attention within rounding;
    "approximately": it engaged, and `why` says what its exact setting differs in; "no": refused with that sentence.
    """
    found: dict[str, dict[str, dict[str, str]]] = json.loads(files("diffaccel").joinpath("support.json").read_text())
    return found


def support_of(family: str) -> dict[str, dict[str, str]]:
    """`support` of one family. Raises `KnobError` for an unknown one."""
    known = support()
    return known[choose(family, known, "family of pipelines")]
