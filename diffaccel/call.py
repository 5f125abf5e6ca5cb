"""One attention call: what is read of a tier by what kernel, and what was read of it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .cache import Entries, Reader
from .kernel import Partial
from .kernel.boxes import Boxes, Dilated, over_boxes
from .kernel.weighted import in_one, over_entries
from .plan import Plan
from .reuse.history import index
from .selection.blocks import Chosen, over_blocks, path
from .site import Site

if TYPE_CHECKING:
    from .run import Run


@dataclass
class Call:
    """Selects, reads and counts. Key counts are per query, averaged over rows and heads."""

    run: "Run"
    site: Site
    lanes: int  # batch rows x heads
    keys_read: Any = 0  # a number, or a 0-d tensor where a plan lives on the GPU
    chose: bool = False  # whether a selector left anything out
    stored: bool = False  # whether all of the outside was computed and kept
    engaged: dict[str, float] = field(default_factory=dict)  # slots that changed the call, reuse by its share of heads

    def read(self, q: Tensor, entries: Entries) -> Partial:
        """Attention of `q` over what the window and the selection leave of `entries`."""
        kernel, scale = self.run.kernel_for(q, entries.count), q.shape[-1] ** -0.5
        if self.site.part == "self":
            for selector in self.run._selectors:
                scale *= selector.scale(self.site)
        plan: Plan | None = None
        for selector in self.run._selectors if entries.frames is not None else ():  # the prompt has none
            found = selector.plan(q, entries, self.site)
            if found is None:
                continue
            self.run.fired(selector.slot)
            self.chose, self.engaged[selector.slot] = True, 1
            if isinstance(found, Boxes | Dilated):
                self._count(q, found.keys_read)
                return over_boxes(kernel, q, entries, scale, found)
            if isinstance(found, Chosen):
                self._count(q, found.keys_read)
                self.run._chosen_bytes[self.site.branch] += found.bytes
                asked = self.run.accel.kernel != "auto"
                self.run._paths["chosen blocks"].add(path(kernel, asked, q, found))
                return over_blocks(kernel, asked, q, found, scale)
            plan = found if plan is None else plan & found
        self._count(q, entries.count if plan is None else plan.pairs / q.shape[1])
        return self._over(kernel, q, entries, scale, plan)

    def of_heads(self, heads: Sequence[int]) -> Reader:
        """`read` for some heads (B, S, heads, D) of all."""

        def read(q: Tensor, entries: Entries) -> Partial:
            at = index(heads, q.device)
            return self.read(q[:, :, at], entries.of_heads(at))

        return read

    def read_whole(self, q: Tensor, entries: Entries) -> Partial:
        """Attention of `q` over all of `entries`."""
        self._count(q, entries.count)
        return self.read_all(q, entries)

    def read_all(self, q: Tensor, entries: Entries) -> Partial:
        """As `read_whole`, not counted: for queries of text beside those of the video."""
        return self._over(self.run.kernel_for(q, entries.count), q, entries, q.shape[-1] ** -0.5, None)

    def _over(self, kernel: ModuleType, q: Tensor, entries: Entries, scale: float, plan: Plan | None) -> Partial:
        asked = self.run.accel.kernel != "auto"
        if plan is None and not asked and in_one(q, entries, scale):
            self.run._paths["merged entries"].add("fa3 in one launch")
        return over_entries(kernel, q, entries, scale, plan, asked)

    def _count(self, q: Tensor, keys: Any) -> None:
        self.keys_read += keys * q.shape[0] * q.shape[2] / self.lanes
