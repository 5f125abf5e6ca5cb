"""Score clips of the tiny world against the scenes they were asked to show, with no learned judge.

    python scripts/score_tiny_world.py samples/tiny-world --json scores.json --sheet sheet.jpg
    python scripts/score_tiny_world.py --prompts-only --suite held_out --out asked
    diffaccel generate --prompts asked/prompts.txt --out asked --frames 81
    python scripts/score_tiny_world.py --clips asked

held_out: what the prompt names, in combinations that were never drawn for training. memory: the six events.
drift: windows of long clips against their first one. Controls are printed beside the scores: the scenes' own
rendering must be near 1, the rendering of other scenes near chance, blank, blurred and motionless clips near 0.
"""

import argparse
import json
import platform
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image
from tiny_world.drift import drift, drift_scenes
from tiny_world.metrics import Clip, judge, memory_scenes, read, remembers, shares, to_uint8, truth
from tiny_world.prompts import describe
from tiny_world.world import EVENTS, FRAMES, SIZE, Scene, draw_scene, held_out_scenes

import diffaccel
from diffaccel.errors import DiffaccelError

VAE_SEED = 790_000_000
SUITES = ("held_out", "memory", "drift")
CONTROL_CLIPS = 32
"""Clips that are blanked, blurred or held still for a control."""
_SPEED_WORDS = ("slowly", "gently", "quickly", "fast")


class ScoreError(DiffaccelError, ValueError):
    """What was asked for cannot be scored."""


@dataclass(frozen=True)
class Item:
    """A clip to score: its file's name, its suite, how its scene is drawn again, the scene and its prompt."""

    file: str
    suite: str
    source: dict[str, Any]
    scene: Scene
    prompt: str

    def to_dict(self) -> dict[str, Any]:
        """An entry of scenes.json."""
        return {"file": self.file, "suite": self.suite, **self.source, "prompt": self.prompt}


def scene_of(entry: dict[str, Any]) -> Scene:
    """The scene that an entry of scenes.json names."""
    if entry["suite"] == "held_out":
        return held_out_scenes(int(entry["index"]) + 1, int(entry["seed"]))[-1]
    return draw_scene(int(entry["seed"]), (entry["event"] if entry["suite"] == "memory" else None,))


def wording(scene: Scene) -> str:
    """A prompt that says how fast things move, where anything moves: what is scored must have been asked for."""
    rng = random.Random(scene.seed)
    for _ in range(50):
        text = describe(scene, rng)
        if any(word in _SPEED_WORDS for word in text.replace(".", " ").replace(",", " ").split()):
            break
    return text


def plan(suites: Sequence[str], prompts: int, events: int, long: int, seed: int) -> tuple[list[Item], dict[str, int]]:
    """What to generate, and per event how many scenes were dropped because their own rendering does not pass."""
    items, dropped = [], {}
    if "held_out" in suites:
        for index, scene in enumerate(held_out_scenes(prompts, seed)):
            source = {"seed": seed, "index": index}
            items.append(Item(f"held_out-{index:04d}.npy", "held_out", source, scene, wording(scene)))
    if "memory" in suites:
        for event in EVENTS:
            scenes, drawn = memory_scenes(event, events, seed)
            dropped[event] = drawn - len(scenes)
            for index, scene in enumerate(scenes):
                source = {"seed": scene.seed, "event": event}
                items.append(Item(f"{event}-{index:04d}.npy", "memory", source, scene, wording(scene)))
    if "drift" in suites:
        for index, scene in enumerate(drift_scenes(long, seed)):
            items.append(Item(f"drift-{index:04d}.npy", "drift", {"seed": scene.seed}, scene, wording(scene)))
    return items, dropped


