"""Calibration: a few dense videos of a model, and beside each attention call how well a method would have read it.

from diffaccel.calibrate import calibrate

profile = calibrate(pipe, prompts=["a large red circle moves left"], width=128, height=128, num_frames=81)
profile.save("annsa.json")
with Accel(selection=AnnSA(0.3, profile="annsa.json"))(pipe):
    ...
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import ceil
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from . import backbone, kernel
from .accel import Accel
from .errors import KnobError, NotEngagedError, UnsupportedError
from .policy import Selector
from .profile import Model, Profile
from .selection.annsa import AnnSA
from .selection.recall import mass_read

if TYPE_CHECKING:
    from .cache import Entries, Lasting
    from .site import Site

METHODS = ("annsa",)
DENSITIES = (0.1, 0.2, 0.3, 0.5)
PROMPTS = (
    "a large red circle moves left over a teal checkerboard",
    "a small blue ring bounces over navy",
)
"""What the bundled models are calibrated on where nothing is said."""

_CALIBRATED = ("density", "layers", "profile", "sparse_layers")  # knobs that calibration is there to tell of


def calibrate(
    pipe: Any,
    policy: AnnSA | None = None,
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
    """The share of the attention mass that AnnSA reads at several densities, each step, layer and head.

    Every prompt makes one dense video, from the same noise. Wherever AnnSA would choose, it does so on the side at each
    of the densities; the share is averaged over the calls and branches, queries, and videos of a step, layer and head.
    That holds a sorted copy of the past for each density.

    Args:
        policy: AnnSA with the knobs it will run with; density, layers and those of profiles stay at their defaults.
        width, height: pixels. num_frames: pixel frames, enough for a past to choose from (`frames_wanted`).
        densities: shares in (0, 1). A run at another one interpolates.
        on_prompt: called with the number of every prompt, from 0, before its video.
        arguments: what else the pipeline is called with, such as `num_inference_steps`.

    Raises:
        KnobError: a density outside (0, 1), or a knob of `policy` that calibration varies.
        UnsupportedError: the pipeline has two denoisers or cannot take AnnSA.
        NotEngagedError: the first video left a density nothing to choose, with the reason.
    """
    policy = policy or AnnSA()
    check(policy, densities)
    family, denoisers = backbone.find(pipe)
    if len(denoisers) > 1:
        raise UnsupportedError(
            f"a profile is of one denoiser, and {type(pipe).__name__} has {len(denoisers)}: "
            "name the layers that choose (selection.layers) instead"
        )
    recorder = Recorder(tuple(replace(policy, density=density) for density in sorted(set(densities))))
    size = {"width": width, "height": height, "num_frames": num_frames}
    with Accel(selection=recorder)(pipe) as run:
        for number, prompt in enumerate(prompts):
            if on_prompt is not None:
                on_prompt(number)
            generator = torch.Generator().manual_seed(seed)
            pipe(prompt=prompt, **size, **arguments, generator=generator, output_type="latent")
            for idle in recorder.idle():
                raise NotEngagedError(f"nothing could be measured at density {idle.density}: {idle.why_idle(run)}")
        versions = run.report().environment
    model = Model.of(family.geometry(denoisers[0]), denoisers[0])
    steps, recall = recorder.means(model.layers)
    return Profile(
        method="AnnSA",
        model=model,
        shape={"width": width, "height": height, "frames": num_frames, "steps": run.steps},
        prompts=len(prompts),
        knobs={name: value for name, value in policy.values().items() if name not in _CALIBRATED},
        versions=versions,
        axes={"density": tuple(one.density for one in recorder.policies), "step": steps},
        tables={"recall": recall},
    )


def check(policy: AnnSA, densities: Sequence[float]) -> None:
    """Refuse what cannot be calibrated with `KnobError`."""
    if not densities or not all(0 < density < 1 for density in densities):
        raise KnobError(f"densities to measure at are shares in (0, 1), at least one, got {list(densities)}")
    for name in _CALIBRATED:
        if getattr(policy, name) != policy.defaults()[name]:
            raise KnobError(
                f"calibration measures every layer at every density it is given, got {name}={getattr(policy, name)!r}: "
                f"leave selection.{name} out"
            )


def frames_wanted(pipe: Any, policy: AnnSA, usual: int) -> int:
    """Pixel frames to calibrate with: as many as usual, or more, so that three blocks have a past of `min_past`."""
    if not getattr(pipe, "block_causal", False):
        return usual
    latent = pipe.config.frames_per_block * (ceil(policy.min_past) + 3)
    return max(usual, pipe.vae_scale_factor_temporal * (latent - 1) + 1)


def summary(profile: Profile) -> Iterator[str]:
    """Lines of a table: at each density the recall on average, of the best and of the worst layer."""
    yield "density  recall  best layer  worst layer"
    for density, recall in zip(profile.axes["density"], profile.tables["recall"], strict=True):
        layers = recall.mean((0, 2))
        best, worst = (f"{layer} ({layers[layer]:.3f})" for layer in (layers.argmax(), layers.argmin()))
        yield f"{density:<7g}  {layers.mean():.3f}   {best:<10}  {worst}"


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

    def idle(self) -> list[AnnSA]:
        """Those that never chose."""
        met = {density for density, _, _ in self.counts}
        return [policy for policy in self.policies if policy.density not in met]

    def means(self, layers: int) -> tuple[tuple[int, ...], NDArray[np.float64]]:
        """The steps at which the policies chose, and the recall (densities, steps, layers, heads)."""
        steps = sorted({step for _, step, _ in self.counts})
        keys = [(one.density, step, layer) for one in self.policies for step in steps for layer in range(layers)]
        means = torch.stack([self.sums[key] / self.counts[key] for key in keys]).cpu().double().numpy()
        return tuple(steps), means.reshape(len(self.policies), len(steps), layers, -1)
