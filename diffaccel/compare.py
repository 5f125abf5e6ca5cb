"""Dense beside accelerated: what a setting gains here, and what it costs.

    from diffaccel.compare import compare

    result = compare(pipe, balanced(), prompt="a large red circle moves left", num_frames=81)
    print(result)
    result.write("comparison")

A generation that feeds on its own output amplifies rounding, so one PSNR says little. Four are given, each against
the same dense video: the accelerated one generated freely; the accelerated one with shared history, where the past
of every chunk is the dense run's latents; the noise floor, which is dense attention computed in parts and
merged, mathematically equal and rounded otherwise; and another seed, which is as far as a video can be and still fit
the prompt.
"""

import inspect
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import isnan
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .accel import Accel
from .errors import DiffaccelError, NotEngagedError, UnsupportedError
from .quality import FrameScores, chunk_borders, compare_clips
from .report import Report
from .run import Run
from .video import check_output, side_by_side, to_uint8, write_video

ARMS = {
    "dense": "dense attention",
    "free_running": "accelerated",
    "other_seed": "dense attention, another seed",
    "shared_history": "accelerated, every chunk from the dense run's history",
    "noise_floor": "dense attention, rounded otherwise",
}
"""Every generation of a comparison, in the order in which they run."""

_DENSE, _FAST = ("dense", "other_seed"), ("free_running", "shared_history")
_PARTS = {
    "attention": ("attention", "attention"),
    "denoise": ("denoising", "denoise"),
    "end_to_end": ("end to end, decoding included", "total"),
}  # speed-up: its name in a sentence, and the seconds of a report it is made of


