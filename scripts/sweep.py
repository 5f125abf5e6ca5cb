"""What each setting reads and what it costs, on the bundled model: many settings against one dense run.

    python scripts/sweep.py                       # every setting below, two prompts, 81 frames: ten minutes on 2 cores
    python scripts/sweep.py --frames 49 --only TempCache

Latent PSNR to the dense run, 10 log10(variance of the dense latents / mean squared error), free-running and with shared
history (every block starts from the dense run's past), over all generated latents and for single blocks. The first
block is dense in every setting and left out.
"""

import argparse
import time

import torch
from torch import Tensor

from diffaccel import Accel, FlashBlock, FrameWindow, TempCache
from diffaccel.pipelines.inputs import block_ranges
from diffaccel.pipelines.loading import load
from diffaccel.pipelines.presets import PRESETS
from diffaccel.report import Report

PROMPTS = [
    "a large red circle moves left over a teal checkerboard",
    "a small blue ring bounces over a striped navy background. the camera pans right",
]
SETTINGS = {
    "TempCache(0.95)": Accel(cache=TempCache(threshold=0.95)),
    "TempCache(0.9)": Accel(cache=TempCache(threshold=0.9)),
    "TempCache(0.9), nearest": Accel(cache=TempCache(threshold=0.9, match="key")),
    "TempCache(0.9), last key": Accel(cache=TempCache(threshold=0.9, representative="last")),
    "TempCache(0.8)": Accel(cache=TempCache(threshold=0.8)),
    "FlashBlock(2)": Accel(reuse=FlashBlock(refresh=2)),
    "FlashBlock(2), min_past=0": Accel(reuse=FlashBlock(refresh=2, min_past=0)),
    "FlashBlock(3)": Accel(reuse=FlashBlock(refresh=3)),
    "FlashBlock(0, 3, 6)": Accel(reuse=FlashBlock(refresh=(0, 3, 6))),
    "FlashBlock(3), clean pass too": Accel(reuse=FlashBlock(refresh=3, clean_pass="reuse")),
    "FrameWindow(6), sink 1": Accel(window=FrameWindow(frames=6, sink_frames=1)),
    "split kernel (noise floor)": Accel(kernel="split"),
    **{f"preset {name}": preset() for name, preset in PRESETS.items()},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=None, help="folder; default: the bundled model")
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--only", default="", help="settings whose name holds this text")
    options = parser.parse_args()
    pipe = load(options.model, pipeline="causal")
    call = {"height": 128, "width": 128, "num_inference_steps": 8, "guidance_scale": 2.5, "output_type": "latent"}

    def run(accel: Accel, history: Tensor | None = None) -> tuple[Tensor, Report, float]:
        generators = [torch.Generator().manual_seed(seed) for seed in range(len(PROMPTS))]
        applied = accel.apply(pipe, timing=True)
        began = time.perf_counter()
        try:
            latents = pipe(PROMPTS, num_frames=options.frames, generator=generators, history=history, **call).frames
        finally:
            applied.remove(check=False)
        return latents, applied.report(), time.perf_counter() - began

    dense, report, seconds = run(Accel())
    blocks = block_ranges(0, dense.shape[2], pipe.config.frames_per_block)[1:]
    shown = sorted({0, 1, len(blocks) // 2, len(blocks) - 1})

    def psnr(found: Tensor, start: int, stop: int) -> float:
        error = (found - dense)[:, :, start:stop].square().mean()
        return float(10 * torch.log10(dense.var() / error.clamp(min=1e-12)))

    print(
        f"dense: {seconds:.1f} s, attention {report.seconds['attention']:.1f} s; blocks {[b + 1 for b in shown]} shown"
    )
    print(f"{'setting':32s} kept  read  attention   free-running (blocks)           shared history (blocks)")
    for name, accel in SETTINGS.items():
        if options.only not in name:
            continue
        found, report, _ = run(accel)
        shared, _, _ = run(accel, dense)
        counts = [c for slot, c in report.slots.items() if slot != "prompt"] or list(report.slots.values())
        kept = min((c.keys_kept / c.keys_total for c in counts if c.method == "TempCache"), default=1.0)
        read = min((c.keys_read / c.keys_total for c in counts), default=1.0)
        columns = []
        for latents in (found, shared):
            each = " ".join(f"{psnr(latents, blocks[b].start, blocks[b].stop):6.1f}" for b in shown)
            columns.append(f"{psnr(latents, blocks[0].start, dense.shape[2]):6.1f} ({each})")
        print(
            f"{name:32s} {kept:4.2f}  {read:4.2f}  {report.seconds['attention']:6.2f} s   {'   '.join(columns)}",
            flush=True,
        )


if __name__ == "__main__":
    main()
