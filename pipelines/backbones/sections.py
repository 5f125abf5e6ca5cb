"""What families share that generate in sections, each with tokens of what came before in its attention.

History enters a section as tokens, the older the coarser. These pass through all layers beside the noisy ones, so their
keys are others at every step, and there is no finished block whose keys a cache could hold. To keep those of one step,
or attention to them, for the next would be an approximation, and is not done. Every query reads history whole, as it
reads text, and policies choose among the section's own tokens.
"""

from math import prod
from typing import Any, ClassVar

from .common import Family, RootHook


class InSections(Family):
    """A pipeline makes one section after the other, all steps of one at a time."""

    no_blocks: ClassVar[str] = "its history passes through the layers beside each section, with other keys every step"


class SectionHook(RootHook):
    scales: ClassVar[dict[str, int]]  # latents of history, by the argument that holds them: tokens are so much larger
    timesteps: Any = None  # of the scheduler, another tensor for each section

    def _enter(self, given: dict[str, Any]) -> None:
        """What policies know at the end of a section is of other tokens than the next one's."""
        timesteps = getattr(getattr(self.run.pipe, "scheduler", None), "timesteps", None)
        if timesteps is not self.timesteps:
            self.run.flush()
        self.timesteps = timesteps
        super()._enter(given)

    def history(self, given: dict[str, Any]) -> int:
        """Tokens of history; a model pads its latents to whole ones, and leaves out those without `indices_...`."""
        tokens = 0
        for name, scale in self.scales.items():
            latents = given.get(name)
            if latents is not None and given.get(f"indices_{name}") is not None:
                sizes = zip(latents.shape[2:], self.patch, strict=True)
                tokens += prod(-(-size // (scale * side)) for size, side in sizes)
        return tokens