@dataclass(frozen=True)
class Comparison:
    """The result of `compare`. Clips are (F, H, W, 3) uint8; `reports` has one `Report` an arm (see `ARMS`).

    `scores` holds "free_running", "noise_floor", "other_seed" and, where the pipeline is block-causal,
    "shared_history", each against the dense clip, computed before rounding to uint8. `speedup` is dense seconds over
    accelerated seconds, above 1 where the method is faster, for "attention" (None where it was not measured),
    "denoise" and "end_to_end", decoding included. `tokens` is the length of the whole video's sequence. `idle` is the
    sentence about techniques that were asked for and never engaged, else None.
    """

    dense: NDArray[np.uint8]
    accelerated: NDArray[np.uint8]
    reports: dict[str, Report]
    scores: dict[str, FrameScores]
    speedup: dict[str, float | None]
    tokens: int
    settings: dict[str, Any]
    idle: str | None = None

    def speed_sentences(self) -> list[str]:
        """One sentence each for attention, denoising and end to end, with the seconds of every run; says so where the
        method is slower, and where slow and fast runs overlap, so that scatter is not taken for a gain."""
        sentences = []
        for key, (name, part) in _PARTS.items():
            ratio = self.speedup[key]
            dense, fast = (_times(self.reports, part, arms) for arms in (_DENSE, _FAST))
            if ratio is None or dense is None or fast is None:
                sentences.append(f"{name}: not measured")
                continue
            slower = "" if ratio >= 1 else "slower here: "
            runs = " against ".join(f"{' and '.join(f'{s:.2f}' for s in times)} s" for times in (dense, fast))
            overlap = min(dense) <= max(fast) and min(fast) <= max(dense)
            doubt = "; the runs overlap, so this is no clear difference" if overlap else ""
            sentences.append(f"{name}: {slower}{ratio:.2f}x at {self.tokens} tokens ({runs}{doubt})")
        return sentences

    def to_dict(self) -> dict[str, Any]:
        """Everything but the clips, for strict JSON: the report of the accelerated run, with `quality` filled in, and
        beside it the speed-ups and the reports of the other arms."""
        return {
            **self.reports["free_running"].to_dict(),
            "quality": {name: scores.to_dict() for name, scores in self.scores.items()},
            "speedup": self.speedup,
            "speed": self.speed_sentences(),
            "tokens": self.tokens,
            "settings": self.settings,
            "idle": self.idle,
            "arms": {name: report.to_dict() for name, report in self.reports.items() if name != "free_running"},
        }

    def write(self, folder: str | Path, fps: float = 16.0) -> list[Path]:
        """Write dense.mp4, accelerated.mp4, side_by_side.mp4 and report.json into `folder`, which is made if need be.

        Raises `VideoError` if its parent folder is absent or not writable. Returns the paths.
        """
        target = Path(folder)
        if not target.is_dir():
            check_output(target)
            target.mkdir()
        labels = ("dense", "accelerated")
        seconds = [self.reports[arm].seconds for arm in ("dense", "free_running")]
        captions = [f"{_seconds(s['total'])} s in all, denoising {_seconds(s['denoise'])} s" for s in seconds]
        both = side_by_side(list(zip(labels, (self.dense, self.accelerated), strict=True)), captions)
        report = target / "report.json"
        paths = [
            write_video(target / "dense.mp4", self.dense, fps),
            write_video(target / "accelerated.mp4", self.accelerated, fps),
            write_video(target / "side_by_side.mp4", both, fps),
        ]
        report.write_text(json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n", encoding="utf-8")
        return [*paths, report]

    def table(self) -> str:
        """Scores and speeds as aligned text."""
        rows = [("against the dense video", "PSNR", "worst frame", "SSIM", "flicker", "seam")]
        for name, s in self.scores.items():
            # pooled: a mean of decibels is lifted by early frames that hardly differ
            psnr = (_decibel(s.psnr_pooled), _decibel(s.psnr_worst)) if not s.identical else ("identical", "identical")
            flicker = f"{_ratio(s.flicker, s.flicker_reference)} of dense"
            seam = "none" if isnan(s.seam) else f"{s.seam:.2f} ({s.seam_reference:.2f})"  # of a video made at once
            rows.append((ARMS[name], *psnr, f"{s.ssim_mean:.4f}", flicker, seam))
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([*lines, *self.speed_sentences(), *([self.idle] if self.idle else [])])

    def __str__(self) -> str:
        return self.table()


def compare(
    pipe: Any,
    accel: Accel,
    *,
    prompt: str,
    seed: int = 0,
    other_seed: int | None = None,
    warm_up: bool = True,
    on_arm: Callable[[str, int, int], None] | None = None,
    **arguments: Any,
) -> Comparison:
    """Generate densely and accelerated on the same noise, and measure both.

    All arms use the kernel of `accel`, but for the noise floor, which merges partial attentions ("split"). They
    alternate: dense, accelerated, dense with another seed, accelerated with shared history, then the noise floor; the
    speed-up compares the mean of the first and third with that of the second and fourth. Short generations that are
    not timed come first.

    Args:
        pipe: a pipeline `Accel` can take, not accelerated now.
        accel: what to measure.
        prompt: one prompt.
        seed, other_seed: of the noise; `other_seed` is `seed + 1` unless given.
        warm_up: whether to run that first generation.
        on_arm: called as `on_arm(name, number, count)` before each arm starts.
        arguments: of the pipeline's call, such as `height`, `width`, `num_frames`, `num_inference_steps`,
            `guidance_scale`, `image`, `callback_on_step_end`.

    Returns:
        `Comparison`. A technique that never engages does not stop the comparison; its `idle` then says so.

    Raises:
        UnsupportedError: the pipeline cannot take a technique.
        ValueError: an argument breaks a rule of the pipeline.
    """
    arguments = {**arguments, "prompt": prompt}
    for taken in ("generator", "output_type", "history", "latents"):
        if taken in arguments:
            raise DiffaccelError(
                f"compare sets {taken!r} itself, once for each arm; leave it out and pass seed instead"
            )
    other_seed = seed + 1 if other_seed is None else other_seed
    causal = bool(getattr(pipe, "block_causal", False))
    names = [name for name in ARMS if causal or name != "shared_history"]
    if warm_up:
        run_briefly(pipe, (Accel(kernel=accel.kernel), accel), seed, arguments)

    reports: dict[str, Report] = {}
    scores: dict[str, FrameScores] = {}
    idle: str | None = None
    history: torch.Tensor | None = None
    dense: NDArray[np.float32] = np.empty(0, dtype=np.float32)
    accelerated = dense
    borders: tuple[int, ...] = ()
    for number, name in enumerate(names):
        if on_arm is not None:
            on_arm(name, number, len(names))
        made = run_arm(pipe, name, accel, other_seed if name == "other_seed" else seed, arguments, history)
        idle = idle or made.idle
        reports[name] = made.report
        if name == "dense":
            history, dense = made.latents, made.frames
            borders = chunk_starts(pipe, made.frames, arguments)
        else:
            scores[name] = compare_clips(dense, made.frames, borders)
            if name == "free_running":
                accelerated = made.frames
    assert history is not None
    speedup = _speedup(reports)
    return Comparison(
        dense=to_uint8(dense),
        accelerated=to_uint8(accelerated),
        reports=reports,
        scores={
            name: scores[name]
            for name in ("free_running", "shared_history", "noise_floor", "other_seed")
            if name in scores
        },
        speedup=speedup,
        tokens=history.shape[2] * reports["dense"].cache["tokens_per_frame"],
        settings=_settings(accel, prompt, seed, other_seed, arguments),
        idle=idle,
    )


@dataclass(frozen=True)
class Made:
    """One arm: latents (1, C, L, h, w), frames (F, H, W, 3) float in [0, 1], its report, why a technique was idle."""

    latents: torch.Tensor
    frames: NDArray[np.float32]
    report: Report
    idle: str | None = None


def run_arm(
    pipe: Any,
    name: str,
    accel: Accel,
    seed: int,
    arguments: dict[str, Any],
    history: torch.Tensor | None = None,
    *,
    timing: bool = True,
) -> Made:
    """The generation of that name in `ARMS`, from the noise of `seed`; dense ones take the kernel of `accel` alone.

    `history` are the dense run's latents, for "shared_history" only. Attention is timed unless `timing` is off.
    """
    dense = Accel(kernel=accel.kernel)
    arm = {"noise_floor": Accel(kernel="split"), "free_running": accel, "shared_history": accel}.get(name, dense)
    extra = {"history": history} if name == "shared_history" else {}
    return _generate(pipe, arm, seed, {**arguments, **extra}, timing)


def _generate(pipe: Any, accel: Accel, seed: int, arguments: dict[str, Any], timing: bool = True) -> Made:
    made: Made | None = None
    try:
        with accel(pipe, timing=timing) as run:
            made = generate(pipe, run, seed, arguments)
    except NotEngagedError as error:
        assert made is not None  # raised on the way out, after the generation
        return replace(made, idle=str(error))
    return made


def generate(pipe: Any, run: Run, seed: int, arguments: dict[str, Any]) -> Made:
    """One video of one prompt under `run`, decoded apart from denoising so that each has its own seconds."""
    _check_decodes(pipe)
    generator = torch.Generator().manual_seed(seed)
    latents = pipe(**arguments, generator=generator, output_type="latent").frames
    with run.clock("decode", latents.device):
        frames = decode(pipe, latents)
    if not getattr(pipe, "block_causal", False):  # those of ours say so themselves
        run.produced(len(frames))
    return Made(latents, frames, run.report())


_DECODES = ("AutoencoderKLWan", "AutoencoderKLHunyuanVideo", "AutoencoderKLHunyuanVideo15")


def _check_decodes(pipe: Any) -> None:
    """Refuse a pipeline whose latents `decode` does not know, before anything is computed."""
    name = type(pipe.vae).__name__
    if not getattr(pipe, "block_causal", False) and name not in _DECODES:
        raise UnsupportedError(
            f"a comparison decodes latents apart from denoising, which it knows for {', '.join(_DECODES)}, not for the "
            f"{name} of {type(pipe).__name__}: generate both videos and give their files to `diffaccel eval videos`"
        )


@torch.no_grad()
def decode(pipe: Any, latents: torch.Tensor) -> NDArray[np.float32]:
    """The frames (F, H, W, 3) in [0, 1] of a pipeline's latents (1, C, L, h, w), as its own call decodes them."""
    if getattr(pipe, "block_causal", False):
        return np.asarray(pipe.decode_latents(latents)[0])
    vae = pipe.vae
    device = getattr(pipe, "_execution_device", vae.device)
    latents = latents.to(device, vae.dtype)
    if "latents_mean" in vae.config:  # Wan's, channel by channel
        mean, std = (
            torch.tensor(vae.config[f"latents_{of}"]).view(1, -1, 1, 1, 1).to(latents) for of in ("mean", "std")
        )
        latents = latents / (1.0 / std) + mean
    else:
        latents = latents / vae.config.scaling_factor
    pixels = vae.decode(latents, return_dict=False)[0]
    return np.asarray(pipe.video_processor.postprocess_video(pixels, output_type="np")[0])


def run_briefly(pipe: Any, arms: Sequence[Accel], seed: int, arguments: dict[str, Any]) -> None:
    """Two blocks and two steps of each arm (one step where there are no blocks), so that nothing is timed that happens
    only once: kernels chosen and compiled, memory reserved."""
    causal = bool(getattr(pipe, "block_causal", False))
    short = {**arguments, "num_inference_steps": 2 if causal else 1}
    for name in ("callback_on_step_end", "callback_on_chunk_end", "sigmas", "timesteps"):
        short.pop(name, None)
    if causal and "video" not in arguments:
        frames = 1 + pipe.vae_scale_factor_temporal * (2 * _frames_per_block(pipe, arguments) - 1)
        short["num_frames"] = min(frames, _argument(pipe, arguments, "num_frames"))
    for accel in arms:
        _generate(pipe, accel, seed, short)


def chunk_starts(pipe: Any, frames: NDArray[Any], arguments: dict[str, Any]) -> tuple[int, ...]:
    """First pixel frames of the later chunks of a clip; none where the pipeline makes it at once.

    A given image is a chunk of its own, after which blocks are cut anew.
    """
    if not getattr(pipe, "block_causal", False):
        return ()
    size, factor = _frames_per_block(pipe, arguments), pipe.vae_scale_factor_temporal
    if arguments.get("image") is not None:
        generated = 1 + (len(frames) - 1) // factor - 1
        first = 1 + (generated % size or size)
        return (1, *(1 + factor * (start - 1) for start in range(first, generated + 1, size)))
    return () if arguments.get("video") is not None else chunk_borders(len(frames), size, factor)


def _frames_per_block(pipe: Any, arguments: dict[str, Any]) -> int:
    return int(arguments.get("frames_per_block") or pipe.config.frames_per_block)


def _argument(pipe: Any, arguments: dict[str, Any], name: str) -> Any:
    if name in arguments:
        return arguments[name]
    return inspect.signature(pipe.__call__).parameters[name].default


def _times(reports: dict[str, Report], part: str, arms: Sequence[str]) -> list[float] | None:
    """Seconds of one part in every arm that ran; None unless all of them were measured."""
    seconds = [reports[arm].seconds[part] for arm in arms if arm in reports]
    known = [s for s in seconds if s is not None]
    return known if known and len(known) == len(seconds) else None


def _speedup(reports: dict[str, Report]) -> dict[str, float | None]:
    ratios: dict[str, float | None] = {}
    for key, (_, part) in _PARTS.items():
        dense, fast = _times(reports, part, _DENSE), _times(reports, part, _FAST)
        ratios[key] = mean(dense) / mean(fast) if dense and fast and mean(fast) > 0 else None
    return ratios


def _settings(accel: Accel, prompt: str, seed: int, other_seed: int, arguments: dict[str, Any]) -> dict[str, Any]:
    plain = {name: value for name, value in arguments.items() if isinstance(value, (str, int, float, bool, type(None)))}
    slots = {
        slot: {"method": type(policy).__name__, "knobs": policy.values()} for slot, policy in accel.policies().items()
    }
    return {**plain, "prompt": prompt, "seed": seed, "other_seed": other_seed, "kernel": accel.kernel, "slots": slots}


def _seconds(value: float | None) -> str:
    return "?" if value is None else f"{value:.2f}"


def _decibel(value: float) -> str:
    return "identical" if np.isinf(value) else f"{value:.1f} dB"


def _ratio(value: float, reference: float) -> str:
    return f"{value / reference:.2f}x" if reference else f"{value:.4f}"
