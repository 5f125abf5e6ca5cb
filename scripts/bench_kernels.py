"""Every attention kernel on the shapes that matter, in one table; correctness is checked first: red means no speeds.

    python scripts/bench_kernels.py --out DIR          # one GPU, some minutes: flex_attention compiles for every shape
    python scripts/bench_kernels.py --toy --out DIR    # any machine, seconds; figures mean nothing

12 heads of 64 and of 128 channels in bf16; a block of 3 latent frames over 28 blocks of past (4 680 x 131 040), and a
whole clip over itself (32 760 x 32 760). Dense: all kernels that run here and flex_attention. Block-sparse: the Triton
kernel, FA4 and flex_attention over the same random lists, all of one length in ascending order, 128 queries a list,
keys in blocks of 128 and of 64. TFLOP/s count the pairs of a query and a key that are read. Every group of arms is
timed with the preferred dense kernel among them, alternating, and shares are of its rate there; the last column is a
share of what a large bf16 matmul reached on an H200. Results go to DIR/kernels_64.jsonl and DIR/kernels_128.jsonl as
they come.
"""

import argparse
from pathlib import Path

import torch
from bench_sparse import TUNED_AT, Arm, Bench, Flex
from rich.console import Console
from rich.table import Table

from diffaccel.kernel import EXACT, KERNELS, Partial, fa4, merge
from diffaccel.kernel.block_sparse import block_sparse, by_fa4
from diffaccel.kernel.merge import HAS_TRITON

MATMUL = 795.0
"""TFLOP/s of a bf16 matmul of 8192^3 on an H200."""

DIMS = (64, 128)
FULL = {
    "heads": 12,
    "shapes": ((4680, 131040), (32760, 32760)),
    "densities": (0.05, 0.1, 0.25, 0.5, 1.0),
    "block": 128,
}
TOY = {"heads": 2, "shapes": ((60, 480),), "densities": (0.25, 1.0), "block": 32}


