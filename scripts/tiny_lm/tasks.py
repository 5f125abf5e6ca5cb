"""Five tasks whose documents are drawn by rule, in batches, and whose answers a plain solver checks.

A document is `<bos> task table | filler from A to Z = answer <eos> ...`: the answer needs the table, far back. What
makes it hard is the number of entries in the table, the filler behind them, and how much is asked for.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product

import torch

TASKS = ("recall", "walk", "edit", "sum", "close")
PAD, BOS, EOS, MASK = range(4)
WORDS = (*TASKS, "from", "to", "=", "|", ">", ")", "set", "swap")
FILLER = ("and", "so", "then", "but", "now", "or", "yet", "thus", "well", "oh", "also", "still", "just", "even")
DIGITS = tuple("0123456789")
TERMS = tuple(f"{value:+}" for value in range(-9, 10))
LABELS = tuple(f"#{i:02}" for i in range(100))
NAMES = tuple("".join(letters) for letters in product("bdfgklmr", "aeio", "nstz"))
VOCABULARY = ("<pad>", "<bos>", "<eos>", "<mask>", *WORDS, *FILLER, *DIGITS, *TERMS, *LABELS, *NAMES)
IDS = {token: index for index, token in enumerate(VOCABULARY)}
DIGIT, TERM, LABEL, NAME = IDS["0"], IDS["-9"], IDS["#00"], IDS[NAMES[0]]

UNIT = {"recall": 2, "walk": 1, "edit": 2, "sum": 2, "close": 1}
"""Tokens of the answer an entry."""
SIZE = {"recall": 2.0, "walk": 3.0, "edit": 3.125, "sum": 2.0, "close": 2.5}
"""Tokens of the table an entry, at most."""
MOST = {"recall": 100, "walk": 200, "edit": 100, "sum": 100, "close": 84}
FRAME = 9
"""Tokens around table, filler and answer: <bos> task | from A to Z = and an <eos>."""
SHARE = 31
"""One document in so many is held out."""


@dataclass(frozen=True)
class Documents:
    """Documents (rows, length) of one task; `ids[:, start:stop]` is the answer, `<eos>` follows to the end."""

    task: str
    ids: torch.Tensor
    start: int
    stop: int


class Draw:
    """Random tensors from one generator."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator
        self.device = generator.device
        # Sizes are drawn apart, so that none waits for a device.
        self.sizes = random.Random(generator.initial_seed())

    def below(self, bound: int, *shape: int) -> torch.Tensor:
        """Integers under `bound`."""
        return torch.randint(bound, shape, generator=self.generator, device=self.device)

    def one(self, low: int, high: int) -> int:
        """An integer from `low` to `high`, both included."""
        return self.sizes.randint(low, max(low, high))

    def some(self, rows: int, total: int, count: int) -> torch.Tensor:
        """For every row `count` different integers under `total`, in random order."""
        return torch.rand(rows, total, generator=self.generator, device=self.device).argsort(1)[:, :count]


