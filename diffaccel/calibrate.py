"""Calibration: a few dense videos of a model, and beside each attention call what a method would have made of it.

from diffaccel.calibrate import calibrate

profile = calibrate(pipe, prompts=["a large red circle moves left"], width=128, height=128, num_frames=81)
profile.save("annsa.json")
with Accel(selection=AnnSA(0.3, profile="annsa.json"))(pipe):
    ...
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from math import ceil
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from . import backbone, kernel
from .accel import Accel
from .cache.calibrated import Calibrated
from .cache.compress_kv import CompressKV
from .cache.duo_attention import DuoAttention
from .cache.memory import Memory
from .cache.razor_attention import RazorAttention
from .cache.sorting import Looking
from .cache.tri_attention import TriAttention
from .errors import KnobError, NotEngagedError, UnsupportedError
from .gates import GateLearner
from .kernel import Partial, merge
from .overlap import OverlapRecorder
from .policy import Answer, ReusePolicy, Selector
from .profile import Axes, Model, Profile, Tables
from .profiled import Profiled
from .reuse.flashblock import TABLES, FlashBlock
from .selection.annsa import AnnSA
from .selection.borrowed import Borrowing
from .selection.hylra import HyLRA
from .selection.lychee_decode import LycheeDecode
from .selection.recall import mass_read

if TYPE_CHECKING:
    from .cache import Entries, Lasting
    from .run import Run
    from .site import Site

Method = AnnSA | FlashBlock | Calibrated | Borrowing
METHODS: dict[str, type[Method]] = {
    method.__name__.lower(): method
    for method in (AnnSA, FlashBlock, TriAttention, RazorAttention, DuoAttention, CompressKV, HyLRA, LycheeDecode)
}
DENSITIES = (0.1, 0.2, 0.3, 0.5)
PROMPTS = (
    "a large red circle moves left over a teal checkerboard",
    "a small blue ring bounces over navy",
)
"""What the bundled models are calibrated on where nothing is said."""

GAPS = 8
"""Steps that drift is measured over."""

_CALIBRATED = {  # knobs that calibration is there to tell of
    "AnnSA": ("density", "layers", "profile", "sparse_layers"),
    "FlashBlock": ("refresh", "profile", "share", "cos", "lse", "extrapolate", "residual"),
}


def calibrate(
    pipe: Any,
    policy: Method | None = None,
    *,
    prompts: Sequence[str],
    width: int,
    height: int,
    num_frames: int,
    densities: Sequence[float] = DENSITIES,
    seed: int = 0,
    on_prompt: Callable[[int], None] | None = None,
    **arguments: Any,
) -> Profile:
    """What a method would have made of the attention of dense videos, each step, layer and head.

    Every prompt makes one dense video, from the same noise. Figures are averaged over the calls and branches, queries,
    and videos of a step, layer and head. For AnnSA: the share of the attention mass that it reads at several densities,
    wherever it would choose; that holds a sorted copy of the past for each density. For FlashBlock: how far attention
    to the outside moved since each of the last `GAPS` steps, as the mean cosine of outputs, the mean distance of
    log-sum-exps, and the error of the whole output if it were reused, root mean square, over the layer's own. For
    caches: what they say of themselves, over probes of the clean passes; for DuoAttention gates are learned instead.
    For HyLRA and LycheeDecode: how alike the choices of layers and steps are.

    Args:
        policy: the method with the knobs it will run with; those that the profile is to tell stay at their defaults.
        width, height: pixels. num_frames: pixel frames, enough for a past to act on (`frames_wanted`).
        densities: of AnnSA, shares in (0, 1). A run at another one interpolates.
        on_prompt: called with the number of every prompt, from 0, before its video.
        arguments: what else the pipeline is called with, such as `num_inference_steps`.

    Raises:
        KnobError: a density outside (0, 1), or a knob of `policy` that calibration varies.
        UnsupportedError: the pipeline has two denoisers or cannot take the method.
        NotEngagedError: the first video gave nothing to measure, with the reason.
    """
    policy = policy or AnnSA()
    check(policy, densities)
    family, denoisers = backbone.find(pipe)
    if len(denoisers) > 1:
        raise UnsupportedError(
            f"a profile is of one denoiser, and {type(pipe).__name__} has {len(denoisers)}: "
            "name the layers (selection.layers) or steps (reuse.refresh) instead"
        )
    recorder: Recorder | DriftRecorder | LookRecorder | GateLearner | OverlapRecorder
    if isinstance(policy, DuoAttention):
        recorder = GateLearner(policy=policy)
    elif isinstance(policy, Calibrated):
        recorder = LookRecorder(policy=policy, probes=policy.probes)
    elif isinstance(policy, Borrowing):
        recorder = OverlapRecorder(policy)
    elif isinstance(policy, AnnSA):
        recorder = Recorder(tuple(replace(policy, density=density) for density in sorted(set(densities))))
    else:
        recorder = DriftRecorder(policy)
    size = {"width": width, "height": height, "num_frames": num_frames}
    with Accel(**{policy.slot: recorder})(pipe) as run:  # type: ignore[arg-type]
        for number, prompt in enumerate(prompts):
            if on_prompt is not None:
                on_prompt(number)
            generator = torch.Generator().manual_seed(seed)
            learner = recorder if isinstance(recorder, GateLearner) else None
            with learner.listening(denoisers[0]) if learner else nullcontext():
                pipe(prompt=prompt, **size, **arguments, generator=generator, output_type="latent")
            reason = recorder.idle(run)
            if reason:
                raise NotEngagedError(f"nothing could be measured{reason}")
        versions = run.report().environment
    model, method = Model.of(family.geometry(denoisers[0]), denoisers[0]), type(policy).__name__
    axes, tables = recorder.means(model.layers)
    return Profile(
        method=method,
        model=model,
        shape={"width": width, "height": height, "frames": num_frames, "steps": run.steps},
        prompts=len(prompts),
        knobs={name: value for name, value in policy.values().items() if name not in _varied(policy)},
        versions=versions,
        axes=axes,
        tables=tables,
    )


def _varied(policy: Method) -> tuple[str, ...]:
    return ("profile",) if isinstance(policy, Profiled) else _CALIBRATED[type(policy).__name__]


def check(policy: Method, densities: Sequence[float]) -> None:
    """Refuse what cannot be calibrated with `KnobError`."""
    if not densities or not all(0 < density < 1 for density in densities):
        raise KnobError(f"densities to measure at are shares in (0, 1), at least one, got {list(densities)}")
    for name in _varied(policy):
        if getattr(policy, name) != policy.defaults()[name]:
            raise KnobError(
                f"calibration measures every layer, step and head, got {name}={getattr(policy, name)!r}: "
                f"leave {policy.slot}.{name} out"
            )


def frames_wanted(pipe: Any, policy: Method, usual: int) -> int:
    """Pixel frames to calibrate with: as many as usual, or more, so that three blocks have a past of `min_past`, or one
    longer than what a cache always keeps."""
    if not getattr(pipe, "block_causal", False):
        return usual
    kept = policy.sink_frames + policy.recent_frames if isinstance(policy, Calibrated) else 0
    latent = pipe.config.frames_per_block * (3 + ceil(getattr(policy, "min_past", 1))) + kept
    return max(usual, pipe.vae_scale_factor_temporal * (latent - 1) + 1)


def summary(profile: Profile) -> Iterator[str]:
    """Lines of a table: recall at each density, drift since each number of steps (means, best and worst), or what a
    cache says of its own."""
    method = METHODS[profile.method.lower()]
    if issubclass(method, Profiled):
        yield from method().lines(profile)
        return
    if profile.method == "AnnSA":
        yield "density  recall  best layer  worst layer"
        for density, recall in zip(profile.axes["density"], profile.tables["recall"], strict=True):
            layers = recall.mean((0, 2))
            best, worst = (f"{layer} ({layers[layer]:.3f})" for layer in (layers.argmax(), layers.argmin()))
            yield f"{density:<7g}  {layers.mean():.3f}   {best:<10}  {worst}"
        return
    yield "steps since  cosine  lowest of a head  log-sum-exp moved  furthest of a head  error if reused"
    for number, gap in enumerate(profile.axes["gap"]):
        later = [at for at, step in enumerate(profile.axes["step"]) if step >= gap]
        cos, lse, error = (profile.tables[name][later, number] for name in ("cos", "lse", "error"))
        moved = f"{lse.mean():<17.4f}  {lse.mean(0).max():<18.4f}"
        yield f"{gap:<11g}  {cos.mean():.4f}  {cos.mean(0).min():<16.4f}  {moved}  {error.mean():.4f}"


@dataclass(frozen=True, eq=False)
class Recorder(Selector):
    """Reads everything, and measures what each of `policies` would have read of it.

    The past is read apart wherever they would choose, which is equal up to rounding. Sums stay on the device until the
    end.
    """

    slot: ClassVar[str] = "selection"
    paper: ClassVar[str] = AnnSA.paper
    summary: ClassVar[str] = "reads everything and measures what AnnSA would have read"
    exact: ClassVar[dict[str, Any]] = {"policies": ()}
    is_exact = True  # whatever the policies

    policies: tuple[AnnSA, ...]
    sums: dict[tuple[float, int, int], Tensor] = field(default_factory=dict)  # (density, step, layer): (H,)
    counts: Counter[tuple[float, int, int]] = field(default_factory=Counter)

    def apart(self, site: "Site") -> bool:
        return self.policies[0].apart(site)

    def see_prompt(self, q: Tensor, prompt: "Entries", site: "Site", lasting: "Lasting") -> None:
        self.policies[0].see_prompt(q, prompt, site, lasting)  # the same for every density

    def plan(self, q: Tensor, entries: "Entries", site: "Site") -> None:
        auto = kernel.resolve("auto", q.device, q.dtype, q.shape[-1])
        for policy in self.policies:
            chosen = policy.plan(q, entries, site)
            if chosen is not None:
                recall = mass_read(auto, q, entries, chosen, q.shape[-1] ** -0.5).mean((0, 1))
                key = (policy.density, site.step, site.layer)
                self.sums[key] = self.sums[key] + recall if key in self.sums else recall
                self.counts[key] += 1

    def idle(self, run: "Run") -> str | None:
        """At which density nothing was ever chosen, and why, or None."""
        met = {density for density, _, _ in self.counts}
        idle = [policy for policy in self.policies if policy.density not in met]
        return f" at density {idle[0].density}: {idle[0].why_idle(run)}" if idle else None

    def means(self, layers: int) -> tuple[Axes, Tables]:
        """The recall (densities, steps, layers, heads) at the steps at which the policies chose."""
        steps = sorted({step for _, step, _ in self.counts})
        keys = [(one.density, step, layer) for one in self.policies for step in steps for layer in range(layers)]
        means = torch.stack([self.sums[key] / self.counts[key] for key in keys]).cpu().double().numpy()
        axes = {"density": tuple(one.density for one in self.policies), "step": tuple(steps)}
        return axes, {"recall": means.reshape(len(self.policies), len(steps), layers, -1)}


@dataclass(frozen=True, eq=False)
class LookRecorder(Looking):
    """Keeps everything, and measures at every finished block what `policy` goes by."""

    paper: ClassVar[str] = "none"
    summary: ClassVar[str] = "keeps everything and measures what a cache goes by"
    is_exact = True

    sink_frames: int = 0  # of all that is kept, none is chosen
    probes: int = 32
    policy: Calibrated = field(default_factory=TriAttention)
    sums: dict[tuple[str, int], Tensor] = field(default_factory=dict)  # (table, layer): (*axes, H)
    counts: Counter[tuple[str, int]] = field(default_factory=Counter)

    def expected_tokens(self, video_tokens: int, block: object) -> int:
        return video_tokens

    def commit(self, memories: Sequence[Memory], site: "Site", run: "Run") -> None:
        run.fired("cache")
        for layer, memory in enumerate(memories):
            for name, found in self.policy.measure(self.look(layer, memory, site, run, {})).items():
                self.sums[name, layer] = self.sums[name, layer] + found if (name, layer) in self.sums else found
                self.counts[name, layer] += 1

    def idle(self, run: "Run") -> str | None:
        return None if self.counts else ": no block had frames between the first and the newest: generate more frames"

    def means(self, layers: int) -> tuple[Axes, Tables]:
        """The tables (*axes, layers, heads)."""
        tables = {
            name: torch.stack([self.sums[name, layer] / self.counts[name, layer] for layer in range(layers)], -2)
            for name in self.policy.tables
        }
        first = next(iter(tables.values()))
        axes = {name: tuple(map(float, range(size))) for name, size in zip(self.policy.axes, first.shape, strict=False)}
        return axes, {name: table.cpu().double().numpy() for name, table in tables.items()}


@dataclass(frozen=True, eq=False)
class DriftRecorder(ReusePolicy):
    """Computes everything, and measures how far the outside moved since earlier steps of the block."""

    paper: ClassVar[str] = FlashBlock.paper
    summary: ClassVar[str] = "computes everything and measures what FlashBlock would have reused"
    exact: ClassVar[dict[str, Any]] = {"policy": None}
    is_exact = True

    policy: FlashBlock
    earlier: dict[tuple[str, int], list[tuple[int, int, Partial]]] = field(default_factory=dict)  # block, step
    sums: dict[tuple[int, int, int], Tensor] = field(default_factory=dict)  # (step, gap, layer): (3, H)
    counts: Counter[tuple[int, int, int]] = field(default_factory=Counter)

    def answer(self, site: "Site") -> Answer:
        return "together" if site.start < self.policy.min_past * site.grid.frames else "store"

    def saw(self, site: "Site", outside: Partial, inside: Partial) -> None:
        known = self.earlier.setdefault((site.branch, site.layer), [])
        known[:] = [one for one in known if one[0] == site.block and site.step - GAPS <= one[1] < site.step]
        exact = merge([outside, inside]).out.float()
        square = exact.square().sum(-1).mean()
        for _, step, partial in known:
            cos = torch.cosine_similarity(partial.out.float(), outside.out.float(), dim=-1).mean((0, 1))
            moved = (partial.lse - outside.lse).abs().mean((0, 1))
            error = (merge([partial, inside]).out.float() - exact).square().sum(-1).mean((0, 1)) / square
            key = (site.step, site.step - step, site.layer)
            found = torch.stack([cos, moved, error.sqrt()])
            self.sums[key] = self.sums[key] + found if key in self.sums else found
            self.counts[key] += 1
        known.append((site.block, site.step, outside))

    def idle(self, run: "Run") -> str | None:
        return None if self.counts else f": {self.policy.why_idle(run)}"

    def means(self, layers: int) -> tuple[Axes, Tables]:
        """Cosine, distance and error by (steps, gaps, layers, heads); where a block had no step so much earlier, those
        of its first."""
        steps, gaps = sorted({step for step, _, _ in self.counts}), sorted({gap for _, gap, _ in self.counts})
        keys = [
            (step, min(gap, step), layer) for step in steps for gap in gaps for layer in range(layers)
        ]  # step 0 of every block was seen
        means = torch.stack([self.sums[key] / self.counts[key] for key in keys]).cpu().double().numpy()
        means = means.reshape(len(steps), len(gaps), layers, 3, -1)
        axes: Axes = {"step": tuple(steps), "gap": tuple(gaps)}
        return axes, {name: means[:, :, :, number] for number, name in enumerate(TABLES)}