def write_plan(folder: Path, items: Sequence[Item]) -> None:
    """scenes.json and prompts.txt, one prompt a line in the same order."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "scenes.json").write_text(json.dumps([item.to_dict() for item in items], indent=1) + "\n")
    (folder / "prompts.txt").write_text("\n".join(item.prompt for item in items) + "\n")


def read_plan(folder: Path, suites: Sequence[str]) -> list[Item]:
    """The items of a folder's scenes.json that belong to the suites."""
    path = folder / "scenes.json"
    if not folder.is_dir():
        raise ScoreError(f"there is no folder '{folder}'; make one with --out")
    if not path.is_file():
        raise ScoreError(f"'{folder}' has no scenes.json, which says what its clips should show; make one with --out")
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        items = []
        for entry in entries:
            if entry["suite"] not in SUITES or (entry["suite"] == "memory" and entry["event"] not in EVENTS):
                raise ValueError(f"unknown suite or event in {entry}")
            if entry["suite"] in suites:
                source = {name: entry[name] for name in ("seed", "index", "event") if name in entry}
                items.append(Item(str(entry["file"]), entry["suite"], source, scene_of(entry), str(entry["prompt"])))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ScoreError(f"'{path}' is no list of scenes ({type(error).__name__}: {error})") from error
    if not items:
        raise ScoreError(f"'{path}' names no clip of {', '.join(suites)}")
    missing = [item.file for item in items if not (folder / item.file).is_file()]
    if missing:
        raise ScoreError(f"'{folder}' lacks {len(missing)} of its {len(items)} clips, first '{missing[0]}'")
    return items


def read_clip(path: Path) -> np.ndarray:
    """A clip (F, H, W, 3) uint8 of a .npy or a video file."""
    from diffaccel.video import read_video

    if path.suffix != ".npy":
        return read_video(path)
    try:
        clip = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ScoreError(f"'{path}' cannot be read as an array: {error}") from error
    if clip.ndim != 4 or clip.shape[-1] != 3 or (clip.dtype.kind != "f" and clip.dtype != np.uint8):
        raise ScoreError(f"'{path}' must hold (F, H, W, 3), uint8 or float in 0..1, not {clip.dtype} {clip.shape}")
    if not np.isfinite(clip).all():
        raise ScoreError(f"'{path}' holds values that are not finite")
    return to_uint8(clip)


def check_clip(clip: np.ndarray, suite: str, name: str, frames: int | None = None) -> None:
    """Raise `ScoreError` for a clip of a size or length that its suite does not score, or of other than `frames`."""
    count, height, width, _ = clip.shape
    if (height, width) != (SIZE, SIZE):
        raise ScoreError(f"'{name}' is {width}x{height}, and the world's clips are {SIZE}x{SIZE}")
    rules = {
        "held_out": (count >= 9, "at least 9 frames"),
        "memory": (count == FRAMES, f"{FRAMES} frames, over which the events play"),
        "drift": (count >= 2 * FRAMES, f"at least {2 * FRAMES} frames, two windows"),
    }
    fits, rule = rules[suite]
    if not fits:
        raise ScoreError(f"'{name}' has {count} frames, and {suite} is scored on {rule}")
    if frames is not None and count != frames:
        raise ScoreError(f"'{name}' has {count} frames where the clips before it have {frames}")


class Maker:
    """Generates the clips of a suite with a pipeline, keeping the latents of the last call."""

    def __init__(self, model: str, device: str | None, steps: int | None, guidance: float | None, batch: int) -> None:
        from diffaccel.pipelines.loading import defaults, load

        self.pipe = load(model, device=device)
        found = defaults(self.pipe, model)
        if (found.width, found.height) != (SIZE, SIZE):
            raise ScoreError(f"'{model}' generates {found.width}x{found.height}, and the world is {SIZE}x{SIZE}")
        self.batch = batch
        self.settings = {
            "num_inference_steps": steps if steps is not None else found.num_inference_steps,
            "guidance_scale": guidance if guidance is not None else found.guidance_scale,
        }
        self.latents: list[np.ndarray] = []

    def __call__(self, items: Sequence[Item], frames: int, seed: int) -> Iterator[np.ndarray]:
        """Clips (F, H, W, 3) uint8; row i starts from the noise of `seed` + i."""
        import inspect

        streams = "callback_on_chunk_end" in inspect.signature(self.pipe.__call__).parameters
        self.latents = []
        for start in range(0, len(items), self.batch):
            rows = items[start : start + self.batch]
            blocks: list[torch.Tensor] = []
            extra = {"callback_on_chunk_end": _keeper(blocks)} if streams else {}
            made = self.pipe(
                prompt=[item.prompt for item in rows],
                height=SIZE,
                width=SIZE,
                num_frames=frames,
                generator=[torch.Generator().manual_seed(seed + start + i) for i in range(len(rows))],
                output_type="np",
                **{name: value for name, value in self.settings.items() if value is not None},
                **extra,
            ).frames
            if blocks:
                self.latents.append(torch.cat(blocks, dim=2).numpy())
            print(f"{start + len(rows)} of {len(items)} {rows[0].suite} clips", file=sys.stderr, flush=True)
            yield from to_uint8(np.asarray(made))


