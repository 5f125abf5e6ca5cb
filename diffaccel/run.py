"""All state of one accelerated pipeline: where the generation is, what it remembers, what it counted."""

import resource
import sys
import time
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from . import kernel
from .cache import Entries, Extent, Fixed, KVCache, Lasting, Memory, Reader, Tier
from .call import Call
from .errors import NotEngagedError
from .grid import Grid
from .joint import Text
from .kernel import Partial, merge
from .kernel.choose import Choice, Size, size_of
from .observe import Observer
from .policy import Answer, CachePolicy
from .replay import Counted
from .report import LayerReport, Report, SlotReport, environment
from .reuse.history import History, without
from .site import FIELD, Part, Phase, Site
from .spread import Spread

if TYPE_CHECKING:
    from .accel import Accel

MOST_BLOCKS = 4096
"""Lines of `Report.blocks`."""

WORTH_KEEPING = 16
"""Tokens of a forward over those of its prompt, up to which projections of the prompt are kept."""

_Section = str | tuple[int, Part]  # of time: a part of a generation, or the attention of one layer
_NOWHERE = Site(0, "self", 0, 1, 0, 0, "denoise", "main", Grid(1, 1, 1))


class Run:
    """What `with accel(pipe) as run` gives: the state, the counters and the report of that pipeline's generations.

    Two runs share nothing. A pipeline that generates block by block tells the run where it is (`begin`, `at`); for
    the others the backbone's hook works it out. `timing=True` also measures attention on a GPU, with one pair of
    events a call; `observe=True` the recall of attention mass of a cache (`Observer`).
    """

    def __init__(self, accel: "Accel", *, causal: bool, timing: bool = False, observe: bool = False) -> None:
        self.accel, self.causal, self.timing, self.observe = accel, causal, timing, observe
        self.observer: Observer | None = None
        self.cache: CachePolicy = accel.cache or KVCache()
        self._policies = accel.policies()
        self.slots = {
            slot: SlotReport(type(policy).__name__, policy.values(), engaged=False)
            for slot, policy in self._policies.items()
        }
        self.extent: Extent | None = None
        self.spread: Spread | None = None  # where several devices share the model
        self.rotary: tuple[Tensor, Tensor] | None = None  # tables (1, S, 1, D) of the forward that runs now
        self.later: Callable[[Tensor, int], Tensor] | None = None  # rotated keys (B, N, H, D), some frames later
        self.prompt_multiplicity: tuple[tuple[int, int], ...] | None = None
        self.pipe: Any = None  # while it is accelerated; its scheduler counts the steps if nobody else does
        self.blocks = self.steps = 0
        self.longest_past = 0.0  # latent frames before a block over those of the block, of all blocks so far
        self._selectors = [policy for policy in (accel.window, accel.selection) if policy is not None]
        self._where, self._told = _NOWHERE, False
        self._sites: dict[tuple[int, Part], Site] = {}
        self._video_frames = 0
        self._memories: dict[tuple[str, int], Memory] = {}
        self._lasting: defaultdict[tuple[str, int], Lasting] = defaultdict(Lasting)
        self._histories: defaultdict[tuple[str, int], History] = defaultdict(History)
        self._scratch: defaultdict[tuple[str, str], dict[str, Any]] = defaultdict(dict)
        self._prompt: int | None = None  # number of the prompt that this forward sees, if it can be told from others
        self._prompts: dict[str, tuple[weakref.ref[Tensor], int, int]] = {}
        self._prompt_count = 0
        self._projected: dict[tuple[str, int], Projected] = {}
        self.keeps_prompt = True  # whether what is projected of a prompt may be kept from forward to forward
        self._texts: dict[str, tuple[weakref.ref[Tensor], int, Tensor, Any]] = {}
        self._kernels: dict[tuple[torch.device, Size], Choice] = {}
        self._paths: defaultdict[str, set[str]] = defaultdict(set)  # what read other things than all keys of a tensor
        self._seconds: defaultdict[_Section, float] = defaultdict(float)
        self._layers: dict[tuple[int, Part], LayerReport] = {}
        self._chosen_bytes: defaultdict[str, int] = defaultdict(int)  # of the last forward of each branch
        self._events: list[tuple[_Section, torch.cuda.Event, torch.cuda.Event]] = []
        self._began: float | None = None
        self._before = self._elapsed = 0.0
        self._frames = self._max_tokens = self._tokens_per_frame = 0
        self._blocks: list[dict[str, Any]] = []
        self._cache_summary: dict[str, Any] = {}
        self._idle: dict[str, str] = {}
        self._device: torch.device | None = None
        self._dtype: torch.dtype | None = None
        self._looking, self._apart = False, ""
        self.tables: tuple[Tensor, Tensor] | None = None  # rotary tables that stand for the module's own
        self.still = False  # whether what is stored stays where it is, for graphs that were captured
        self.replayed = 0  # forwards that a captured graph stood for
        self.recording = False  # whether the forward that runs is one that a graph will stand for
        self._counted: list[Counted] | None = None

    # -- told by a pipeline that generates block by block ---------------------------------------------------------

    def begin(self, frames: int, extent: Extent | None = None) -> None:
        """A generation of `frames` latent frames starts: everything remembered of the last one is dropped.

        Raises `KnobError` where the cache's knobs do not fit its `extent`.
        """
        if extent is not None:
            self.cache.check(extent)
        self.extent = extent
        self.observer = Observer(extent.layers) if self.observe and extent is not None else None
        self._blocks.clear()
        self.forget()
        self._cache_summary = {}
        self._video_frames = frames
        self._before, self._elapsed, self._began = self._before + self._elapsed, 0.0, time.perf_counter()
        if torch.cuda.is_initialized():  # a fresh run does not know its device yet, and an older peak is not its own
            for device in range(torch.cuda.device_count()):
                torch.cuda.reset_peak_memory_stats(device)

    @contextmanager
    def at(
        self,
        *,
        block: int,
        start: int,
        step: int,
        steps: int,
        phase: Phase = "denoise",
        branch: str = "cond",
        noise: float | None = None,
    ) -> Iterator[None]:
        """The forward inside runs `block`, whose first latent frame is `start`, at `step` of `steps`.

        `noise` is its noise level in [0, 1], if it is not one less the share of the steps that are done.
        """
        noise = 1 - step / steps if noise is None else noise
        self._where = replace(
            self._where, block=block, start=start, step=step, steps=steps, phase=phase, branch=branch, noise=noise
        )
        self._told = True
        self.blocks, self.steps = max(self.blocks, block + 1), max(self.steps, steps)
        try:
            yield
        finally:
            self._told = False

    @contextmanager
    def clock(self, section: str, device: torch.device) -> Iterator[None]:
        """Add the time of what is done inside to `seconds[section]` of the report.

        On a GPU that of what the current stream is given, which nobody waits for before the report.
        """
        if device.type == "cuda":
            with self._between_events(section, device):
                yield
        else:
            began = time.perf_counter()
            yield
            self._seconds[section] += time.perf_counter() - began
        self._tick()

    def produced(self, frames: int, wait: bool = False) -> None:
        """`frames` pixel frames came out; `wait` for a GPU that may still be at it, once a generation."""
        self._frames += frames
        self._read_events(wait)
        self._tick()

    # -- called by a backbone ------------------------------------------------------------------------------------

    def enter(
        self, grid: Grid, branch: str | None, step: int | None, steps: int | None, text: Text | None = None
    ) -> None:
        """A forward of the denoiser starts on `grid`, with `text` in its attention or without.

        The rest matters only where no pipeline told (`at`); a step that is not known is the scheduler's.
        """
        if self._began is None:
            self._began = time.perf_counter()
        looking = self._looking
        branch = f"{branch or 'main'}{self._apart}"
        if self._told:
            self._where = replace(self._where, grid=grid, text=text, full_field=looking)
            self.longest_past = max(self.longest_past, self._where.start / grid.frames)
        else:
            if step is None or steps is None:
                step, steps = _progress(getattr(self.pipe, "scheduler", None))
            where = replace(_NOWHERE, grid=grid, text=text, full_field=looking)
            self._where = replace(where, branch=branch, step=step, steps=steps)
            self.steps, self.blocks = max(self.steps, steps), max(self.blocks, 1)
        self._sites.clear()
        self._chosen_bytes[self._where.branch] = 0
        self._tokens_per_frame = grid.tokens_per_frame

    def looks_first(self) -> bool:
        """Whether the forward that was entered waits for one over the whole field; asked once a forward."""
        reuse = self.accel.reuse
        return not self._looking and reuse is not None and reuse.looks_first(self._where, self)

    @contextmanager
    def full_field(self) -> Iterator[Grid]:
        """The forward inside reads the whole field; gives its grid. On a smaller one it is a branch of its own."""
        assert self.accel.reuse is not None
        before, grid = self._where, self.accel.reuse.field(self._where.grid)
        self._looking, self._apart = True, FIELD if grid != before.grid else ""
        self._where = replace(before, branch=before.branch + self._apart)
        try:
            yield grid
        finally:
            self._looking, self._apart, self._where = False, "", before

    def forward(self, latents: Tensor, compute: Callable[[], Any]) -> Any:
        """The output of the forward that was entered: computed, or kept of an earlier one."""
        reuse = self.accel.reuse
        return compute() if reuse is None else reuse.forward(latents, self._where, self, compute)

    def skip(self) -> None:
        """Count the forward that was entered as one that is not made: its self-attention reads nothing."""
        for layer, part in [*self._layers]:
            if part == "self":
                site = self.site(layer, part)
                self.close(Call(self, site, 1, engaged={"reuse": 1}), keys=site.grid.tokens)

    @property
    def versions(self) -> int:
        """Another number whenever anything that is kept of earlier blocks changed."""
        return sum(memory.version for memory in self._memories.values())

    @property
    def prompt_number(self) -> int | None:
        """Of the prompt that the forward sees; None if it cannot be told from others."""
        return self._prompt

    def leave(self) -> None:
        """The forward ended: a finished block is committed, outside of compiled code and all layers at once."""
        if self.recording:
            return
        self._tick()
        self._note_bytes("selection", sum(self._chosen_bytes.values()))
        if self.accel.reuse is not None:
            stored = sum(history.bytes for history in self._histories.values())
            self._note_bytes("reuse", stored + self.accel.reuse.bytes_held(self))
        if not (self.causal and self._told and self._where.phase == "clean"):
            return
        branch = self._where.branch
        memories = [memory for (name, _), memory in sorted(self._memories.items()) if name == branch]
        for memory in memories:
            memory.finish_block(self._where.grid.tokens)
        self.cache.commit(memories, self._where, self)
        self._max_tokens = max([self._max_tokens, *(memory.count for memory in memories)])
        size = sum(memory.bytes for memory in self._memories.values())
        self._note_bytes("cache", size)
        if not self._looking:
            self._note_block(memories, size)

    def prepare_prompt(self, text_BND: Tensor) -> Tensor:
        """The prompt embeddings this forward should see; works once for each tensor and branch, not once a step."""
        policy, branch = self.accel.prompt, self._where.branch
        self.prompt_multiplicity, self._prompt = None, self._number(text_BND, branch)
        if policy is None:
            return text_BND
        known = self._texts.get(branch)
        if known is None or known[0]() is not text_BND or known[1] != text_BND._version:
            known = (weakref.ref(text_BND), text_BND._version, *policy.prepare(text_BND))
            self._texts[branch] = known
        self.prompt_multiplicity = known[3]
        self.fired("prompt", policy.engaged_by_preparing and known[3] is not None)
        return known[2]

    def _number(self, text: Tensor, branch: str) -> int | None:
        """The same for forwards of a branch that see this tensor as it is; None where a change could not be told."""
        if text.is_inference():
            return None
        known = self._prompts.get(branch)
        if known is None or known[0]() is not text or known[1] != text._version:
            self._prompt_count += 1
            known = self._prompts[branch] = (weakref.ref(text), text._version, self._prompt_count)
        return known[2]

    def projected(
        self, layer: int, text: Tensor, weights: Sequence[Tensor], project: Callable[[], tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        """Keys and values of the prompt, kept from forward to forward where projecting them anew counts.

        That is for short videos and blocks: beside many tokens the memory is worth more than the time. A prompt or a
        weight that is written over is seen, but not what is written to a weight's `.data` while a generation runs.
        peft does that, so nothing is kept where it was (`keeps_prompt`).
        """
        worth = self.keeps_prompt and self._where.grid.tokens <= WORTH_KEEPING * text.shape[1]
        if self._prompt is None or not worth or any(weight.is_inference() for weight in weights):
            return project()
        key = (self._where.branch, layer)
        known = self._projected.get(key)
        if known is None or not known.holds(self._prompt, weights):
            known = self._projected[key] = Projected(
                self._prompt, tuple(weights), tuple(weight._version for weight in weights), *project()
            )
        return known.k, known.v

    def place_for(self, k: Tensor, site: Site) -> tuple[Tensor, Tensor] | None:
        """Where keys like these and their values will stay, if a cache keeps them token for token."""
        if not self.causal or site.part != "self" or site.text is not None:
            return None
        return self.memory(site).exact.room(k)

    def site(self, layer: int, part: Part) -> Site:
        """The site of one attention call of the forward that runs now."""
        key = (layer, part)
        if key not in self._sites:
            self._sites[key] = replace(self._where, layer=layer, part=part)
        return self._sites[key]

    @property
    def start(self) -> int:
        """Latent frame index of the first token of the forward that runs now, for rotary positions."""
        return self._where.start if self._told else 0

    @contextmanager
    def timed(self, device: torch.device, layer: int, part: Part) -> Iterator[None]:
        """Add the time inside to attention of that layer, where it is measured."""
        if device.type == "cpu":
            began = time.perf_counter()
            yield
            self._seconds[layer, part] += time.perf_counter() - began
        elif self.timing:
            with self._between_events((layer, part), device):
                yield
        else:
            yield

    # -- called by attend ----------------------------------------------------------------------------------------

    def open(self, site: Site, q_BSHD: Tensor) -> Call:
        return Call(self, site, q_BSHD.shape[0] * q_BSHD.shape[2])

    def kernel_for(self, q: Tensor, keys: int) -> ModuleType:
        key = (q.device, size_of(q, keys))
        if key not in self._kernels:
            self._kernels[key] = kernel.pick(self.accel.kernel, q.device, q.dtype, q.shape[-1], key[1])
            self._device, self._dtype = q.device, q.dtype
        return kernel.KERNELS[self._kernels[key].kernel]

    def prompt(self, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tier:
        """What one cross-attention reads of the prompt."""
        prompt, policy = Entries(k, v, multiplicity=self.prompt_multiplicity), self.accel.prompt
        for selector in self._selectors:
            selector.see_prompt(q, prompt, site, self._lasting_of(site))
        return Fixed(prompt) if policy is None else policy.near(q, prompt, site, self)

    def crossed(self, site: Site, compute: Callable[[], Tensor]) -> Tensor:
        """Attention to the prompt, computed or kept."""
        return compute() if self.accel.reuse is None else self.accel.reuse.cross(site, self, compute)

    def whole(self, k: Tensor, v: Tensor, site: Site) -> Fixed:
        """The keys of a video that is made at once; from step to step they are others."""
        lasting = self._lasting_of(site)
        lasting.version += 1
        lasting.shared = self.scratch("selection", site.branch)
        return Fixed(Entries(k, v, site.grid.frame_of_token(site.start), lasting=lasting))

    def _lasting_of(self, site: Site) -> Lasting:
        return self.memory(site).exact.lasting if self.causal else self._lasting[site.branch, site.layer]

    def memory(self, site: Site) -> Memory:
        key = (site.branch, site.layer)
        if key not in self._memories:
            frames = site.grid.frames if self.extent is None else self.extent.block.frames  # the first may be short
            block = replace(site.grid, frames=frames)
            tokens = self.cache.expected_tokens(self._video_frames * site.grid.tokens_per_frame, block)
            self._memories[key] = Memory(tokens, self.cache.sample if self.cache.needs_queries else None, self.observer)
            self._memories[key].exact.lasting.shared = self.scratch("selection", site.branch)
        return self._memories[key]

    def reuse_answer(self, site: Site, memory: Memory) -> "Answer | Literal['apart']":
        if not memory.count:
            return "together"
        answer: Answer = "together" if self.accel.reuse is None else self.accel.reuse.answer(site)
        if answer != "together" or not self._selects(site):
            return answer
        return "store" if self.accel.reuse is not None and self.accel.reuse.residual else "apart"

    def outside(
        self,
        answer: "Answer | Literal['apart']",
        site: Site,
        memory: Memory,
        call: Call,
        past: Callable[[Reader], Partial],
    ) -> Partial:
        """Attention to everything outside the block, computed by `past`, reused, or partly each."""
        reuse = self.accel.reuse
        if reuse is None or answer == "apart":
            return past(call.read)
        history, twice = self._histories[site.branch, site.layer], reuse.extrapolate > 0
        if reuse.residual and self._selects(site):
            return self._beside_selected(answer, site, memory, call, past)
        key = (site.block, memory.version, "all")
        heads = () if answer == "reuse" else answer if isinstance(answer, tuple) else None
        if heads is None or not history.holds(key):
            outside = past(call.read)
            history.replace(key, outside, site.noise, twice, self.still)
            call.stored = True
            return outside
        if heads:
            history.update(heads, past(call.of_heads(heads)), site.noise, twice)
        call.engaged["reuse"] = 1 - len(heads) / len(history.noise)
        return history.recall(site.noise, reuse.extrapolate)

    def saw(self, site: Site, outside: Partial, inside: Partial) -> None:
        if self.accel.reuse is not None:
            self.accel.reuse.saw(site, outside, inside)

    def _beside_selected(
        self, answer: Any, site: Site, memory: Memory, call: Call, past: Callable[[Reader], Partial]
    ) -> Partial:
        """What is selected is computed, the rest of the outside reused."""
        reuse, history = self.accel.reuse, self._histories[site.branch, site.layer]
        assert reuse is not None
        selected, key = past(call.read), (site.block, memory.version, "rest")
        if not call.chose:  # a past too short to choose from was read whole
            return selected
        if answer == "reuse" and history.holds(key):
            call.engaged["reuse"] = 1
            return merge([selected, history.recall(site.noise, reuse.extrapolate)])
        whole = past(call.read_whole)
        history.replace(key, without(whole, selected), site.noise, reuse.extrapolate > 0)
        return whole

    def _selects(self, site: Site) -> bool:
        return any(selector.apart(site) for selector in self._selectors)

    def close(self, call: Call, keys: int) -> None:
        """Count a finished call, which brought `keys` keys of its own, for its layer and every slot that had a say."""
        site, engaged = call.site, call.engaged
        if self._counted is not None:
            self._counted.append(
                Counted(site.layer, site.part, call.keys_read, keys, engaged.get("reuse") == 1, call.stored)
            )
        if "reuse" in engaged:
            self.slots["reuse"].skipped += engaged["reuse"]
            self.fired("reuse")
        total: Any = keys if site.text is None else keys - site.text.padding
        kept = total
        if site.part == "cross":
            total = kept = sum(count * tokens for count, tokens in self.prompt_multiplicity or ((keys, 1),))
            if call.keys_read < total:
                engaged["prompt" if call.keys_read else "reuse"] = 1  # what was kept of it is answered without reading
        elif self.causal:
            memory = self.memory(site)
            if memory.count < memory.seen or any(tier.count for tier in memory.older):
                engaged["cache"] = 1
            total, kept = total + memory.seen, kept + memory.count
        key = site.layer, site.part
        layer = self._layers.get(key) or self._layers.setdefault(key, LayerReport(*key, dict.fromkeys(self.slots, 0)))
        layer.add(engaged, total, kept, call.keys_read)
        for slot, policy in self._policies.items():
            if (slot == "prompt") != (site.part == "cross"):
                continue
            counts = self.slots[slot]
            counts.calls += 1
            counts.keys_total += total
            counts.keys_read += call.keys_read
            counts.keys_kept += kept if slot == "cache" else call.keys_read
            counts.engaged |= policy.is_exact and bool(policy.exact)

    def fired(self, slot: str, times: int = 1) -> None:
        """A technique changed what is computed; a lossy setting that never does is an error at the end."""
        if slot in self.slots and times:
            self.slots[slot].engaged = True

    def scratch(self, slot: str, branch: str) -> dict[str, Any]:
        """Values a policy keeps over a generation, for one branch."""
        return self._scratch[slot, branch]

    def all_scratch(self, slot: str) -> list[dict[str, Any]]:
        return [values for (name, _), values in self._scratch.items() if name == slot]

    # -- the end -------------------------------------------------------------------------------------------------

    def all_memories(self) -> list[Memory]:
        return list(self._memories.values())

    def speed(self) -> tuple[int, float | None, int]:
        """Pixel frames so far, frames a second, and peak memory in bytes, without waiting for the device."""
        total = self._before + self._elapsed
        return self._frames, self._frames / total if self._frames and total else None, _peak_memory(self._device)

    def held(self) -> tuple[int, int] | None:
        """Tokens a layer keeps on average, and bytes of all caches, as of the last finished block; None before it."""
        return (self._blocks[-1]["tokens"], self._blocks[-1]["bytes"]) if self._blocks else None

    def frames_kept(self) -> set[int]:
        """Latent frames that some layer still holds an entry of (the newest frame of a merged one)."""
        tiers = (tier for memory in self._memories.values() for tier in memory.past() if tier.count)
        return {frame for tier in tiers for frames in tier.frames() for frame in frames.unique().tolist()}

    def flush(self) -> None:
        """Drop every cache and what its policy knows, in the middle of a generation."""
        self._memories.clear()
        self._lasting.clear()
        self._histories.clear()
        self._scratch.clear()

    def forget(self) -> None:
        """Drop everything remembered of earlier blocks; counters stay, and what the report says of it."""
        if self._memories:
            self._cache_summary = self._describe_cache()
            idle = {slot for slot, counts in self.slots.items() if not counts.engaged}
            self._idle = {slot: self._policies[slot].why_idle(self) for slot in idle}
        self.flush()
        self._texts.clear()
        self._prompts.clear()
        self._projected.clear()

    def check_engaged(self) -> None:
        """Raise `NotEngagedError` naming every technique that was asked for and never fired in a forward."""
        if self._began is None:
            return
        idle = [
            f"{counts.method} ({slot}): {self._idle.get(slot) or self._policies[slot].why_idle(self)}"
            for slot, counts in self.slots.items()
            if not counts.engaged
        ]
        if idle:
            raise NotEngagedError("asked for and never engaged: " + "; ".join(idle))

    def report(self) -> Report:
        """What happened so far, over all generations of this run."""
        self._read_events(wait=True)
        measured = self._device is None or self._device.type == "cpu" or self.timing
        total = self._before + self._elapsed
        frames, fps, peak = self.speed()
        return Report(
            slots={slot: found.rounded() for slot, found in self.slots.items()},
            kernel=self._describe_kernel(),
            choices=sorted({choice.why for choice in self._kernels.values() if choice.why}),
            seconds={
                "attention": sum((self._seconds[key] for key in self._layers), 0.0) if measured else None,
                "denoise": self._seconds["denoise"] or total - self._seconds["decode"],
                "decode": self._seconds["decode"],
                "total": total,
            },
            frames=frames,
            fps=fps,
            peak_memory_bytes=peak,
            cache={"max_tokens": self._max_tokens, "tokens_per_frame": self._tokens_per_frame}
            | (self._describe_cache() if self._memories else self._cache_summary)
            | ({} if self.observer is None else {"recall": self.observer.recall}),
            blocks=_with_seconds(self._blocks),
            layers=[
                self._layers[key].rounded(self._seconds[key] if measured else None) for key in sorted(self._layers)
            ],
            environment=environment(self._device, self._dtype),
        )

    def _describe_kernel(self) -> str:
        """What attended, and why that: of the largest calls."""
        found = [", ".join(sorted({choice.kernel for choice in self._kernels.values()})) or self.accel.kernel]
        largest = max(self._kernels, key=lambda key: key[1].operations, default=None)
        if largest is not None and self._kernels[largest].why:
            found.append(self._kernels[largest].why)
        found += [f"{what}: {', '.join(sorted(by))}" for what, by in sorted(self._paths.items())]
        return "; ".join([*found, *([f"{self.replayed} forwards replayed"] if self.replayed else [])])

    def _describe_cache(self) -> dict[str, Any]:
        return self.cache.describe(self) if "cache" in self.slots else {}

    @contextmanager
    def _between_events(self, section: _Section, device: torch.device) -> Iterator[None]:
        stream = torch.cuda.current_stream(device)
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record(stream)
        yield
        ended.record(stream)
        self._events.append((section, began, ended))

    def _read_events(self, wait: bool) -> None:
        """Adds up what the GPU has done by now, or all of it."""
        later = []
        for section, began, ended in self._events:
            if wait:
                ended.synchronize()
            if wait or ended.query():
                self._seconds[section] += began.elapsed_time(ended) / 1e3
            else:
                later.append((section, began, ended))
        self._events = later

    def _note_block(self, memories: list[Memory], held: int) -> None:
        """One line a finished block; of an endless video every second one, as often as need be."""
        frame = self._where.start + self._where.grid.frames
        if self._blocks and frame <= self._blocks[-1]["frame"]:  # the other branch, or a block that is recomputed
            self._blocks[-1] |= {"bytes": held, "until": self._elapsed}
            return
        self._blocks.append(
            {
                "frame": frame,
                "tokens": round(sum(memory.count for memory in memories) / len(memories)),
                "seen": memories[0].seen,
                "bytes": held,
                "until": self._elapsed,
            }
        )
        if len(self._blocks) > MOST_BLOCKS:
            del self._blocks[:-1:2]

    def _note_bytes(self, slot: str, held: int) -> None:
        if slot in self.slots:
            self.slots[slot].bytes = max(self.slots[slot].bytes, held)

    def _tick(self) -> None:
        if self._began is not None:
            self._elapsed = time.perf_counter() - self._began


@dataclass(frozen=True, eq=False)
class Projected:
    """Keys and values of a prompt in one layer, and what they were made of."""

    prompt: int
    weights: tuple[Tensor, ...]
    versions: tuple[int, ...]
    k: Tensor
    v: Tensor

    def holds(self, prompt: int | None, weights: Sequence[Tensor]) -> bool:
        """Whether that prompt under those weights, as they are now, would give the same."""
        same = all(one is other for one, other in zip(self.weights, weights, strict=True))
        return same and self.prompt == prompt and self.versions == tuple(weight._version for weight in weights)


def _progress(scheduler: Any) -> tuple[int, int]:
    """The step that a pipeline's scheduler is at, and its steps; 0 of 1 where it counts none."""
    timesteps, step = getattr(scheduler, "timesteps", None), getattr(scheduler, "step_index", None)
    if timesteps is None:
        return 0, 1
    return (getattr(scheduler, "begin_index", None) or 0) if step is None else step, len(timesteps)


def _with_seconds(blocks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines with the seconds since the line before, a block on average where some were left out."""
    out, before, frames = [], 0.0, 0
    size = min((b["frame"] - a["frame"] for a, b in pairwise(blocks)), default=0)
    for block in blocks:
        steps = max(1, round((block["frame"] - frames) / size)) if size and frames else 1
        line = {name: value for name, value in block.items() if name != "until"}
        out.append(line | {"seconds": round((block["until"] - before) / steps, 4)})
        before, frames = block["until"], block["frame"]
    return out


def _peak_memory(device: torch.device | None) -> int:
    if device is not None and device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