class Kernels(Bench):
    """The kernels at one number of channels; `rows` are those of the table."""

    def __init__(self, sizes: dict, device: str, out: Path, rounds: int, flex: bool) -> None:
        super().__init__(sizes, device, out, rounds, f"kernels_{sizes['dim']}.jsonl")
        self.dense = [one.name for one in EXACT if one.unusable(self.device, self.dtype, self.dim) is None]
        self.flex, self.rows = flex, []

    def check_dense(self) -> None:
        """Every dense kernel, and a merge of two halves, against fp64 on odd shapes."""
        for queries, keys in ((133, 517), (1, 300), (64, 1)):
            q, k, v = self.tensors(queries, keys, batch=2)
            exact = KERNELS["reference"].partial(*(x.double() for x in (q, k, v)), scale=self.scale)
            halves = [slice(0, keys // 2), slice(keys // 2, None)]
            for name in self.dense:
                read = KERNELS[name].partial
                parts = [read(q, k[:, half], v[:, half], scale=self.scale) for half in halves]
                for what, found in ((name, read(q, k, v, scale=self.scale)), (f"{name}, merged", merge(parts))):
                    self._agree(what, found, exact, float(v.abs().max()))
        self.say("dense kernels agree with fp64", dim=self.dim, kernels=self.dense)

    def _agree(self, what: str, found: Partial, exact: Partial, size: float) -> None:
        # a rounding of the weights, of the result and, merged, of the parts
        allowed = 3 * torch.finfo(self.dtype).eps * size + 1e-5
        error = float((found.out.double() - exact.out).abs().max())
        lse_error = float((found.lse.double() - exact.lse.double()).abs().max())
        if not (error <= allowed and lse_error <= 1e-4):
            raise SystemExit(f"RED: {what}: out is off by {error:.3g} of {allowed:.3g}, lse by {lse_error:.3g}")

    def compare_all(self, queries: int, keys: int, best: dict[int, object]) -> None:
        q, k, v = self.tensors(queries, keys)
        first, dense = self.dense[0], self.dense_arms(q, k, v)
        base = dense[f"dense, {first}"]
        compiled = Flex(q, k, v, self.scale) if self.flex else None
        arms = {name.removeprefix("dense, "): arm for name, arm in dense.items()}
        self._add_flex(arms, compiled, None)
        pairs = 4e-9 * queries * keys * self.heads * self.dim
        times = self.time(arms)
        for name, ms in times.items():
            self._row(f"{queries} x {keys}", "dense", name, ms, pairs, pairs / times[first])
        self._merge(q, KERNELS[first].partial(q, k, v, scale=self.scale), times[first], f"{queries} x {keys}")
        for size in (self.sizes["block"], self.sizes["block"] // 2):
            for density in self.sizes["densities"]:
                blocks = self.lists(queries, keys, (self.sizes["block"], size), density)
                arms: dict[str, Arm] = {first: base}
                if self.device.type == "cuda" and HAS_TRITON:
                    arms["triton"] = self.fused(best.get(size), q, k, v, blocks)
                else:
                    arms["written out"] = lambda b=blocks: block_sparse(q, k, v, b, scale=self.scale)
                if self.fa4 and fa4.cannot_list(blocks, keys) is None:
                    arms["fa4"] = lambda b=blocks: by_fa4(q, k, v, b, scale=self.scale)
                self._add_flex(arms, compiled, blocks)
                times = self.time(arms)
                read = pairs * min(keys, blocks.lists.shape[-1] * size) / keys
                for name, ms in list(times.items())[1:]:
                    kind = f"{density:g} of {blocks.query_block}x{size}"
                    self._row(f"{queries} x {keys}", kind, name, ms, read, pairs / times[first])

    def _add_flex(self, arms: dict[str, Arm], compiled: Flex | None, blocks: object) -> None:
        if compiled is None:
            return
        arm = compiled.arm(blocks)
        if arm is None:
            self.say("flex_attention: skipped", dim=self.dim, error=compiled.error)
        else:
            arms["flex"] = arm

    def _merge(self, q: torch.Tensor, part: Partial, attention: float, shape: str) -> None:
        """What merging two partials takes beside the attention that one launch would be."""
        parts = [part, Partial(part.out.clone(), part.lse - 1)]
        ms = self.time({"merge": lambda: merge(parts)})["merge"]
        self.say(f"d {self.dim}, {shape}: merge of two", ms=ms, share_of_attention=ms / attention)
        self.rows.append(
            (str(self.dim), shape, "merge of two", "", f"{ms:.3f}", "", f"{ms / attention:.1%} of its time", "")
        )

    def _row(self, shape: str, kind: str, name: str, ms: float, work: float, rate: float) -> None:
        reached = work / ms
        figures = {"ms": ms, "tflops": reached, "of_dense": reached / rate, "of_matmul": reached / MATMUL}
        self.say(f"d {self.dim}, {shape}, {kind}: {name}", **figures)
        shares = (f"{reached / rate:.0%}", f"{reached / MATMUL:.0%}")
        self.rows.append((str(self.dim), shape, kind, name, f"{ms:.3f}", f"{reached:.0f}", *shares))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true", help="toy size, on the CPU if there is no GPU")
    parser.add_argument("--out", type=Path, default=Path("out/bench"), help="folder for kernels_*.jsonl")
    parser.add_argument("--tune", action="store_true", help="try every configuration of the Triton kernel first")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dims", type=int, nargs="+", default=DIMS, help="channels of a head")
    parser.add_argument("--flex", action=argparse.BooleanOptionalAction, default=True, help="time flex_attention too")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not options.toy:
        raise SystemExit("the full shape needs a GPU; --toy runs anywhere")
    rows = []
    with torch.no_grad():
        for dim in options.dims:
            sizes = (TOY if options.toy else FULL) | {"dim": dim}
            bench = Kernels(sizes, device, options.out, options.rounds, options.flex and device == "cuda")
            name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
            bench.say("environment", device=name, torch=torch.__version__, dense=bench.dense, fa4=bench.fa4, dim=dim)
            bench.check_dense()
            bench.check()
            best: dict[int, object] = {}
            if options.tune and device == "cuda" and HAS_TRITON:
                best = bench.tune(*sizes["shapes"][0])
                bench.say(f"d {dim}: fastest at a density of {TUNED_AT}", **{str(k): str(c) for k, c in best.items()})
            for shape in sizes["shapes"]:
                bench.compare_all(*shape, best)
            rows += bench.rows
    table = Table("d", "queries x keys", "what", "kernel", "ms", "TFLOP/s", f"of {bench.dense[0]}", "of matmul")
    for row in rows:
        table.add_row(*row)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
