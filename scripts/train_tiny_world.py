"""Train the bundled text-to-video model, one stage at a time; every stage resumes from the parts in --out.

    python scripts/train_tiny_world.py vae    --out runs/tiny-world --minutes 8
    python scripts/train_tiny_world.py flow   --out runs/tiny-world --minutes 9
    python scripts/train_tiny_world.py export --out runs/tiny-world --to samples/tiny-world

Several GPUs: start it with `torchrun --standalone --nproc_per_node N`; --batch and --clips are per process.
"""

import argparse
import time
from pathlib import Path

from tiny_world.export import export
from tiny_world.parallel import Workers
from tiny_world.settle import settle
from tiny_world.train_flow import train_flow
from tiny_world.train_vae import train_vae


def main() -> None:
    """Parse the command line and run a stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("vae", "settle", "flow", "export"))
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint parts")
    parser.add_argument("--to", type=Path, default=Path("samples/tiny-world"), help="folder of the export")
    parser.add_argument("--minutes", type=float, default=8.0, help="time budget of the stage; the rate anneals over it")
    parser.add_argument("--steps", type=int, default=None, help="a number of steps instead of a time budget")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=None, help="clips per step (default 16 for vae, 48 for flow)")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate")
    parser.add_argument("--clips", type=int, default=9000, help="clips in the bank of latents")
    parser.add_argument("--decoder-only", action="store_true", help="vae stage: keep the encoder, train the decoder")
    parser.add_argument("--toy", action="store_true", help="tiny sizes, to test the trainer itself on a CPU")
    args = parser.parse_args()
    start = time.monotonic()
    if args.stage == "export":
        export(args.out, args.to, args.toy)
        return
    if args.stage == "settle":
        settle(args.out, args.minutes, args.seed, args.toy)
        return
    workers = Workers()
    if args.stage == "vae":
        batch = args.batch or (2 if args.toy else 16)
        train_vae(
            args.out,
            workers,
            args.minutes,
            args.steps,
            args.seed,
            args.toy,
            batch,
            args.lr,
            args.decoder_only,
        )
    else:
        batch = args.batch or (2 if args.toy else 48)
        clips = 8 if args.toy else args.clips
        train_flow(args.out, workers, args.minutes, args.steps, args.seed, args.toy, batch, args.lr, clips)
    if workers.main:
        print(f"{args.stage} done in {time.monotonic() - start:.0f} s on {workers.count} x {workers.device.type}")
    workers.close()


if __name__ == "__main__":
    main()
