"""What each part of FreeSwim buys on the bundled model: a base video, enlarged with more and more of the method.

    python scripts/upscale_quality.py --out OUT                    # two CPU cores, about half an hour
    python scripts/upscale_quality.py --out OUT --prompts 1 --frames 9 --scales 2 --arms dense native    # a minute

The arms start from the same base video and the same noise. Repetition is the largest autocorrelation of a frame (less
its median colour) at shifts of at least half the frame, above that of the base video enlarged as pixels: 0 where
nothing is repeated that was not before. Agreement is the PSNR of the result, reduced to the base video's size, with it.
Sharpness is the mean size of differences between neighbouring pixels, as a multiple of that of the base video enlarged.
Lines go to OUT/upscale.jsonl as they come, first frames to OUT/upscale.png.
"""

import argparse
import json
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from diffaccel import Accel, FullFieldGuide, Grid, InwardWindow
from diffaccel.kernel.boxes import Boxes
from diffaccel.pipelines import FreeSwimPipeline
from diffaccel.pipelines.free_swim import enlarge
from diffaccel.pipelines.loading import BUNDLED_MODELS, defaults, load
from diffaccel.quality import psnr

PROMPTS = (
    "a large red circle moves left",
    "a small blue square moves up",
    "a large yellow triangle moves right",
    "a small white star moves down",
)