def _keeper(blocks: list[torch.Tensor]) -> Any:
    def keep(pipe: Any, block: int, count: int, tensors: dict[str, torch.Tensor]) -> None:
        blocks.append(tensors["latents"].float().cpu())

    return keep


def other_scenes(scenes: Sequence[Scene]) -> list[Scene]:
    """The same scenes in another order, none in its place where there are two or more."""
    shift = min(5, len(scenes) - 1)
    return [*scenes[shift:], *scenes[:shift]]


def damaged(clip: np.ndarray, how: str) -> np.ndarray:
    """A clip that must fail: "blank" gray, "blurred" by 5 pixels, or its first frame held "still"."""
    if how == "blank":
        return np.full_like(clip, 128)
    if how == "still":
        return np.repeat(clip[:1], len(clip), axis=0)
    return np.stack([cv2.GaussianBlur(frame, (0, 0), 5.0) for frame in clip])


Scores = dict[str, dict[str, Any]]


def score_held_out(clips: Iterator[np.ndarray], scenes: Sequence[Scene], controls: bool, device: str) -> Scores:
    """Shares per control, of what single-sprite scenes name."""
    readings, frames = [], 0
    for clip in clips:
        frames = len(clip)
        readings.append(read(clip))
    others = other_scenes(scenes)
    out: Scores = {"clips": _judged(readings, scenes), "clips_of_others": _judged(readings, others)}
    if controls:
        readings, ruined = [], {"blank": [], "blurred": []}
        for clip in truth(scenes, frames, device):
            for how, found in ruined.items():
                if len(found) < CONTROL_CLIPS:
                    found.append(read(damaged(clip, how)))
            readings.append(read(clip))
        out |= {"truth": _judged(readings, scenes), "truth_of_others": _judged(readings, others)}
        out |= {how: _judged(found, scenes) for how, found in ruined.items()}
    return out


def _judged(readings: Sequence[Any], scenes: Sequence[Scene]) -> dict[str, float]:
    return shares([judge(reading, scene) for reading, scene in zip(readings, scenes, strict=False)])


def score_memory(clips: Iterator[np.ndarray], scenes: Sequence[Scene], controls: bool, device: str) -> Scores:
    """Shares per control and event; the clips of other scenes are those of the same event."""
    rows: dict[str, dict[str, float]] = {}

    def note(column: str, event: str, passed: list[bool]) -> None:
        rows.setdefault(column, {})[event] = sum(passed) / len(passed)

    for event in dict.fromkeys(str(scene.event) for scene in scenes):
        here = [scene for scene in scenes if scene.event == event]
        made = [Clip(next(clips), 2) for _ in here]
        note("clips", event, [remembers(clip, scene) for clip, scene in zip(made, here, strict=True)])
        if controls:
            real = list(truth(here, FRAMES, device))
            kept = [Clip(clip, 2) for clip in real]
            note("truth", event, [remembers(clip, scene) for clip, scene in zip(kept, here, strict=True)])
            if len(here) > 1:
                pairs = zip(kept, other_scenes(here), strict=True)
                note("truth_of_others", event, [remembers(clip, scene) for clip, scene in pairs])
            for how in ("blank", "still"):
                pairs = zip(real[:CONTROL_CLIPS], here, strict=False)
                note(how, event, [remembers(damaged(clip, how), scene) for clip, scene in pairs])
    for row in rows.values():
        if "return" in row and "pan_return" in row:
            row["returns_the_same"] = (row["return"] + row["pan_return"]) / 2
    return dict(rows)


def score_drift(
    clips: Iterator[np.ndarray], scenes: Sequence[Scene], controls: bool, device: str, maker: Maker | None
) -> Scores:
    """How the clips, and the scenes' own rendering, change over their windows."""
    made = list(clips)
    latents = np.concatenate(maker.latents) if maker is not None and maker.latents else None
    out: Scores = {"clips": drift(made, latents=latents)}
    if controls:
        out["truth"] = drift(truth(scenes, len(made[0]), device))
    return out


@torch.no_grad()
def vae_fidelity(vae: Any, clips: int) -> dict[str, float]:
    """Mean PSNR in dB and SSIM of unseen 81-frame clips through the VAE's own encode and decode."""
    from diffaccel.quality import psnr, ssim

    like = next(vae.parameters())
    values = []
    for frames in truth([draw_scene(VAE_SEED + index) for index in range(clips)]):
        pixels = torch.from_numpy(frames).to(like).div(127.5).sub(1).permute(3, 0, 1, 2)[None]
        decoded = vae.decode(vae.encode(pixels).latent_dist.mode()).sample[0].clamp(-1, 1)
        video = to_uint8(decoded.add(1).div(2).permute(1, 2, 3, 0).float().cpu().numpy())
        values.append((psnr(frames, video).mean(), ssim(frames, video).mean()))
    means = np.mean(values, axis=0)
    return {"psnr_db": float(means[0]), "ssim": float(means[1]), "clips": clips}


