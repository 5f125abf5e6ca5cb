"""How fast attention to listed blocks of keys is beside dense attention; correctness is checked first.

    python scripts/bench_sparse.py --out DIR          # one GPU, about two minutes
    python scripts/bench_sparse.py --toy --out DIR    # any machine, seconds; figures mean nothing

Shapes of Wan2.1-1.3B at 480x832: 12 heads of 128 channels, a block of 3 latent frames (4 680 queries) or a whole clip
(32 760) over 7 or 28 blocks of past. Every block of queries of every head reads its own random share of the keys, all
equally many: what a selection by content may ask for, and the hardest case for the cache. AnnSA is timed whole at the
end, over a past that grows block by block. Arms alternate in one process, some calls at a time; a speed-up is over the
fastest dense kernel in the same round. Useful TFLOP/s count the pairs read. Results go to DIR/sparse.jsonl as they
come.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from timing import Says, medians
from torch import Tensor

from diffaccel import AnnSA, Grid, Site
from diffaccel.cache import Entries, Lasting
from diffaccel.kernel import KERNELS, fa4
from diffaccel.kernel.block_sparse import BlockLists, Summary, block_sparse, by_fa4, gathered, written_out
from diffaccel.kernel.merge import HAS_TRITON
from diffaccel.selection.blocks import Chosen, over_blocks, path

Arm = Callable[[], object]

DENSE = ("fa3", "sdpa")
FULL = {
    "heads": 12,
    "dim": 128,
    "shapes": ((4680, 32760), (4680, 131040), (32760, 32760)),
    "densities": (0.05, 0.1, 0.2, 0.3, 0.5),
    "block": 128,
    "gather": (256, 1170, 2340),  # queries of a block that the gathering arm reads one list with
    "gather_keys": 120,  # divides the keys of every shape
}
TOY = {
    "heads": 2,
    "dim": 64,
    "shapes": ((60, 480),),
    "densities": (0.2, 0.5),
    "block": 32,
    "gather": (25, 50),
    "gather_keys": 24,
}
TUNED_AT = 0.2
CALLS = 4
STEPS = (2, 7, 35)  # that read what was chosen: of 4 steps, of 10 and of 50, less the dense ones
FIRST = 4  # blocks of past before it chooses


class Bench(Says):
    def __init__(self, sizes: dict, device: str, out: Path, rounds: int, file: str = "sparse.jsonl") -> None:
        self.sizes, self.device, self.rounds = sizes, torch.device(device), rounds
        self.dtype = torch.bfloat16 if device == "cuda" else torch.float32
        self.heads, self.dim = sizes["heads"], sizes["dim"]
        self.scale = self.dim**-0.5
        self.dense = [n for n in DENSE if KERNELS[n].unusable(self.device, self.dtype, self.dim) is None]
        self.fa4 = fa4.unusable(self.device, self.dtype, self.dim) is None
        self.began = time.perf_counter()
        out.mkdir(parents=True, exist_ok=True)
        self.log = (out / file).open("w")
        torch.manual_seed(0)

    def tensors(self, queries: int, keys: int, batch: int = 1) -> list[Tensor]:
        """Queries as a model has them; keys and values sorted within each head, so head by head in memory."""
        q = torch.randn(batch, queries, self.heads, self.dim, device=self.device).to(self.dtype)
        shape = (batch, self.heads, keys, self.dim)
        k, v = (torch.randn(shape, device=self.device).to(self.dtype).transpose(1, 2) for _ in range(2))
        return [q, k, v]

    def lists(self, queries: int, keys: int, blocks: tuple[int, int], density: float, batch: int = 1) -> BlockLists:
        """Random lists, all of the same length, in ascending order."""
        query_blocks, key_blocks = -(-queries // blocks[0]), -(-keys // blocks[1])
        most = max(1, round(density * key_blocks))
        drawn = torch.rand(batch, self.heads, query_blocks, key_blocks, device=self.device).topk(most, -1).indices
        counts = torch.full(drawn.shape[:-1], most, dtype=torch.int32, device=self.device)
        return BlockLists(drawn.sort(-1).values.int(), counts, *blocks, ascending=True)

    def time(self, arms: dict[str, Arm]) -> dict[str, float]:
        return medians(arms, self.rounds, self.device, CALLS)

    # -- correctness ---------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Every path against fp64 on odd shapes; nothing is timed unless all agree."""
        block = self.sizes["block"]
        for number, (queries, keys) in enumerate(((3 * block + 5, 9 * block - 3), (block - 1, 4 * block), (17, 29))):
            for size in (block, block // 2):
                self._check(queries, keys, (block, size), tuning=number == 0)
        self.say("all agree with fp64", seconds=time.perf_counter() - self.began)

    def _check(self, queries: int, keys: int, sizes: tuple[int, int], tuning: bool) -> None:
        q, k, v = self.tensors(queries, keys, batch=2)
        blocks = self.lists(queries, keys, sizes, 0.4, batch=2)
        key_blocks = -(-keys // sizes[1])
        order = torch.rand(2, self.heads, queries, device=self.device).argsort(-1)
        weight = torch.randn(2, self.heads, keys, device=self.device)
        summary = Summary(
            *(torch.randn(2, key_blocks, self.heads, self.dim, device=self.device).to(self.dtype) for _ in range(2)),
            torch.rand(2, self.heads, key_blocks, device=self.device),
        )
        wide = [x.double() for x in (q, k, v)]
        every = {"order": order, "log_weight": weight, "summary": summary}
        for options in ({}, {"order": order, "summary": summary}, every):
            exact = written_out(*wide, blocks, scale=self.scale, **options)
            arms = {"chosen": lambda o=options: block_sparse(q, k, v, blocks, scale=self.scale, **o)}
            if self.fa4 and not fa4.cannot_list(blocks, keys) and "log_weight" not in options:
                arms["fa4"] = lambda o=options: by_fa4(q, k, v, blocks, scale=self.scale, **o)
            if tuning and not options and self.device.type == "cuda" and HAS_TRITON:
                arms |= {str(c): self.fused(c, q, k, v, blocks, **options) for c in candidates(sizes[1])}
            if not options:
                kernels = {f"gathered, {n}": KERNELS[n] for n in self.dense}
                arms |= {n: lambda x=x: gathered(x, q, k, v, blocks, scale=self.scale) for n, x in kernels.items()}
            # one rounding of the weights and one of the result (gathering may round it twice), fp32 inside
            allowed = 2 * torch.finfo(self.dtype).eps * max(float(x.abs().max()) for x in (v, summary.v)) + 1e-5
            for name, arm in arms.items():
                out, lse = arm()
                error = float((out.double() - exact.out).abs().max())
                lse_error = float((lse.double() - exact.lse.double()).abs().max())
                if not (error <= allowed and lse_error <= 1e-4):
                    raise SystemExit(
                        f"RED: {name}, {queries}x{keys} in blocks of {sizes}, {list(options)}: "
                        f"out is off by {error:.3g} of {allowed:.3g}, lse by {lse_error:.3g}"
                    )

    # -- measurements --------------------------------------------------------------------------------------------

    def fused(self, config: object, q: Tensor, k: Tensor, v: Tensor, blocks: BlockLists, **options: object) -> Arm:
        from diffaccel.kernel.fused_block_sparse import attend

        return lambda: attend(q, k, v, blocks, self.scale, config=config, **options)

    def dense_arms(self, q: Tensor, k: Tensor, v: Tensor) -> dict[str, Arm]:
        """Over keys as a cache holds them, token by token: how a dense kernel would meet them."""
        k, v = (x.contiguous() for x in (k, v))
        return {f"dense, {n}": lambda x=KERNELS[n]: x.partial(q, k, v, scale=self.scale) for n in self.dense}

    def tune(self, queries: int, keys: int) -> dict[int, object]:
        """Every configuration on one shape; the fastest for blocks of 128 keys and of 64."""
        best = {}
        q, k, v = self.tensors(queries, keys)
        for size in (self.sizes["block"], self.sizes["block"] // 2):
            blocks = self.lists(queries, keys, (self.sizes["block"], size), TUNED_AT)
            arms = {}
            for config in candidates(size):
                arm = self.fused(config, q, k, v, blocks)
                try:
                    arm()
                except Exception as error:  # does not fit this GPU, or this compiler
                    self.say(f"keys in {size}: skipped", **asdict(config), error=repr(error)[:120])
                else:
                    arms[config] = arm
            times = self.time(arms)
            for config, ms in sorted(times.items(), key=lambda item: item[1]):
                figures = {"ms": ms, "tflops": self.useful(queries, keys, blocks, ms)}
                self.say(f"keys in {size}", **asdict(config), **figures)
            best[size] = min(times, key=times.__getitem__)
        return best

    def useful(self, queries: int, keys: int, blocks: BlockLists, ms: float) -> float:
        """TFLOP/s over the pairs of a query and a listed key."""
        read = min(keys, blocks.lists.shape[-1] * blocks.key_block)
        return 4e-9 * queries * read * self.heads * self.dim / ms

    def compare(self, queries: int, keys: int, best: dict[int, object], flex: bool) -> None:
        q, k, v = self.tensors(queries, keys)
        dense = self.dense_arms(q, k, v)
        whole = self.lists(queries, keys, (queries, keys), 1.0)
        kernel = KERNELS[self.dense[0]]
        compiled = Flex(q, k, v, self.scale) if flex else None
        for density in self.sizes["densities"]:
            arms, lists = dict(dense), dict.fromkeys(dense, whole)

            def add(name: str, blocks: BlockLists, arm: Arm, arms: dict = arms, lists: dict = lists) -> None:
                arms[name], lists[name] = arm, blocks

            for size, config in best.items():
                blocks = self.lists(queries, keys, (self.sizes["block"], size), density)
                add(f"triton, keys in {size}", blocks, self.fused(config, q, k, v, blocks))
            for rows in (1, 2) if self.fa4 else ():
                blocks = self.lists(queries, keys, (rows * self.sizes["block"], self.sizes["block"]), density)
                arm = lambda b=blocks: by_fa4(q, k, v, b, scale=self.scale)  # noqa: E731
                add(f"fa4, queries in {blocks.query_block}", blocks, arm)
            if not best:
                blocks = self.lists(queries, keys, (self.sizes["block"], self.sizes["block"]), density)
                add("listed, written out", blocks, lambda b=blocks: block_sparse(q, k, v, b, scale=self.scale))
            for size in self.sizes["gather"]:
                blocks = self.lists(queries, keys, (size, self.sizes["gather_keys"]), density)
                at_once = max(1, int(2e9 / (density * keys * self.dim * 4)))  # 2 GB of copies
                arm = lambda b=blocks, n=at_once: gathered(kernel, q, k, v, b, scale=self.scale, at_once=n)  # noqa: E731
                add(f"gathered, {kernel.name}, queries in {size}", blocks, arm)
            if compiled is not None:
                blocks = self.lists(queries, keys, (128, 128), density)
                arm = compiled.arm(blocks)
                if arm is None:
                    self.say("flex_attention: skipped", error=compiled.error)
                    compiled = None
                else:
                    add("flex_attention", blocks, arm)
            times = self.time(arms)
            fastest = min(times[name] for name in dense)
            for name, ms in times.items():
                figures = {"ms": ms, "tflops": self.useful(queries, keys, lists[name], ms), "speedup": fastest / ms}
                self.say(f"{queries} x {keys}, {density}: {name}", **figures)

    def whole(self, queries: int, keys: int) -> None:
        """AnnSA as it runs: sorting in what is new and choosing once a block, then reading at every step.

        The past grows from `FIRST` blocks to `keys`; planning is the mean over its last fifth, in which everything was
        sorted anew once. Keys lie around centres, so that sorting has something to find.
        """
        q, k, v = (x.contiguous() for x in self.tensors(queries, keys))
        k = self.clustered(k)
        frames = torch.arange(keys // queries).repeat_interleave(queries)
        dense = self.time(self.dense_arms(q, k, v))
        busy = self.dense_arms(q, k, v)[f"dense, {self.dense[0]}"]
        counts = range(FIRST * queries, keys + 1, queries)
        self.warm_up(q, k, v, frames)
        for density in self.sizes["densities"]:
            for groups, summaries in (("kmeans", True), ("kmeans", False), ("hash", True)):
                policy = AnnSA(density, groups, summaries=summaries, dense_steps=0.0, sink_frames=0)
                lasting, planning, chosen = Lasting(), [], None
                for block, count in enumerate(counts, FIRST):
                    entries = Entries(k[:, :count], v[:, :count], frames[:count], lasting=lasting)
                    site = Site(0, "self", 3, 4, block, block, "denoise", "cond", Grid(1, 1, queries))
                    ms, chosen = self.once(lambda p=policy, e=entries, s=site: p.plan(q, e, s), busy)
                    planning.append((count, ms))
                assert chosen is not None
                late = [ms for count, ms in planning if count > keys / AnnSA().resort]
                name = f"AnnSA {queries} x {keys}, {density}: {groups}{'' if summaries else ', no means'}"
                self.tell_whole(name, q, k, v, chosen, min(dense.values()), sum(late) / len(late), max(late))

    def at_once(self, tokens: int) -> None:
        """AnnSA in a model that makes a whole video at once: sorted and chosen at one step, refilled at the others."""
        q, k, v = (x.contiguous() for x in self.tensors(tokens, tokens))
        k = self.clustered(k)
        dense = self.time(self.dense_arms(q, k, v))
        frames, busy = torch.zeros(tokens, dtype=torch.int64), self.dense_arms(q, k, v)[f"dense, {self.dense[0]}"]
        for density in self.sizes["densities"]:
            policy = AnnSA(density, dense_steps=0.0, sink_frames=0)
            lasting, planning, chosen = Lasting(), [], None
            for step in range(8):
                lasting.version += 1
                entries = Entries(k, v, frames, lasting=lasting)
                site = Site(0, "self", step, 8, 0, 0, "denoise", "cond", Grid(1, 1, tokens))
                ms, chosen = self.once(lambda p=policy, e=entries, s=site: p.plan(q, e, s), busy)
                planning.append(ms)
            assert chosen is not None
            name, refill = f"AnnSA {tokens} x {tokens} at once, {density}", sum(planning[2:]) / len(planning[2:])
            self.tell_whole(name, q, k, v, chosen, min(dense.values()), planning[0], planning[0], refill)

    def tell_whole(
        self, name: str, q: Tensor, k: Tensor, v: Tensor, chosen: Chosen, dense: float, plan: float, worst: float,
        again: float = 0.0,
    ) -> None:  # fmt: skip
        """`plan` is spent once a block, `again` at every step."""
        kernel = KERNELS[self.dense[0]]
        read = self.time({"read": lambda: over_blocks(kernel, False, q, chosen, self.scale)})["read"]
        exact, part = kernel.partial(q, k, v, scale=self.scale), over_blocks(kernel, False, q, chosen, self.scale)
        figures = {"dense ms": dense, "plan ms": plan, "worst": worst, "each step ms": again, "read ms": read}
        figures |= {f"speedup of {n}": dense * n / (plan + (again + read) * n) for n in STEPS}
        self.say(
            name,
            **figures,
            tflops=4e-9 * q.shape[1] * chosen.keys_read * self.heads * self.dim / read,
            blocks=f"{chosen.blocks.query_block}x{chosen.blocks.key_block}",
            path=path(kernel, False, q, chosen),
            error=float((part.out - exact.out).float().norm() / exact.out.float().norm()),
        )

    def warm_up(self, q: Tensor, k: Tensor, v: Tensor, frames: Tensor) -> None:
        """Whatever is compiled or looked up once."""
        for groups in ("kmeans", "hash"):
            policy = AnnSA(0.3, groups, dense_steps=0.0, sink_frames=0, min_past=0.0)
            entries = Entries(k, v, frames)
            site = Site(0, "self", 3, 4, 1, 10**6, "denoise", "cond", Grid(1, 1, q.shape[1]))
            chosen = policy.plan(q, entries, site)
            assert chosen is not None
            over_blocks(KERNELS[self.dense[0]], False, q, chosen, self.scale)

    def clustered(self, k: Tensor) -> Tensor:
        centres = torch.randn(64, self.heads, self.dim, device=self.device)
        return (k + centres[torch.randint(64, k.shape[:2], device=self.device)]).to(self.dtype)

    def once(self, what: Callable[[], Any], before: Arm) -> tuple[float, Any]:
        """Milliseconds of one call behind others that keep the device busy, as it is in the middle of a model."""
        if self.device.type != "cuda":
            began = time.perf_counter()
            found = what()
            return 1e3 * (time.perf_counter() - began), found
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(3):
            before()
        start.record()
        found = what()
        end.record()
        end.synchronize()
        return start.elapsed_time(end), found

    def unordered(self, queries: int, keys: int, config: object, density: float) -> None:
        """What ascending lists are worth: the same lists shuffled."""
        q, k, v = self.tensors(queries, keys)
        blocks = self.lists(queries, keys, (self.sizes["block"], self.sizes["block"]), density)
        shuffled = torch.rand(blocks.lists.shape, device=self.device).argsort(-1)
        mixed = BlockLists(blocks.lists.gather(-1, shuffled), blocks.counts, blocks.query_block, blocks.key_block)
        arms = {name: self.fused(config, q, k, v, b) for name, b in (("ascending", blocks), ("shuffled", mixed))}
        for name, ms in self.time(arms).items():
            self.say(f"{queries} x {keys}, {density}: lists {name}", ms=ms)

    def parts(self, queries: int, keys: int, config: object, density: float) -> None:
        """What an order of the queries, log-weights and summaries cost."""
        q, k, v = self.tensors(queries, keys)
        block = self.sizes["block"]
        blocks = self.lists(queries, keys, (block, block), density)
        key_blocks = -(-keys // block)
        means = [torch.randn_like(k[:, :key_blocks]) for _ in range(2)]
        counts = torch.full((1, self.heads, key_blocks), 4.0, device=self.device)
        options = {
            "nothing more": {},
            "an order": {"order": torch.rand(1, self.heads, queries, device=self.device).argsort(-1)},
            "log-weights": {"log_weight": torch.randn(1, self.heads, keys, device=self.device)},
            "summaries": {"summary": Summary(*means, counts)},
        }
        arms = {name: self.fused(config, q, k, v, blocks, **extra) for name, extra in options.items()}
        for name, ms in self.time(arms).items():
            self.say(f"{queries} x {keys}, {density}: with {name}", ms=ms)


def candidates(key_block: int) -> list:
    """The configurations that differ for blocks of so many keys."""
    from diffaccel.kernel.fused_block_sparse import CANDIDATES

    return [config for config in CANDIDATES if not config.tma or key_block % config.keys == 0]


class Flex:
    """PyTorch's flex_attention: dense, or over the same lists, as blocks of a mask that are all full."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> None:
        from torch.nn.attention.flex_attention import flex_attention

        self.inputs = [x.transpose(1, 2) for x in (q, k, v)]
        self.scale, self.error = scale, ""
        torch._dynamo.reset()  # every shape compiles anew, and past a limit nothing would be compiled
        self.attend = torch.compile(flex_attention, dynamic=False)

    def arm(self, blocks: BlockLists | None) -> Arm | None:
        """None, and `error` set, where it does not compile or is wrong; dense without `blocks`."""
        q, k, v = (x.transpose(1, 2) for x in self.inputs)
        try:
            if blocks is None:
                arm = lambda: self.attend(*self.inputs, scale=self.scale)  # noqa: E731
                few = slice(0, 64)
                expected = KERNELS["sdpa"].partial(q[:, few], k, v, scale=self.scale).out
                error = float((arm().transpose(1, 2)[:, few] - expected).abs().max())
            else:
                mask, options = self._mask(blocks), {"BLOCK_N": min(blocks.key_block, 128)}
                arm = lambda: self.attend(*self.inputs, block_mask=mask, scale=self.scale, kernel_options=options)  # noqa: E731
                expected = block_sparse(q, k, v, blocks, scale=self.scale).out
                error = float((arm().transpose(1, 2) - expected).abs().max())
            if not error <= 0.05:
                raise RuntimeError(f"its result is off by {error:.3g}")
            return arm
        except Exception as error:
            self.error = repr(error)[:200]
            return None

    def _mask(self, blocks: BlockLists) -> object:
        from torch.nn.attention.flex_attention import BlockMask

        queries, keys = (x.shape[2] for x in self.inputs[:2])
        listed = blocks.listed(-(-keys // blocks.key_block))
        ids = listed.int().argsort(dim=-1, descending=True, stable=True).int()
        return BlockMask.from_kv_blocks(
            torch.zeros_like(blocks.counts), torch.zeros_like(ids), blocks.counts, ids,
            (blocks.query_block, blocks.key_block), seq_lengths=(queries, keys),
        )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true", help="toy size, on the CPU if there is no GPU")
    parser.add_argument("--out", type=Path, default=Path("out/bench"), help="folder for sparse.jsonl")
    parser.add_argument("--only-annsa", action="store_true", help="no kernels by themselves")
    parser.add_argument("--tune", action="store_true", help="try every configuration of the Triton kernel first")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--flex", action=argparse.BooleanOptionalAction, default=True, help="time flex_attention too")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not options.toy:
        raise SystemExit("the full shape needs a GPU; --toy runs anywhere")
    with torch.no_grad():
        bench = Bench(TOY if options.toy else FULL, device, options.out, options.rounds)
        name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
        bench.say("environment", device=name, torch=torch.__version__, dense=bench.dense, fa4=bench.fa4)
        bench.check()
        shapes = bench.sizes["shapes"]
        if options.only_annsa:
            for shape in shapes[:2]:
                bench.whole(*shape)
            bench.at_once(shapes[-1][1])
            return
        block = bench.sizes["block"]
        best: dict[int, Any] = {block: None, block // 2: None} if device == "cuda" and HAS_TRITON else {}
        if options.tune and best:
            best = bench.tune(*shapes[0])
        for number, shape in enumerate(shapes):
            bench.compare(*shape, best, flex=options.flex and device == "cuda" and number == 0)
        for shape in shapes[:2]:
            bench.whole(*shape)
        bench.at_once(shapes[-1][1])
        if best:
            config = best[block]
            bench.unordered(*shapes[-1], config, TUNED_AT)
            bench.parts(*shapes[0], config, TUNED_AT)
        bench.say("done", seconds=time.perf_counter() - bench.began)


if __name__ == "__main__":
    main()
