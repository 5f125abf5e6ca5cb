"""Does the meter order configurations as the clock does?

    python scripts/bench_meter.py --out DIR          # one GPU
    python scripts/bench_meter.py --other --out DIR  # shapes that no factor of the meter was fitted to
    python scripts/bench_meter.py --toy --out DIR    # any machine; small shapes

Times attention over queries, keys, heads, heads of keys, shares of the keys (chosen by lists of blocks) and stores
(plain, 4 bits), and prints the rank correlation (Spearman) of the median time with equivalent operations (Kinetics:
operations + intensity x bytes), with the roofline, with that of the processors that are busy, with operations alone and
with bytes alone. The machine's rates are measured first. Arms alternate. One line a configuration goes to
DIR/meter.jsonl.
"""

import argparse
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path

import torch
from timing import Says, medians
from torch import Tensor

from diffaccel import kernel
from diffaccel.cache.store import make_store, row_of
from diffaccel.kernel.block_sparse import BlockLists, block_sparse, gathered
from diffaccel.meter import Cost, attention, busy, measure, reading

FULL = {
    "dim": 128,
    "dense": ((1, 32, 1560, 4680), (8192, 32768, 131072), ((12, 12), (32, 8))),
    "sparse": ((4680, 32760), (0.1, 0.3, 0.5), 12),
    "stored": ((32, 4680), (32768,), 12),
}
OTHER = {
    "dim": 64,
    "dense": ((4, 128, 780, 2340), (16384, 65536), ((16, 16), (24, 6))),
    "sparse": ((2340, 65536), (0.05, 0.2, 0.6), 16),
    "stored": ((16, 1560), (65536,), 16),
}
TOY = {
    "dim": 64,
    "dense": ((1, 8, 64, 256), (512, 2048, 8192), ((4, 4), (8, 2))),
    "sparse": ((256, 4096), (0.1, 0.3, 0.5), 4),
    "stored": ((8, 256), (4096,), 4),
}
BLOCK = 128
Arm = tuple[Cost, Callable[[], object], tuple[int, int, int]]  # queries, heads, heads of keys