def contact_sheet(clips: Sequence[np.ndarray], path: Path, columns: int = 6) -> None:
    """Clips (F, H, W, 3) uint8, `columns` frames of each, two clips side by side."""
    strips = []
    for clip in clips:
        strips.append(np.concatenate(list(clip[np.linspace(0, len(clip) - 1, columns).round().astype(int)]), axis=1))
    if len(strips) % 2:
        strips.append(np.zeros_like(strips[0]))
    rows = [np.concatenate(strips[i : i + 2], axis=1) for i in range(0, len(strips), 2)]
    Image.fromarray(np.concatenate(rows)).save(path, quality=88)


def table(scores: Scores) -> str:
    """One line a score, one column a control."""
    columns = list(scores)
    names = dict.fromkeys(name for column in scores.values() for name in column)
    wide = max(map(len, names))
    lines = [" " * wide + "".join(f"  {name:>15}" for name in columns)]
    for name in names:
        cells = (_cell(scores[column].get(name, "")) for column in columns)
        lines.append((name.ljust(wide) + "".join(f"  {cell:>15}" for cell in cells)).rstrip())
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(_cell, value))
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="folder of the checkpoint to generate with")
    parser.add_argument("--clips", type=Path, help="score this folder's clips (scenes.json says of what)")
    parser.add_argument("--suite", default=",".join(SUITES), help="a comma-separated choice of %(default)s")
    parser.add_argument("--prompts", type=int, default=256, help="clips of held_out")
    parser.add_argument("--events", type=int, default=32, help="clips of each event")
    parser.add_argument("--long", type=int, default=16, help="clips of drift")
    parser.add_argument("--windows", type=int, default=4, help=f"windows of {FRAMES} frames in a clip of drift")
    parser.add_argument("--frames", type=int, default=FRAMES, help="frames of a clip of held_out")
    parser.add_argument("--steps", type=int, help="by default the checkpoint's own, as is the guidance")
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0, help="of the scenes and of the noise, 0 to 999")
    parser.add_argument("--device", help="by default CUDA where there is one")
    parser.add_argument("--vae-clips", type=int, default=0, help="also send this many clips through the VAE")
    parser.add_argument("--no-controls", action="store_true", help="leave out the controls")
    parser.add_argument("--prompts-only", action="store_true", help="write scenes.json and prompts.txt to --out")
    parser.add_argument("--out", type=Path, help="write the generated clips here, losslessly, with their scenes.json")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--sheet", type=Path, help="an image of some clips, six frames of each")
    args = parser.parse_args(arguments)
    args.suites = [name for name in SUITES if name in args.suite.split(",")]
    if not args.suites or set(args.suite.split(",")) - set(SUITES):
        raise ScoreError(f"--suite takes {', '.join(SUITES)}, not '{args.suite}'")
    for name in ("prompts", "events", "long", "batch"):
        if getattr(args, name) < 1:
            raise ScoreError(f"--{name} must be at least 1, got {getattr(args, name)}")
    if not 0 <= args.seed < 1000:
        raise ScoreError(f"--seed must lie in 0..999, got {args.seed}")
    if args.frames < 9 or args.frames % 4 != 1 or args.windows < 2:
        raise ScoreError("--frames must be 1 + 4k and at least 9, and --windows at least 2")
    if args.prompts_only and args.out is None:
        raise ScoreError("--prompts-only writes to a folder; name it with --out")
    if args.prompts_only and "drift" in args.suites and len(args.suites) > 1:
        raise ScoreError(
            "the clips of drift are longer than the others; write each to a folder of its own with --suite"
        )
    if args.model is None and args.clips is None and not args.prompts_only:
        raise ScoreError("name the folder of a model to generate with, or clips to score with --clips")
    if args.vae_clips and args.model is None:
        raise ScoreError("--vae-clips needs a model")
    for path in (args.json, args.sheet):
        if path is not None and not path.absolute().parent.is_dir():
            raise ScoreError(f"the folder of '{path}' does not exist")
    return args


