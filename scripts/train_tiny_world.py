"""Train the bundled text-to-video models, one stage after the other; every stage resumes from what --out holds.

    torchrun --standalone --nproc_per_node 2 scripts/train_tiny_world.py all --out runs/tw --to runs/tw/tiny-world

Single stages: `vae`, `flow`, `few_step`, then `export`, in this order, with the same --out; `sheet` draws the world
there. On one GPU start it with `python` and double --minutes. Without a GPU it runs at a small batch and says so.
Settings: scripts/tiny_world/configs.
"""

import argparse
import sys
import time
from pathlib import Path

import torch
from tiny_world.checkpoint import TrainingError
from tiny_world.config import STAGES, load_config
from tiny_world.export import export
from tiny_world.parallel import Workers
from tiny_world.preview import write_world
from tiny_world.train_few_step import train_few_step
from tiny_world.train_flow import train_flow
from tiny_world.train_vae import train_vae

TRAINERS = {"vae": train_vae, "flow": train_flow, "few_step": train_few_step}


def main() -> None:
    """Parse the command line and run what it names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=(*STAGES, "export", "sheet", "all"))
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of the stages' checkpoints (sheet: of the picture)"
    )
    parser.add_argument("--to", type=Path, help="folder of the export; the few-step model is written beside it")
    parser.add_argument("--config", default="full", help="full, toy, or the path of a .json file")
    parser.add_argument("--minutes", type=float, help="budget of the stage; the rate anneals over it")
    parser.add_argument("--steps", type=int, help="a number of steps instead of a time budget")
    parser.add_argument("--batch", type=int, help="clips a step and process")
    parser.add_argument("--clips", type=int, help="clips in the bank")
    parser.add_argument("--lr", type=float, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    if args.stage == "sheet":
        write_world(args.out / "world.jpg")
        return
    start = time.monotonic()
    workers = Workers()
    stages = STAGES if args.stage == "all" else tuple(stage for stage in STAGES if stage == args.stage)
    try:
        if args.stage in ("export", "all") and args.to is None:
            raise TrainingError("--to names the folder of the export; it is missing")
        config = load_config(args.config)
        if workers.device.type == "cpu" and not config.toy:
            config = config.without_gpu()
            workers.say(
                "no GPU: training runs in fp32, with a small batch and few clips; expect a model that only shows it"
            )
        for stage in stages:
            config = config.change(
                stage, minutes=args.minutes, steps=args.steps, batch=args.batch, clips=args.clips, lr=args.lr
            )
            TRAINERS[stage](config, args.out, workers, args.seed)
            took = time.monotonic() - start
            workers.say(f"{stage} done after {took:.0f} s on {workers.count} x {workers.device.type}")
            workers.wait()
            if workers.device.type == "cuda":
                torch.cuda.empty_cache()
        if args.stage in ("export", "all") and workers.main:
            export(config, args.out, args.to)
    except (TrainingError, OSError) as error:
        sys.exit(f"train_tiny_world: {error}")
    except torch.OutOfMemoryError as error:
        sys.exit(f"train_tiny_world: {str(error).splitlines()[0]}; use a smaller --batch or fewer --clips")
    finally:
        workers.close()


if __name__ == "__main__":
    main()