class Bench(Says):
    def __init__(self, sizes: dict, device: torch.device, out: Path, rounds: int) -> None:
        self.sizes, self.device, self.rounds, self.dim = sizes, device, rounds, sizes["dim"]
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.kernel = kernel.resolve("auto", device, self.dtype, self.dim)
        out.mkdir(parents=True, exist_ok=True)
        self.log = (out / "meter.jsonl").open("w")
        torch.manual_seed(0)

    def draw(self, tokens: int, heads: int) -> Tensor:
        return torch.randn(1, tokens, heads, self.dim, device=self.device).to(self.dtype)

    def arms(self) -> dict[str, Arm]:
        """What is timed, by name, with what it should cost."""
        found, size, scale = {}, self.dtype.itemsize, self.dim**-0.5
        for queries, keys, (heads, own) in product(*self.sizes["dense"]):
            q, k, v = self.draw(queries, heads), self.draw(keys, own), self.draw(keys, own)
            cost = attention(queries, keys, heads, self.dim, key_heads=own, itemsize=size)
            found[f"{queries} x {keys}, {heads} heads of {own}"] = (
                cost,
                partial(self.kernel.partial, q, k, v, scale=scale),
                (queries, heads, own),
            )
        (queries, keys), shares, heads = self.sizes["sparse"]
        q, k, v = self.draw(queries, heads), self.draw(keys, heads), self.draw(keys, heads)
        for share in shares:
            blocks = self.lists(queries, keys, heads, share)
            read = int(blocks.counts.max()) * BLOCK
            cost = attention(queries, read, heads, self.dim, itemsize=size)
            if self.device.type == "cpu":  # has no kernel that reads lists in place: they are copied
                cost += Cost(memory=4 * read * heads * self.dim * size)
                arm = partial(gathered, self.kernel, q, k, v, blocks, scale=scale)
            else:
                arm = partial(block_sparse, q, k, v, blocks, scale=scale)
            found[f"{queries} x {keys}, {share} of the keys"] = (cost, arm, (queries, heads, heads))
        for queries, keys in product(*self.sizes["stored"][:2]):
            heads = self.sizes["stored"][2]
            q, k, v = self.draw(queries, heads), self.draw(keys, heads), self.draw(keys, heads)
            found[f"{queries} x {keys}, 4 bits"] = (
                attention(queries, keys, heads, self.dim, itemsize=size)
                + reading(keys, heads, self.dim, bits=4, to=size),
                self.stored(q, k, v, scale),
                (queries, heads, heads),
            )
        return found

    def stored(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Callable[[], object]:
        """Attention over keys and values that are held in 4 bits."""
        stores = [make_store(x, x.shape[1], 4) for x in (k, v)]
        for store, given in zip(stores, (k, v), strict=True):
            store.write(torch.arange(given.shape[1], device=self.device), given[0].flatten(1).float())
        count = k.shape[1]
        return lambda: self.kernel.partial(q, *(row_of(store, 0, count).to(q.dtype) for store in stores), scale=scale)

    def lists(self, queries: int, keys: int, heads: int, share: float) -> BlockLists:
        """Random lists of equal length."""
        own = queries if self.device.type == "cpu" else BLOCK
        rows, columns = -(-queries // own), -(-keys // BLOCK)
        most = max(1, round(share * columns))
        drawn = torch.rand(1, heads, rows, columns, device=self.device).topk(most, -1).indices.sort(-1).values
        counts = torch.full(drawn.shape[:-1], most, dtype=torch.int32, device=self.device)
        return BlockLists(drawn.int(), counts, own, BLOCK, ascending=True)


def spearman(a: list[float], b: list[float]) -> float:
    """Correlation of the ranks, of equal values the mean of theirs."""
    ranks = []
    for values in (torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64)):
        below, equal = (values[:, None] > values).sum(1), (values[:, None] == values).sum(1)
        ranks.append(below + (equal - 1) / 2)
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true", help="toy size, on the CPU if there is no GPU")
    parser.add_argument("--other", action="store_true", help="other shapes than those a factor was read off")
    parser.add_argument("--out", type=Path, default=Path("out/bench"), help="folder for meter.jsonl")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not options.toy:
        raise SystemExit("the full shape needs a GPU; --toy runs anywhere")
    with torch.no_grad():
        bench = Bench(TOY if options.toy else OTHER if options.other else FULL, device, options.out, options.rounds)
        machine = measure(device, bench.dtype)
        bench.say(machine.name, flops=machine.flops, memory=machine.memory, intensity=machine.intensity)
        arms = bench.arms()
        times = medians({name: arm for name, (_, arm, _) in arms.items()}, options.rounds, device)
        costs = [cost for cost, _, _ in arms.values()]
        shares = [busy(queries, heads, machine, key_heads=own) for _, _, (queries, heads, own) in arms.values()]
        for (name, ms), cost, share in zip(times.items(), costs, shares, strict=True):
            bench.say(
                name,
                ms=ms,
                roofline_ms=1e3 * cost.seconds(machine, share),
                busy=share,
                flops=cost.flops,
                bytes=cost.memory,
            )
        measured = list(times.values())
        bench.say(
            f"rank correlation with time, {len(costs)} configurations",
            eflops=spearman([cost.eflops(machine) for cost in costs], measured),
            roofline=spearman([cost.seconds(machine) for cost in costs], measured),
            busy_roofline=spearman(
                [c.seconds(machine, share) for c, share in zip(costs, shares, strict=True)], measured
            ),
            flops_alone=spearman([cost.flops for cost in costs], measured),
            bytes_alone=spearman([cost.memory for cost in costs], measured),
        )


if __name__ == "__main__":
    main()
