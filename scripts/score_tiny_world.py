"""Score a tiny-world checkpoint: VAE fidelity, and colour and direction on held-out combinations.

    python scripts/score_tiny_world.py samples/tiny-world --sampler pipeline --json scores.json --sheet sheet.jpg

Two controls are printed beside the scores: clips rendered from the scenes themselves (must be near 1) and the
same clips judged against other clips' prompts (must be near chance), so that the checks are seen to be able to fail.
"""

import argparse
import json
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from PIL import Image
from tiny_world.metrics import judge
from tiny_world.prompts import describe
from tiny_world.sampler import Sampler
from tiny_world.train_vae import VALIDATION_SEED, psnr, to_signed
from tiny_world.world import HELD_OUT, draw_scene, held_out_scenes, render

Generate = Callable[[Sequence[str], Sequence[int], int], np.ndarray]


def private(folder: Path, device: torch.device, steps: int, guidance: float, causal: bool) -> Generate:
    """The trainer's own sampler."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    sampler = Sampler.from_folder(folder, device, dtype)

    def generate(prompts: Sequence[str], seeds: Sequence[int], frames: int) -> np.ndarray:
        return sampler.decode(sampler.latents(prompts, seeds, frames, steps, guidance, causal=causal))

    return generate


def pipeline(folder: Path, device: torch.device, steps: int, guidance: float, causal: bool) -> Generate:
    """The toolkit's causal pipeline, or the library's own bidirectional one."""
    if causal:
        from diffaccel.pipelines import CausalWanPipeline as Pipeline
    else:
        from diffusers import WanPipeline as Pipeline
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    pipe = Pipeline.from_pretrained(folder, dtype=dtype).to(device)
    pipe.set_progress_bar_config(disable=True)

    def generate(prompts: Sequence[str], seeds: Sequence[int], frames: int) -> np.ndarray:
        result = pipe(
            prompt=list(prompts),
            num_frames=frames,
            height=128,
            width=128,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            output_type="np",
        )
        return np.asarray(result.frames)

    return generate


def vae_psnr(folder: Path, device: torch.device, clips: int, frames: int) -> float:
    """Mean PSNR of unseen clips through the library's own encode and decode."""
    vae = AutoencoderKLWan.from_pretrained(folder / "vae", dtype=torch.float32).to(device).eval()
    values = []
    with torch.no_grad():
        for index in range(clips):
            video = to_signed(render([draw_scene(VALIDATION_SEED + 1000 + index)], frames, device))
            values.append(psnr(video, vae.decode(vae.encode(video).latent_dist.mode()).sample))
    return sum(values) / len(values)


def contact_sheet(clips: np.ndarray, path: Path, rows: int, columns: int = 6) -> None:
    """`rows` clips (N, F, H, W, 3), `columns` frames of each, two clips side by side."""
    picks = np.linspace(0, clips.shape[1] - 1, columns).round().astype(int)
    strips = [np.concatenate([clip[i] for i in picks], axis=1) for clip in clips[: rows * 2]]
    left, right = np.concatenate(strips[0::2]), np.concatenate(strips[1::2])
    image = np.concatenate([left[: len(right)], right], axis=1)
    Image.fromarray((image * 255).round().astype(np.uint8)).save(path, quality=88)


def main() -> None:
    """Parse the command line, score, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("samples/tiny-world"))
    parser.add_argument("--sampler", choices=("private", "pipeline"), default="private")
    parser.add_argument("--bidirectional", action="store_true", help="all frames at once instead of block by block")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--guidance", type=float, default=2.5)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vae-clips", type=int, default=8)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--sheet", type=Path, default=None)
    args = parser.parse_args()

    device = torch.device(args.device)
    scenes = held_out_scenes(args.prompts, args.seed)
    rng = random.Random(args.seed)
    prompts = [describe(scene, rng) for scene in scenes]
    truth = render(scenes, args.frames, device).permute(0, 1, 3, 4, 2).float().div(255).cpu().numpy()
    order = np.random.default_rng(args.seed).permutation(len(scenes))
    shuffled = [scenes[i] for i in order]

    make = private if args.sampler == "private" else pipeline
    generate = make(args.folder, device, args.steps, args.guidance, not args.bidirectional)
    start = time.monotonic()
    parts = []
    for first in range(0, len(prompts), args.batch):
        batch = prompts[first : first + args.batch]
        parts.append(generate(batch, range(first, first + len(batch)), args.frames))
    clips = np.concatenate(parts)
    seconds = time.monotonic() - start

    scores = {
        "generated": judge(clips, scenes),
        "control_rendered_truth": judge(truth, scenes),
        "control_truth_other_prompts": judge(truth, shuffled),
        "control_generated_other_prompts": judge(clips, shuffled),
        "vae_psnr_db": vae_psnr(args.folder, device, args.vae_clips, 81) if args.vae_clips else None,
        "generation_seconds": seconds,
        "settings": {
            "sampler": args.sampler,
            "bidirectional": args.bidirectional,
            "prompts": len(prompts),
            "frames": args.frames,
            "steps": args.steps,
            "guidance": args.guidance,
            "seed": args.seed,
            "device": device.type,
            "held_out_combinations": len(HELD_OUT),
        },
    }
    print(json.dumps(scores, indent=1))
    if args.json:
        args.json.write_text(json.dumps(scores, indent=1) + "\n")
    if args.sheet:
        contact_sheet(clips, args.sheet, rows=min(8, len(clips) // 2))


if __name__ == "__main__":
    main()