def score(args: argparse.Namespace) -> dict[str, Any]:
    """Generate or read, and score; what --json holds."""
    dropped: dict[str, int] = {}
    if args.clips is not None:
        items = read_plan(args.clips, args.suites)
    else:
        items, dropped = plan(args.suites, args.prompts, args.events, args.long, args.seed)
    maker = None
    if args.model is not None and (args.clips is None or args.vae_clips):
        maker = Maker(args.model, args.device, args.steps, args.guidance, args.batch)
    render_on = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if args.out is not None:
        write_plan(args.out, items)
    shown: list[np.ndarray] = []
    lengths: dict[str, int] = {}

    def clips_of(suite: str, own: Sequence[Item]) -> Iterator[np.ndarray]:
        if args.clips is None:
            # One more than whole windows, as the VAE has it; the last frame is not scored.
            frames = {"held_out": args.frames, "memory": FRAMES, "drift": FRAMES * args.windows}[suite]
            assert maker is not None
            source = maker(own, frames + (1 - frames) % 4, args.seed * 1_000_000)
        else:
            source = (read_clip(args.clips / item.file) for item in own)
        for index, (item, clip) in enumerate(zip(own, source, strict=True)):
            check_clip(clip, suite, item.file, lengths.get(suite))
            lengths[suite] = len(clip)
            if args.out is not None:
                np.save(args.out / item.file, clip)
            # an odd stride, as held-out combinations come round every sixteenth clip
            if index % (max(1, len(own) // 8) | 1) == 0:
                shown.append(clip)
            yield clip

    result: dict[str, Any] = {"suites": {}}
    for suite in args.suites:
        own = [item for item in items if item.suite == suite]
        if not own:
            continue
        began = time.monotonic()
        scenes, clips, controls = [item.scene for item in own], clips_of(suite, own), not args.no_controls
        if suite == "held_out":
            scores = score_held_out(clips, scenes, controls, render_on)
        elif suite == "memory":
            scores = score_memory(clips, scenes, controls, render_on)
        else:
            scores = score_drift(clips, scenes, controls, render_on, maker if args.clips is None else None)
        result["suites"][suite] = scores
        print(f"{suite}, {len(own)} clips, {time.monotonic() - began:.0f} s\n{table(scores)}\n", flush=True)
    if dropped:
        print(f"scenes dropped because their own rendering is ambiguous: {dropped}")
    if args.vae_clips and maker is not None:
        result["vae"] = vae_fidelity(maker.pipe.vae, args.vae_clips)
        print(f"vae {result['vae']['psnr_db']:.2f} dB, ssim {result['vae']['ssim']:.4f}, {args.vae_clips} clips")
    if args.sheet is not None:
        contact_sheet(shown, args.sheet)
    return result | about(args, items, lengths, dropped, maker)


def about(
    args: argparse.Namespace,
    items: Sequence[Item],
    lengths: dict[str, int],
    dropped: dict[str, int],
    maker: Maker | None,
) -> dict[str, Any]:
    """With what, when and where the scores were made."""
    import diffusers

    device = str(maker.pipe.device) if maker is not None else "cpu"
    return {
        "model": args.model,
        "clips": str(args.clips) if args.clips is not None else None,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else f"{device} {platform.machine()}",
        "versions": {
            "diffaccel": diffaccel.__version__,
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "numpy": np.__version__,
        },
        "settings": {
            **(maker.settings if maker is not None and args.clips is None else {}),
            "dtype": None if maker is None else str(maker.pipe.transformer.dtype).removeprefix("torch."),
            "seed": args.seed,
            "batch": args.batch,
            "frames": lengths,
            "dropped_scenes": dropped,
        },
        "scenes": [item.source | {"suite": item.suite} for item in items],
    }


def named_for_generate(items: Sequence[Item]) -> list[Item]:
    """The items with the file names that `diffaccel generate --prompts` gives their prompts."""
    from dataclasses import replace

    from diffaccel.cli.job import slugs

    names = slugs([item.prompt for item in items])
    return [replace(item, file=f"{name}.mp4") for item, name in zip(items, names, strict=True)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; exit code 2 where something asked for cannot be scored."""
    try:
        args = parse(arguments)
        if args.prompts_only:
            items, _ = plan(args.suites, args.prompts, args.events, args.long, args.seed)
            write_plan(args.out, named_for_generate(items))
            return 0
        result = score(args)
    except DiffaccelError as error:
        print(error, file=sys.stderr)
        return 2
    if args.json is not None:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