@dataclass(frozen=True)
class PlainWindow(InwardWindow):
    """The window cut off at the borders in place of shifted: the ablation."""

    def plan(self, q: Any, entries: Any, site: Any) -> Boxes | None:
        if site.full_field:
            return None
        assert self.size is not None
        grid = site.grid
        frames = entries.count // grid.tokens_per_frame
        rows, columns = (
            tuple(((i, i + 1), (max(0, i - size // 2), min(length, i + size // 2 + 1))) for i in range(length))
            for size, length in zip(self.size, (grid.height, grid.width), strict=True)
        )
        whole = (((0, grid.frames), (0, frames)),)
        return Boxes(grid, Grid(frames, grid.height, grid.width), whole, rows, columns, self.gather_mib << 20)


def arms_of(window: InwardWindow, scale: float) -> dict[str, Accel]:
    """By how much of the method they have; the last ones differ in how it is run."""
    assert window.size is not None
    one = replace(window, tile=(1, 1))
    half = replace(window, tile=tuple((side + 1) // 2 for side in window.size))
    whole, native = FullFieldGuide, partial(FullFieldGuide, shrink=scale)
    return {
        "dense": Accel(),
        "plain windows": Accel(window=PlainWindow(one.size, ratio=one.ratio)),
        "inward windows": Accel(window=one),
        "whole field, every step": Accel(window=one, reuse=whole(every=1)),
        "whole field": Accel(window=one, reuse=whole(every=2)),
        "whole field, logits as they are": Accel(window=replace(one, ratio=1.0), reuse=whole(every=2)),
        "native field, every step": Accel(window=one, reuse=native(every=1)),
        "native field": Accel(window=one, reuse=native(every=2)),
        "native field, tiles of half a window": Accel(window=half, reuse=native(every=2)),
        "native field, tiles of a quarter": Accel(window=window, reuse=native(every=2)),
    }


def repetition(frames: NDArray[np.float64], least: int) -> float:
    """The largest normalised autocorrelation at shifts of `least` pixels or more, mean over frames."""
    found = []
    for frame in frames:
        rest = frame - np.median(frame, axis=(0, 1))
        size = [2 * side for side in frame.shape[:2]]
        power = sum(np.abs(np.fft.rfft2(rest[..., c], s=size)) ** 2 for c in range(3))
        correlation = np.fft.irfft2(power, s=size)
        rows, columns = (np.minimum(np.arange(n), n - np.arange(n)) for n in size)
        far = np.maximum(rows[:, None], columns[None]) >= least
        found.append(correlation[far].max() / max(correlation[0, 0], 1e-12))
    return float(np.mean(found))


def sharpness(frames: NDArray[np.float64]) -> float:
    return float(np.abs(np.diff(frames, axis=1)).mean() + np.abs(np.diff(frames, axis=2)).mean())


def measure(made: NDArray[Any], base: NDArray[Any]) -> dict[str, float]:
    """The scores of a clip beside the base video, both in [0, 1]."""
    height, width = made.shape[1:3]
    large = enlarge(base, height, width) / 255.0
    small = np.stack(
        [cv2.resize(f, (base.shape[2], base.shape[1]), interpolation=cv2.INTER_AREA) for f in made.astype(np.float32)]
    )
    least = height // 2
    return {
        "repetition": repetition(made.astype(np.float64), least) - repetition(large, least),
        "agreement": float(np.mean(psnr(np.clip(small, 0, 1), base))),
        "sharpness": sharpness(made.astype(np.float64)) / sharpness(large),
    }


def sheet(title: str, shown: dict[str, NDArray[np.uint8]], columns: int = 4, side: int = 256) -> NDArray[np.uint8]:
    """Frames under their names, in rows, under a title."""
    cells = []
    for name, frame in shown.items():
        cell = np.full((side + 20, side, 3), 255, np.uint8)
        cell[20:] = cv2.resize(frame, (side, side), interpolation=cv2.INTER_AREA)
        cells.append(_written(cell, name))
    cells += [np.full_like(cells[0], 255)] * (-len(cells) % columns)
    rows = [np.concatenate(cells[i : i + columns], 1) for i in range(0, len(cells), columns)]
    return np.concatenate([_written(np.full((20, columns * side, 3), 255, np.uint8), title), *rows])


def _written(image: NDArray[np.uint8], text: str) -> NDArray[np.uint8]:
    cv2.putText(image, text, (4, 14), cv2.FONT_HERSHEY_SIMPLEX, 0.42, (0, 0, 0), 1, cv2.LINE_AA)
    return image


def main() -> None:
    """Parse the command line, generate, measure, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default=BUNDLED_MODELS[0])
    parser.add_argument("--prompts", type=int, default=3)
    parser.add_argument("--frames", type=int, default=25)
    parser.add_argument("--scales", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--strength", type=float, default=0.7)
    parser.add_argument("--arms", nargs="+", help="the beginning of the names of those to run")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    pipe = load(args.model)
    usual: Any = defaults(pipe, args.model)
    settings = {"num_inference_steps": usual.num_inference_steps, "guidance_scale": usual.guidance_scale}
    settings = {name: value for name, value in settings.items() if value is not None}
    log = (args.out / "upscale.jsonl").open("w")
    sheets: list[NDArray[np.uint8]] = []
    scores: dict[tuple[int, str], list[dict[str, float]]] = {}
    for scale in args.scales:
        for prompt in PROMPTS[: args.prompts]:

            def noise() -> torch.Generator:
                return torch.Generator().manual_seed(0)

            native = {"height": usual.height, "width": usual.width}
            base = pipe(prompt, **native, num_frames=args.frames, **settings, generator=noise()).frames[0]
            size = {"height": scale * usual.height, "width": scale * usual.width}
            big = FreeSwimPipeline(pipe, native=(usual.height, usual.width), guide_field="whole")  # arms say their own
            shown = {"the base video, enlarged": enlarge(base[:1], **size)[0]}
            for name, accel in arms_of(big.accel.window, scale).items():
                if args.arms and not any(name.startswith(arm) for arm in args.arms):
                    continue
                big.accel, began = accel, time.perf_counter()
                made = big(prompt, base, **size, strength=args.strength, **settings, generator=noise()).frames[0]
                found = {**measure(made, base), "seconds": time.perf_counter() - began}
                scores.setdefault((scale, name), []).append(found)
                log.write(json.dumps({"scale": scale, "arm": name, "prompt": prompt, **found}) + "\n")
                log.flush()
                print(
                    f"{scale}x {name:32s} {prompt}: " + ", ".join(f"{k} {v:.3g}" for k, v in found.items()), flush=True
                )
                shown[name] = np.rint(made[0] * 255).astype(np.uint8)
            sheets.append(sheet(f"{scale}x, {prompt}", shown))
            cv2.imwrite(str(args.out / "upscale.png"), np.concatenate(sheets)[..., ::-1])
    print("| scale, arm | repetition | agreement, dB | sharpness | seconds |\n|---|---|---|---|---|")
    for (scale, name), found in scores.items():
        means = {key: float(np.mean([row[key] for row in found])) for key in found[0]}
        cells = [f"{means['repetition']:.3f}", f"{means['agreement']:.1f}", f"{means['sharpness']:.2f}"]
        print(f"| {scale}x {name} | {' | '.join(cells)} | {means['seconds']:.0f} |")


if __name__ == "__main__":
    main()
