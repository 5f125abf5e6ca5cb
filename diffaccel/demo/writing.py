"""Writing a text, token by token as it is unmasked."""

from collections.abc import Iterator
from typing import Any

from ..text import Text as Written
from ..text import build_reuse, check_prompt, compare, unread, write
from .asked import Limits, Text
from .models import TextModel
from .result import Figures, Result
from .worker import Ticket

MASK = "░"


def check_text(asked: Text, model: TextModel, limits: Limits) -> None:
    """What can be refused at once. Raises `UsageError` or `KnobError`."""
    asked.check(limits)
    build_reuse(asked.preset, asked.set)
    check_prompt(model.opened, asked.prompt)
    _writer(asked, model)


def write_text(asked: Text, model: TextModel, result: Result, ticket: Ticket) -> None:
    """The work of a ticket."""
    opened, writer = model.opened, _writer(asked, model)
    prompt = opened.tokenizer(asked.prompt)["input_ids"]
    result.notes += unread(opened, asked.prompt, writer)
    how = build_reuse(asked.preset, asked.set, len(prompt) + writer.max_tokens)
    if asked.preset == "auto" and how[0] is None:
        result.notes.append("Exact, because a text of this length is too short for reuse to be sure to pay.")

    def on_step(tokens: list[int]) -> None:
        ticket.check()
        result.at("Writing")
        result.texts = [{"label": "being written", "text": _so_far(opened.tokenizer, tokens[len(prompt) :])}]

    if asked.compare:
        found = compare(opened, asked.prompt, writer, *how, on_step=on_step)
        arms = found.arms
        result.notes += found.lines()
    else:
        arms = {"asked": write(opened, asked.prompt, writer, *how, on_step=on_step)}
        result.notes.append(arms["asked"].about())
    result.texts = [{"label": NAMES[name], "text": text.text} for name, text in reversed(arms.items())]
    result.figures = {NAMES[name]: _figures(text) for name, text in reversed(arms.items())}
    result.reports = {name: text.to_dict() for name, text in arms.items()}
    if asked.compare:
        result.verdict = _verdict(arms["asked"], arms["dense"])
    if (idle := arms["asked"].idle) is not None:
        result.warnings.append(idle)


NAMES = {"asked": "as asked", "cached": "cache alone", "dense": "dense"}


def _writer(asked: Text, model: TextModel) -> Any:
    return model.opened.writer(
        max_tokens=asked.tokens, threshold=asked.threshold, temperature=asked.temperature, seed=asked.seed
    )


def _figures(text: Written) -> Figures:
    found = {"tokens/s": f"{text.speed:.1f}", "tokens": str(len(text.tokens)), "seconds": f"{text.seconds:.2f}"}
    return found | {"tokens forwarded": f"{text.report['tokens_forwarded']:,}"}


def _verdict(asked: Written, dense: Written) -> str:
    if asked.speed < dense.speed:
        return f"Slower here: {asked.speed:.1f} tokens/s and dense {dense.speed:.1f}, one text each."
    return f"{asked.speed:.1f} tokens/s and dense {dense.speed:.1f}: {asked.speed / dense.speed:.2f}x, one text each."


def _so_far(tokenizer: Any, tokens: list[int]) -> str:
    """Tokens that are still masked show as one sign each."""
    return "".join(_pieces(tokenizer, tokens))


def _pieces(tokenizer: Any, tokens: list[int]) -> Iterator[str]:
    known: list[int] = []
    for token in [*tokens, None]:
        if token is not None and token != tokenizer.mask_token_id:
            known.append(token)
            continue
        if known:
            yield tokenizer.decode(known, skip_special_tokens=True)
            known = []
        if token is not None:
            yield f" {MASK}"
