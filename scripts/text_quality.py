"""What FlashBlock costs a language model in right answers: tau and the fate of changed tokens, on the bundled model.

    OMP_NUM_THREADS=1 python scripts/text_quality.py --out text_quality.jsonl --documents 24    # a look
    OMP_NUM_THREADS=1 python scripts/text_quality.py --out text_quality.jsonl                   # hours on one core

Every arm goes on from the same held-out prompts, one at a time, through `BlockLM` and diffusers' LLaDA2Pipeline. Exact
match and tokens right are those of score_tiny_lm.py; share is computed of attention to finished blocks. A threshold
above 1 unmasks one token a step. Rules for a token that changed since the outside was computed are those of
`TokenCount`, and a control: "none", in which no token reads anything of the finished blocks after a block's first step.

Results are written to --out as they come, a line an arm and task; at the end a Markdown table is printed.
"""

import argparse
import json
import platform
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from score_tiny_lm import Setting, load_model, score_task
from tiny_lm.tasks import TASKS

from diffaccel.pipelines.block_lm import BlockLM, TokenCount

RULES = ("drop", "recompute", "keep", "none")


class Blind(BlockLM):
    """After a block's first step all tokens count as changed, and read nothing."""

    def _answer(self, progress: Any, tokens: torch.Tensor, kept: int) -> Any:
        answer, _ = super()._answer(progress, tokens, kept)
        everything = torch.ones_like(tokens[:, -self.block_length :], dtype=torch.bool)
        return answer, everything if answer == "reuse" else None


@dataclass(frozen=True)
class Arm:
    rule: str
    tau: int

    def model(self, lm: Any, block: int) -> BlockLM:
        """The model to generate with."""
        if self.rule == "exact":
            return BlockLM(lm, block)
        kind = Blind if self.rule == "none" else BlockLM
        reuse = TokenCount(self.tau, "drop" if self.rule == "none" else self.rule)
        return kind(lm, block, reuse=reuse, approximate=self.rule == "none")  # whose cache is not exact, and found out


def arms(rules: Sequence[str], taus: Sequence[int], block: int) -> Iterator[Arm]:
    """All of a block length, in which more than `block` tokens never change."""
    yield Arm("exact", 1)
    for rule in rules:
        for tau in sorted({min(tau, block + 1) for tau in taus}) if rule != "none" else [block + 1]:
            yield Arm(rule, tau)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A line an arm: exact match and tokens right of each task, steps a block and share over all tasks."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    names = ["block", "threshold", "rule", "tau", *(f"{task}: exact, tokens" for task in tasks), "steps", "share"]
    lines = ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    keys = ("block", "threshold", "rule", "tau")
    for arm in dict.fromkeys(tuple(row[key] for key in keys) for row in rows):
        found = {row["task"]: row for row in rows if tuple(row[key] for key in keys) == arm}
        block, threshold, rule, tau = arm
        cells = [str(block), "one a step" if threshold > 1 else f"{threshold:g}", rule]
        cells.append("never" if tau > block else str(tau))
        cells += [f"{found[t]['exact']:.3f}, {found[t]['tokens']:.3f}" if t in found else "" for t in tasks]
        for name in ("steps_per_block", "external_share"):
            values = [row[name] for row in found.values()]
            cells.append(f"{sum(values) / len(values):.2f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Parse the command line, generate every arm, write and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the results, a .jsonl file")
    parser.add_argument("--model", type=Path, default=Path(__file__).resolve().parent.parent / "samples" / "tiny-lm")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, help="unless those of generation.json")
    parser.add_argument("--documents", type=int, default=96, help="documents a task")
    parser.add_argument("--blocks", type=int, nargs="+", default=[8, 4])
    parser.add_argument("--thresholds", type=float, nargs="+", default=[1.1, 0.95, 0.9])
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES))
    parser.add_argument("--taus", type=int, nargs="+", default=[2, 3, 4, 6, 9])
    args = parser.parse_args()
    try:
        lm, tokenizer, usual = load_model(args.model)
        args.out.write_text("")
    except (OSError, ValueError) as error:
        sys.exit(f"text_quality: {error}")
    where = torch.cuda.get_device_name() if lm.device.type == "cuda" else f"{platform.machine()} CPU"
    print(f"{where}, {torch.get_num_threads()} threads, fp32, torch {torch.__version__}, {args.documents} documents")
    rows = []
    for block in args.blocks:
        for threshold in args.thresholds:
            setting = Setting(usual, block, threshold, batch=1)
            for arm in arms(args.rules, args.taus, block):
                model = arm.model(lm, block)
                for task in args.tasks or usual["tasks"]:
                    about = {"block": block, "threshold": threshold, "rule": arm.rule, "tau": arm.tau, "task": task}
                    found = score_task(model, tokenizer, task, setting, args.documents, usual["max_length"])
                    rows.append(about | found)
                    with args.out.open("a") as stream:
                        stream.write(json.dumps(rows[-1]) + "\n")
                    print(json.dumps(rows[-1]), flush=True)
    print(table(rows))


if __name__ == "__main__":
    main()
