"""Caches over their life: one table in the prompt, several questions about it, on the bundled language model.

    python scripts/score_policies.py --json policies.json
    python scripts/score_policies.py --budgets 128 64 --tasks recall --documents 12

After SCBench (arXiv 2412.10319): a cache that was compressed for one question is asked another. A document is a table
and `--questions` questions about it, one at a time: behind the table the question is exchanged, and what was kept of
the table stays. `seen`: the first question is there when the table is compressed, the others are not. `blind`: the
table is compressed before any question is, for all of them alike. Columns: the seen question, those that follow it, and
all questions of blind. Exact match: every token of the answer, which plain rules give.

Budgets count tokens, mean over layers and heads, and hold `--recent` newest and 4 first ones; ZipCache holds all, in
fewer bits. The control drops at random, so what a score is worth is what it has above that. Of documents with filler
between table and question, as the model was trained on; documents do not follow one another, so questions are
requests and no conversation.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from score_tiny_lm import load_model
from tiny_lm.tasks import EOS, IDS, held_out, score, to_text

from diffaccel import CAKE, H2O, LazyEviction, SnapKV, TaskKV, ZipCache
from diffaccel.cache.look import Look
from diffaccel.cache.scored import Scored
from diffaccel.pipelines.block_lm import BlockLM
from diffaccel.policy import CachePolicy
from diffaccel.techniques import SinkRecent

SEED = 5
SINK = 4
ANSWER = 12


@dataclass(frozen=True)
class Lot(Scored):
    """Keeps what the lot says: the control."""

    paper: ClassVar[str] = "none"
    summary: ClassVar[str] = "keeps tokens of the past by lot"

    def score(self, look: Look) -> torch.Tensor:
        """The same for a token whenever it is asked."""
        return torch.sin(look.token.double() * 12.9898 + look.layer) * 43758.5453 % 1


def arms(budget: int, recent: int) -> dict[str, CachePolicy | bool]:
    """By name; what is protected and chosen fits the budget."""
    kept = {"budget": budget, "recent_frames": recent, "sink_frames": SINK}
    scored = {policy.__name__: policy(**kept) for policy in (SnapKV, H2O, CAKE, TaskKV, LazyEviction)}
    return {
        "SinkRecent": SinkRecent(budget - SINK, SINK),
        "lot": Lot(**kept),
        **scored,
        "SnapKV, pool 1": SnapKV(**kept, pool=1),
        "SnapKV, means of the rest": SnapKV(**kept, pool=1, dropped="mean"),
    }


def questions(task: str, ids: torch.Tensor, start: int, count: int) -> list[tuple[torch.Tensor, str]]:
    """Prompts (n,) that ask about other stretches of the table of this one (n,), with the document's own first."""
    generator = torch.Generator().manual_seed(int(ids.sum()))
    words = to_text(ids[:start]).split()
    first, last = words[-4], words[-2]
    length = (int(last[1:]) - int(first[1:])) % 100
    labels = {int(word[1:]) for word in words[2 : words.index("|")] if word.startswith("#")}
    may = [at for at in sorted(labels) if all((at + i) % 100 in labels for i in range(length + 1))]
    asked = [int(first[1:]), *(may[i] for i in torch.randperm(len(may), generator=generator)[: count - 1])]
    prompts = []
    for at in asked:
        prompt = ids[:start].clone()
        prompt[start - 4], prompt[start - 2] = IDS[f"#{at:02}"], IDS[f"#{(at + length) % 100:02}"]
        prompts.append(prompt)
    return [(prompt, to_text(prompt)) for prompt in prompts]


def answer(model: BlockLM, prompt: torch.Tensor, mask: int, threshold: float, most: int) -> str:
    """Greedy, block by block: all tokens surer than `threshold` at a step, one at least; until `<eos>`."""
    block, start = model.block_length, len(prompt)
    ids = torch.full((-(-(start + most) // block) * block,), mask)
    ids[:start] = prompt
    for stop in range(start // block * block + block, len(ids) + 1, block):
        own = slice(stop - block, stop)
        while bool((hidden := ids[own] == mask).any()):
            logits = model(ids[None, :stop].to(model.device)).logits[0].cpu()
            logits[:, mask] = -torch.inf  # else a block may stay hidden for ever
            sure, token = logits.softmax(-1).max(-1)
            sure = sure.masked_fill(~hidden, -1)
            chosen = (sure > threshold) | (sure == sure.max())
            ids[own] = torch.where(chosen & hidden, token, ids[own])
        if bool((ids[start:stop] == EOS).any()):
            break
    found = ids[start:].tolist()
    return to_text(torch.tensor(found[: found.index(EOS)] if EOS in found else found))


def judge(model: BlockLM, task: str, options: argparse.Namespace, mask: int, usual: dict[str, Any]) -> dict[str, float]:
    """Exact match of the question that was seen, of those that follow, and of all where none was."""
    found: dict[str, list[float]] = {"seen": [], "next": [], "blind": []}
    documents = held_out(task, options.documents, options.length, ANSWER, SEED, options.entries)
    for ids in documents.ids:
        prompts = questions(task, ids, documents.start, options.questions)
        for blind in (False, True):
            model.reset()
            if blind:
                block = model.block_length  # what the passes over the table are made from ends before the question
                whole = (documents.start - 5) // block * block
                model(torch.cat([ids[:whole], torch.full((block,), mask)])[None].to(model.device))
            for number, (prompt, text) in enumerate(prompts):
                right = score(text, answer(model, prompt, mask, usual["threshold"], ANSWER + 4))
                found["blind" if blind else "next" if number else "seen"].append(right)
    return {name: sum(values) / len(values) for name, values in found.items()}


def main() -> None:
    """Parse the command line, ask and judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("samples/tiny-lm"))
    parser.add_argument("--tasks", nargs="+", choices=("recall", "sum", "edit"), default=["recall", "sum"])
    parser.add_argument("--budgets", nargs="+", type=int, default=[64])
    parser.add_argument("--recent", type=int, default=16, help="newest tokens that are always kept")
    parser.add_argument("--length", type=int, default=160, help="tokens of a document")
    parser.add_argument("--entries", type=int, default=48, help="of the table")
    parser.add_argument("--documents", type=int, default=12, help="documents a task")
    parser.add_argument("--questions", type=int, default=4)
    parser.add_argument("--arms", nargs="+", help="names of arms, unless all")
    parser.add_argument("--json", type=Path, help="write the scores there")
    options = parser.parse_args()
    bare, tokenizer, usual = load_model(options.model)
    mask, rows = tokenizer.mask_token_id, []
    caches: list[tuple[str, int | None, CachePolicy | bool]] = [
        ("all tokens", None, True),
        ("ZipCache", None, ZipCache(recent_frames=options.recent, sink_frames=SINK)),
        *((name, budget, arm) for budget in options.budgets for name, arm in arms(budget, options.recent).items()),
    ]
    for name, budget, cache in caches:
        if options.arms and name not in options.arms:
            continue
        model = BlockLM(bare, usual["block_length"], cache=cache, graphs=False)
        for task in options.tasks:
            row = {"task": task, "cache": name, "budget": budget, **judge(model, task, options, mask, usual)}
            rows.append(row)
            print(
                " | ".join(f"{value:.3f}" if isinstance(value, float) else str(value) for value in row.values()),
                flush=True,
            )
    if options.json:
        options.json.write_text(
            json.dumps({"options": {k: str(v) for k, v in vars(options).items()}, "rows": rows}, indent=1)
        )


if __name__ == "__main__":
    main()