def _take(values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Entries (rows, n, ...) at `index` (rows, m)."""
    return values[torch.arange(len(values), device=values.device)[:, None], index]


def _span(draw: Draw, rows: int, entries: int, count: int) -> torch.Tensor:
    """Indices (rows, count) of neighbouring entries."""
    return draw.below(entries - count + 1, rows, 1) + torch.arange(count, device=draw.device)


def _labels(draw: Draw, rows: int, entries: int) -> torch.Tensor:
    """Neighbouring labels; #00 follows #99."""
    return LABEL + (draw.below(100, rows, 1) + torch.arange(entries, device=draw.device)) % 100


Parts = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
"""Table (rows, n), the words after `from` and `to` (rows,), answer (rows, m)."""


def _listed(draw: Draw, labels: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Labels and values by turns, shuffled in pairs, (rows, 2 n)."""
    return _take(torch.stack([labels, values], 2), draw.some(*labels.shape, labels.shape[1])).flatten(1)


def _recall(draw: Draw, rows: int, entries: int, count: int) -> Parts:
    """Labels and names, shuffled; the answer lists some in order."""
    labels, names = _labels(draw, rows, entries), NAME + draw.below(len(NAMES), rows, entries)
    index = _span(draw, rows, entries, count)
    asked = torch.stack([_take(labels, index), _take(names, index)], 2)
    return _listed(draw, labels, names), asked[:, 0, 0], asked[:, -1, 0], asked.flatten(1)


def _walk(draw: Draw, rows: int, entries: int, count: int) -> Parts:
    """Links of one cycle of names and labels by turns, shuffled; the answer follows them."""
    half = entries // 2
    names, labels = NAME + draw.some(rows, len(NAMES), half), LABEL + draw.some(rows, len(LABELS), half)
    cycle = torch.stack([names, labels], 2).flatten(1)
    links = torch.stack([torch.full_like(cycle, IDS[">"]), cycle, cycle.roll(-1, 1)], 2)
    table = _take(links, draw.some(rows, 2 * half, 2 * half)).flatten(1)
    index = draw.below(2 * half, rows, 1) + torch.arange(min(count, 2 * half - 1) + 1, device=draw.device)
    path = _take(cycle, index % (2 * half))
    return table, path[:, 0], path[:, -1], path[:, 1:]


def _edit(draw: Draw, rows: int, entries: int, count: int) -> Parts:
    """A labelled list, and commands that set an entry or swap two, none of them twice; the answer is the new list."""
    labels = _labels(draw, rows, entries)
    names = NAME + draw.below(len(NAMES), rows, entries)
    sets, swaps = entries // 4, entries // 8
    touched = draw.some(rows, entries, sets + 2 * swaps)
    put, left, right = touched.split([sets, swaps, swaps], 1)
    fresh = NAME + draw.below(len(NAMES), rows, sets)
    commands = torch.cat(
        [
            torch.stack([torch.full_like(put, IDS["set"]), _take(labels, put), fresh], 2),
            torch.stack([torch.full_like(left, IDS["swap"]), _take(labels, left), _take(labels, right)], 2),
        ],
        1,
    )
    commands = _take(commands, draw.some(rows, sets + swaps, sets + swaps)).flatten(1)
    after = names.scatter(1, put, fresh).scatter(1, left, _take(names, right)).scatter(1, right, _take(names, left))
    index = _span(draw, rows, entries, count)
    asked = torch.stack([_take(labels, index), _take(after, index)], 2)
    table = torch.cat([torch.stack([labels, names], 2).flatten(1), commands], 1)
    return table, asked[:, 0, 0], asked[:, -1, 0], asked.flatten(1)


def _sum(draw: Draw, rows: int, entries: int, count: int) -> Parts:
    """Labelled terms, shuffled; the answer is their running sum modulo 10, in order."""
    labels, terms = _labels(draw, rows, entries), draw.below(len(TERMS), rows, entries)
    index = _span(draw, rows, entries, count)
    running = (_take(terms, index) - 9).cumsum(1) % 10
    asked = torch.stack([_take(labels, index), DIGIT + running], 2)
    return _listed(draw, labels, TERM + terms), asked[:, 0, 0], asked[:, -1, 0], asked.flatten(1)


def _close(draw: Draw, rows: int, entries: int, count: int) -> Parts:
    """Names that open, some of which `)` closes at once; the answer lists those still open, from the inside out."""
    closed = entries // 2
    names = NAME + draw.some(rows, len(NAMES), entries + closed)
    names, inner = names.split([entries, closed], 1)
    where = draw.some(rows, entries, closed)
    kept = torch.ones(rows, entries, 4, dtype=torch.bool, device=draw.device)
    kept[..., 1:] = torch.zeros_like(names, dtype=torch.bool).scatter(1, where, True)[..., None]
    second = torch.zeros_like(names).scatter(1, where, inner)
    # Every row keeps as many; a stable sort moves them to the front in their order.
    front = (~kept).flatten(1).byte().argsort(dim=1, stable=True)[:, : entries + 3 * closed]
    table = _take(torch.stack([names, second, torch.full_like(names, IDS[")"]), second], 2).flatten(1), front)
    asked = _take(names, _span(draw, rows, entries, count + 1)).flip(1)
    return table, asked[:, 0], asked[:, -1], asked[:, 1:]


MAKERS: dict[str, Callable[[Draw, int, int, int], Parts]] = {
    "recall": _recall,
    "walk": _walk,
    "edit": _edit,
    "sum": _sum,
    "close": _close,
}


def most_entries(task: str, length: int, answer: int, ends: int = 1) -> int:
    """Entries that a document of `length` tokens has room for, beside an answer and `ends` of <eos>."""
    return min(MOST[task], int((length - answer - FRAME - ends + 1) / SIZE[task]))


def make(
    task: str, rows: int, length: int, answer: int, entries: int, draw: Draw, ends: int = 1, filler: bool = True
) -> Documents:
    """Documents with `entries` in the table and about `answer` tokens of answer.

    Without `filler` they may be shorter than `length`. Raises `ValueError` for what does not fit.
    """
    count = max(1, min(answer // UNIT[task], entries - 1))
    table, first, last, asked = MAKERS[task](draw, rows, entries, count)

    def word(token: int | torch.Tensor, times: int = 1) -> torch.Tensor:
        if isinstance(token, torch.Tensor):
            return token[:, None]
        return torch.full((rows, times), token, device=draw.device)

    room = length - table.shape[1] - asked.shape[1] - FRAME - ends + 1
    if room < 0:
        raise ValueError(f"{entries} entries of {task} do not fit {length} tokens; they take {length - room}")
    noise = IDS[FILLER[0]] + draw.below(len(FILLER), rows, room if filler else 0)
    head = [word(BOS), word(IDS[task]), table, word(IDS["|"]), noise]
    question = [word(IDS["from"]), word(first), word(IDS["to"]), word(last), word(IDS["="])]
    ids = torch.cat([*head, *question, asked, word(EOS, ends)], 1)
    return Documents(task, ids, ids.shape[1] - ends - asked.shape[1], ids.shape[1] - ends)


def is_held_out(ids: torch.Tensor) -> torch.Tensor:
    """Whether a document (..., length) is one that training leaves out: by a checksum of its tokens, (...)."""
    weights = (torch.arange(ids.shape[-1], device=ids.device) * 40503 + 7919) % 65521
    return (ids * weights).sum(-1) % SHARE == 0


def held_out(task: str, rows: int, length: int, answer: int, seed: int, entries: int | None = None) -> Documents:
    """Documents that training leaves out, the same on every machine; as many entries as fit unless told."""
    draw = Draw(torch.Generator().manual_seed(seed * len(TASKS) + TASKS.index(task)))
    entries = most_entries(task, length, answer) if entries is None else entries
    found: list[torch.Tensor] = []
    while sum(map(len, found)) < rows:
        documents = make(task, 8 * SHARE, length, answer, entries, draw)
        found.append(documents.ids[is_held_out(documents.ids)])
    return Documents(task, torch.cat(found)[:rows], documents.start, documents.stop)


def draw_training(task: str, rows: int, length: int, longest: int, draw: Draw) -> Documents:
    """Documents of random difficulty, answers of 8 to `longest` tokens.

    Half of the time the table is at least half of what fits; else small ones are as likely as large ones, because
    looking a word up is learned from few entries first.
    """
    answer, ends = draw.one(8, longest), draw.one(1, max(1, min(16, length // 6)))
    most = most_entries(task, length, answer, ends)
    small = draw.sizes.random() < 0.5
    entries = round(3 * (most / 3) ** draw.sizes.random()) if small else draw.one(max(2, most // 2), most)
    return make(task, rows, length, answer, entries, draw, ends)


def to_text(ids: torch.Tensor) -> str:
    """Tokens (n,) as text."""
    return " ".join(VOCABULARY[i] for i in ids.tolist())


def solve(prompt: str) -> str:
    """The answer to a prompt, read as text by plain rules; it knows nothing of how the prompt was drawn."""
    words = [word for word in prompt.split() if word not in ("<bos>", "<pad>")]
    task, bar = words[0], words.index("|")
    table = iter(words[1:bar])
    first, last = words[-4], words[-2]
    if task == "recall":
        names = dict(zip(*[table] * 2, strict=True))
        return " ".join(word for label in _label_range(first, last) for word in (label, names[label]))
    if task == "sum":
        terms = {label: int(term) for label, term in zip(*[table] * 2, strict=True)}
        total, out = 0, []
        for label in _label_range(first, last):
            total = (total + terms[label]) % 10
            out += [label, str(total)]
        return " ".join(out)
    if task == "edit":
        values = {}
        for word in table:
            if word == "set":
                label = next(table)
                values[label] = next(table)
            elif word == "swap":
                left, right = next(table), next(table)
                values[left], values[right] = values[right], values[left]
            else:
                values[word] = next(table)
        return " ".join(word for label in _label_range(first, last) for word in (label, values[label]))
    if task == "walk":
        links = {a: b for _, a, b in zip(*[table] * 3, strict=True)}
        path = [links[first]]
        while path[-1] != last:
            path.append(links[path[-1]])
        return " ".join(path)
    stack: list[str] = []
    for word in table:
        if word != ")":
            stack.append(word)
        elif stack.pop() != (name := next(table)):
            raise ValueError(f"{name} closes where another is open")
    stack.reverse()
    return " ".join(stack[stack.index(first) + 1 : stack.index(last) + 1])


def _label_range(first: str, last: str) -> Iterator[str]:
    start = int(first[1:])
    return (f"#{(start + i) % 100:02}" for i in range((int(last[1:]) - start) % 100 + 1))


def score(prompt: str, text: str) -> float:
    """1 where `text` is the answer to the prompt, else 0."""
    return float(text.split() == solve(prompt).split())
