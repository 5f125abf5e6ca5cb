"""What tiers that hold tokens less precisely cost: error of attention's output against bytes, on a bundled model.

    python scripts/tier_error.py --out out/tiers                 # 4 prompts, 161 frames: minutes on a CPU

The model generates with dense attention. Beside it, every arm keeps a cache of its own of the same keys and values, and
answers the queries of each block's clean pass before that block is added to it. `error` is the norm of the difference
to dense attention's output over that of the output, over past and block, the mean over layers, heads and the second
half of the video; `past` the same of the past alone. `bytes` is what the tokens held take at the end, on the device
and on the host, keys and values in bfloat16 where they are not quantised, over a dense cache's. Room made in advance is
not counted.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from cache_quality import PROMPTS
from policy_arms import RandomKeep
from torch import Tensor

from diffaccel import Accel, SinkRecent, SnapKV, ThinK, ZipCache
from diffaccel.cache import KVCache, Memory
from diffaccel.cache.centroids import Centroids
from diffaccel.cache.look import Look
from diffaccel.cache.ragged import ByHead
from diffaccel.cache.stored import Stored
from diffaccel.kernel import merge
from diffaccel.kernel.weighted import read_plainly
from diffaccel.pipelines.loading import load
from diffaccel.policy import CachePolicy
from diffaccel.run import Run
from diffaccel.site import Site

NUMBER = 2  # bytes of a bfloat16
STRIDE = 5  # between the queries that are answered


class RandomSplit(ZipCache):
    """As many tokens in each number of bits, by lot."""

    columns: ClassVar[tuple[str, ...]] = ("lot",)

    def observe(self, look: Look) -> dict[str, Tensor]:
        return RandomKeep.observe(self, look)  # type: ignore[arg-type]

    def score(self, look: Look) -> Tensor:
        return look.columns["lot"]


def arms() -> dict[str, CachePolicy]:
    found: dict[str, CachePolicy] = {
        "uniform 8 bits": ZipCache(1.0, bits=8),
        "uniform 4 bits": ZipCache(1.0, bits=4),
        "uniform 2 bits": ZipCache(1.0, bits=2),
        "60 % in 4 bits, 40 % in 2: ZipCache": ZipCache(0.6),
        "60 % in 4 bits, 40 % in 2: not normalised": ZipCache(0.6, normalised=False),
        "60 % in 4 bits, 40 % in 2: by lot": RandomSplit(0.6),
        "20 % in 8 bits, 80 % in 2: ZipCache": ZipCache(0.2, bits=8),
        "20 % in 8 bits, 80 % in 2: not normalised": ZipCache(0.2, bits=8, normalised=False),
        "20 % in 8 bits, 80 % in 2: by lot": RandomSplit(0.2, bits=8),
        "SinkRecent, 12 frames": SinkRecent(11, 1),
    }
    found |= {f"ThinK, {keep}": ThinK(keep) for keep in (0.8, 0.6, 0.4)}
    for dropped in (None, "mean", "centroids", "bits2", "bits4", "host"):
        found[f"SnapKV, 12 frames, dropped: {dropped}"] = SnapKV("12 frames", dropped=dropped)
    return found


@dataclass
class Shadow:
    """A cache that sees what the dense one sees, and nobody reads."""

    policy: CachePolicy
    memories: list[Memory] = field(default_factory=list)
    run: Any = None
    errors: list[tuple[float, float]] = field(default_factory=list)

    def answer(self, dense: Sequence[Memory], site: Site, run: Run) -> None:
        """Compare with the dense memories, which hold the block already; then add it."""
        if not self.memories:
            scratch: defaultdict[str, dict[str, Any]] = defaultdict(dict)
            self.memories = [Memory() for _ in dense]
            self.run = SimpleNamespace(
                extent=run.extent, scratch=lambda slot, branch: scratch[branch], fired=lambda *_: None,
                rotary=run.rotary, later=run.later, spread=None,
            )  # fmt: skip
        tokens = site.grid.tokens
        for memory, other in zip(self.memories, dense, strict=True):
            whole = other.exact.past().entries
            k, v, q = whole.k[:, -tokens:], whole.v[:, -tokens:], other.queries[:, ::STRIDE]
            late = memory.count and 2 * site.start >= run.extent.frames
            past = [tier.partial(q, read_plainly) for tier in memory.past() if tier.count] if late else []
            memory.place(k, v, site)
            if past:
                block = memory.block().partial(q, read_plainly)
                found, wanted = merge([*past, block]).out, read_plainly(q, whole).out
                old = other.exact.oldest(whole.count - tokens)
                far, near = merge(past).out, read_plainly(q, old).out
                self.errors.append((apart(found, wanted), apart(far, near)))
            memory.queries = self.policy.sample(other.queries, site)
            memory.finish_block(tokens)
        self.policy.commit(self.memories, site, self.run)

    def share(self) -> float:
        """Bytes of what is held over those of a dense cache."""
        return sum(map(held_bytes, self.memories)) / sum(m.seen * per_token(m) for m in self.memories)


def apart(found: Tensor, wanted: Tensor) -> float:
    """Relative error of (B, S, H, D), the mean over heads."""
    far, size = (x.transpose(1, 2).flatten(2).norm(dim=2) for x in (found - wanted, wanted))
    return float((far / size).mean())


def per_token(memory: Memory) -> int:
    _, _, heads, dim = memory.exact.past().entries.k.shape
    return 2 * heads * dim * NUMBER


def held_bytes(memory: Memory) -> float:
    """Of one layer and video."""
    total = float(memory.exact.count * per_token(memory))
    heads = memory.exact.past().entries.k.shape[2]
    for tier in memory.older:
        if isinstance(tier, Stored) and tier.count:
            parts = [part for store in tier._pieces[0] for part in store.parts]
            entry = sum(part[0, 0].numel() * min(NUMBER, part.element_size()) for part in parts)
            total += entry * sum(map(sum, tier.counts))
        elif isinstance(tier, Centroids) and tier.count:
            total += tier.bytes - tier._read.bytes // 2  # what is read would be in bfloat16
        elif isinstance(tier, ByHead) and tier.counts:
            total += sum(map(sum, tier.counts)) * per_token(memory) / heads
    return total


class Watched(KVCache):
    """The dense cache, with the shadows beside it."""

    shadows: ClassVar[dict[str, Shadow]] = {}

    @property
    def needs_queries(self) -> bool:
        return True

    def commit(self, memories: Sequence[Memory], site: Site, run: Run) -> None:
        super().commit(memories, site, run)
        if site.branch == "cond":
            for shadow in self.shadows.values():
                shadow.answer(memories, site, run)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--frames", type=int, default=161, help="pixel frames, 1 + 4k")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--steps", type=int, help="denoising steps; default: the model's own")
    parser.add_argument("--only", default="", help="arms whose name holds this text")
    options = parser.parse_args(arguments)
    pipe = load("tiny-world", dtype="float32")
    rows: dict[str, list[tuple[float, float, float]]] = defaultdict(list)
    for number, prompt in enumerate(PROMPTS[: options.prompts]):
        Watched.shadows = {name: Shadow(policy) for name, policy in arms().items() if options.only in name}
        steps = {} if options.steps is None else {"num_inference_steps": options.steps}
        with Accel(cache=Watched())(pipe):
            pipe(
                prompt, height=128, width=128, num_frames=options.frames, output_type="latent",
                generator=torch.Generator().manual_seed(number), **steps,
            )  # fmt: skip
        for name, shadow in Watched.shadows.items():
            error, past = (sum(x) / len(x) for x in zip(*shadow.errors, strict=True))
            rows[name].append((error, past, shadow.share()))
    options.out.mkdir(parents=True, exist_ok=True)
    lines = ["| arm | bytes | error | past |", "|---|---|---|---|"]
    found = []
    for name, each in rows.items():
        error, past, share = (sum(x) / len(x) for x in zip(*each, strict=True))
        lines.append(f"| {name} | {share:.3f} | {error:.4f} | {past:.4f} |")
        found.append({"arm": name, "bytes": share, "error": error, "past": past, "prompts": each})
    (options.out / "tiers.json").write_text(json.dumps(found, indent=1))
    (options.out / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
