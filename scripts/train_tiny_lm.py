"""Train the bundled block-diffusion language model, and write it where it can be loaded; resumes from what --out holds.

    python scripts/train_tiny_lm.py all --out runs/tiny-lm --to samples/tiny-lm
    python scripts/train_tiny_lm.py all --config cpu --out runs/toy --to runs/toy/tiny-lm

Single stages: `train`, then `export`, with the same --out. `--config cpu` learns a toy version of one task on two CPU
cores; `--config finish` goes on there from what `full` left in --out. Settings: scripts/tiny_lm/configs; documents are
drawn by rule as training goes (scripts/tiny_lm/tasks.py).
"""

import argparse
import sys
import time
from pathlib import Path

import torch
from tiny_lm.export import export
from tiny_lm.model import load_config
from tiny_lm.train import train
from tiny_world.checkpoint import TrainingError


def main() -> None:
    """Parse the command line and run what it names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("train", "export", "all"))
    parser.add_argument("--out", type=Path, required=True, help="folder of weights, optimisers and metrics.jsonl")
    parser.add_argument("--to", type=Path, help="folder of the exported model")
    parser.add_argument("--config", default="full", help="full, finish, cpu, or the path of a .json file")
    parser.add_argument("--minutes", type=float, help="budget of the training; the rate falls over its last part")
    parser.add_argument("--steps", type=int, help="stop after so many steps, whatever the budget")
    parser.add_argument("--lr", type=float, help="peak learning rate of the matrices")
    parser.add_argument("--adam-lr", type=float, help="peak learning rate of everything else")
    parser.add_argument("--tokens", type=int, help="tokens a step, noisy copies included")
    parser.add_argument("--tasks", nargs="+", help="only these tasks")
    parser.add_argument("--no-compile", action="store_true", help="do not compile the layers")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    begin = time.monotonic()
    try:
        if args.stage != "train" and args.to is None:
            raise TrainingError("--to names the folder of the export; it is missing")
        config = load_config(
            args.config,
            minutes=args.minutes,
            lr=args.lr,
            adam_lr=args.adam_lr,
            tokens=args.tokens,
            tasks=args.tasks,
            compiled=False if args.no_compile else None,
        )
        if args.stage != "export":
            train(config, args.out, device, args.seed, args.steps)
        if args.stage != "train":
            export(config, args.out, args.to, device)
        print(f"done after {time.monotonic() - begin:.0f} s")
    except (TrainingError, OSError) as error:
        sys.exit(f"train_tiny_lm: {error}")
    except torch.OutOfMemoryError as error:
        sys.exit(f"train_tiny_lm: {str(error).splitlines()[0]}; use fewer --tokens")


if __name__ == "__main__":
    main()
