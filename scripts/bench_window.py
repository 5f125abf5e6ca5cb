"""How fast attention under FreeSwim's windows is, and a denoising step with them; correctness is checked first.

    python scripts/bench_window.py --out DIR          # one GPU, some minutes
    python scripts/bench_window.py --toy --out DIR    # any machine, seconds; figures mean nothing

One self-attention of Wan2.1-1.3B (12 heads of 128) over all frames at once, at 1088x1920 with 81 frames (21 x 68 x 120
tokens) and 2176x3840 with 33 (9 x 136 x 240), windows of 31 x 53. Arms: dense with every kernel there is, the published
execution (flex attention under a mask of single tokens in raster order), and boxes by tile. Useful TFLOP/s count the
pairs that the window reads. Then a denoising step with guidance at the first size, random weights, two layers (the
others are alike): dense, windows alone, and passes over the whole field at every P-th step. Results go to
DIR/window.jsonl as they come.
"""

import argparse
import math
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from bench_seam import SHAPES
from diffusers import WanTransformer3DModel
from timing import Says, medians
from torch import Tensor

from diffaccel import Accel, FullFieldGuide, Grid, InwardWindow, Site
from diffaccel.cache import Entries
from diffaccel.kernel import KERNELS, Partial
from diffaccel.kernel.boxes import Boxes, over_boxes

FULL: dict[str, Any] = {
    "heads": 12,
    "dim": 128,
    "grids": (Grid(21, 68, 120), Grid(9, 136, 240)),
    "size": (31, 53),
    "tiles": ((31, 53), (17, 30), (17, 20), (8, 12), (8, 8), (4, 6), (2, 4), (2, 3), (1, 1)),
    "layers": 2,
}
TOY: dict[str, Any] = {
    "heads": 2,
    "dim": 16,
    "grids": (Grid(2, 10, 12),),
    "size": (5, 7),
    "tiles": ((5, 7), (2, 3), (1, 1)),
    "layers": 1,
}
CHECKED = 64  # queries that are compared with attention written out
PUBLISHED = "published, flex over single tokens"


class Copies:
    """In place of a kernel: what is left is the copying."""

    name = "copies alone"

    @staticmethod
    def partial(q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Partial:
        return Partial(torch.empty_like(q), torch.empty(q.shape[:-1], device=q.device))


class Bench(Says):
    """What all measurements share."""

    def __init__(self, sizes: dict[str, Any], device: str, out: Path, rounds: int) -> None:
        self.sizes, self.device, self.rounds = sizes, torch.device(device), rounds
        self.dtype = torch.bfloat16 if device == "cuda" else torch.float32
        out.mkdir(parents=True, exist_ok=True)
        self.log = (out / "window.jsonl").open("w")
        torch.manual_seed(0)

    def draw(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device).to(self.dtype)

    # -- one attention --------------------------------------------------------------------------------------------

    def attention(self, grid: Grid) -> None:
        heads, dim = self.sizes["heads"], self.sizes["dim"]
        q, k, v = (self.draw(1, grid.tokens, heads, dim) for _ in range(3))
        entries, scale = Entries(k, v, grid.frame_of_token()), dim**-0.5
        site = Site(0, "self", 0, 1, 0, 0, "denoise", "cond", grid)
        kernels = [x for x in KERNELS.values() if x.name not in ("reference", "split", "fa4")]
        kernels = [x for x in kernels if x.unusable(self.device, self.dtype, dim) is None]
        arms: dict[str, Callable[[], Any]] = {
            f"dense, {x.name}": lambda x=x: x.partial(q, k, v, scale=scale) for x in kernels
        }
        read = dict.fromkeys(arms, float(grid.tokens))
        window = InwardWindow(self.sizes["size"])
        flex = self.published(window, grid, q, k, v, scale)
        if flex is not None:
            arms[PUBLISHED] = flex
            read[PUBLISHED] = float(grid.frames * self.sizes["size"][0] * self.sizes["size"][1])
        for tile in self.sizes["tiles"]:
            boxes = InwardWindow(self.sizes["size"], tile).plan(q, entries, site)
            assert isinstance(boxes, Boxes)
            for kernel in [*kernels, Copies]:
                name = f"tile {tile[0]}x{tile[1]}, {kernel.name}"
                arms[name] = partial(over_boxes, kernel, q, entries, scale, boxes)
                read[name] = boxes.keys_read
                if kernel is not Copies:
                    self.check(name, arms[name]().out, q, k, v, boxes, scale)
        times = medians(arms, self.rounds, self.device)
        best = min(ms for name, ms in times.items() if name.startswith("dense"))
        for name, ms in times.items():
            tile, kernel_name = name.split(", ")
            if kernel_name == Copies.name:
                self.say(f"{grid}: {name}", ms=ms)
                continue
            own = times.get(f"dense, {kernel_name}", best)
            tflops = 4 * grid.tokens * read[name] * heads * dim / ms / 1e9
            self.say(
                f"{grid}: {name}", ms=ms, speedup=best / ms, tflops=tflops,
                of_flop_ratio=own / ms / (grid.tokens / read[name]), over_published=times.get(PUBLISHED, math.nan) / ms,
            )  # fmt: skip

    def check(self, name: str, found: Tensor, q: Tensor, k: Tensor, v: Tensor, boxes: Any, scale: float) -> None:
        """Some queries against attention written out in fp32."""
        grid = boxes.queries
        numbers = torch.randperm(grid.tokens, generator=torch.Generator().manual_seed(1))[:CHECKED]
        index = torch.arange(grid.tokens).view(grid.frames, grid.height, grid.width)
        allowed = 4 * torch.finfo(self.dtype).eps * float(found.abs().max()) + 1e-5
        for tiles in product(boxes.frames, boxes.rows, boxes.columns):
            tokens, keys = (index[tuple(slice(*tile[which]) for tile in tiles)].flatten() for which in (0, 1))
            mine = tokens[torch.isin(tokens, numbers)].to(q.device)
            if not len(mine):
                continue
            keys = keys.to(q.device)
            scores = torch.einsum("bshd,bnhd->bhsn", q[:, mine].float(), k[:, keys].float()) * scale
            expected = torch.einsum("bhsn,bnhd->bshd", scores.softmax(-1), v[:, keys].float())
            error = float((found[:, mine].float() - expected).abs().max())
            if not error <= allowed:
                raise SystemExit(f"RED: {name}: off by {error:.3g} of {allowed:.3g}")

    def published(
        self, window: InwardWindow, grid: Grid, q: Tensor, k: Tensor, v: Tensor, scale: float
    ) -> Callable[[], Any] | None:
        """Flex attention as the paper's authors run it: the window of every token, in raster order."""
        if self.device.type != "cuda":
            return None
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        assert window.size is not None
        (rows, columns), height, width = window.size, grid.height, grid.width

        def seen(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
            place, other = query % (height * width), key % (height * width)
            top = (place // width - rows // 2).clamp(0, height - rows)
            left = (place % width - columns // 2).clamp(0, width - columns)
            row, column = other // width, other % width
            return (row >= top) & (row < top + rows) & (column >= left) & (column < left + columns)

        compiled = torch.compile(flex_attention, dynamic=False)
        try:
            mask = create_block_mask(seen, None, None, grid.tokens, grid.tokens, device=self.device, _compile=True)
            parts = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
            compiled(*parts, block_mask=mask, scale=scale)
        except Exception as error:
            self.say(f"{grid}: flex cannot run it", why=str(error).splitlines()[0][:120])
            return None
        return lambda: compiled(*parts, block_mask=mask, scale=scale)

    # -- a denoising step -----------------------------------------------------------------------------------------

    def step(self, grid: Grid) -> None:
        """Milliseconds a step of two forwards (with and without the prompt), over as many steps as `every` repeats."""
        shape = SHAPES["wan-1.3b" if self.device.type == "cuda" else "toy"]
        heads, dim = self.sizes["heads"], self.sizes["dim"]
        with torch.device(self.device):
            model = WanTransformer3DModel(
                num_attention_heads=heads, attention_head_dim=dim, ffn_dim=shape["ffn"],
                num_layers=self.sizes["layers"], text_dim=shape["text"], rope_max_seq_len=1024,
            ).to(self.dtype).eval()  # fmt: skip
        latents = self.draw(1, 16, grid.frames, 2 * grid.height, 2 * grid.width)
        texts = [self.draw(1, 512, shape["text"]) for _ in range(2)]
        tile = self.sizes["tiles"][2]

        def forwards(latents: Tensor, texts: list[Tensor]) -> None:
            for text in texts:
                model(hidden_states=latents, timestep=torch.ones(1, device=self.device), encoder_hidden_states=text)

        def ours(every: int | None, pool: int = 1, steps: int = 10) -> Callable[[], object]:
            window = InwardWindow(self.sizes["size"], tile, field_pool=pool)
            guide = None if every is None else FullFieldGuide(every=every)

            def run() -> None:
                pipe = SimpleNamespace(transformer=model)
                with Accel(window=window, reuse=guide)(pipe) as found:
                    for number in range(steps):
                        found.pipe = SimpleNamespace(
                            scheduler=SimpleNamespace(timesteps=range(steps), step_index=number, begin_index=0)
                        )
                        forwards(latents, texts)

            return run

        def dense(steps: int = 10) -> None:
            with Accel()(SimpleNamespace(transformer=model)):
                for _ in range(steps):
                    forwards(latents, texts)

        arms: dict[str, Callable[[], object]] = {"dense": dense, "windows alone": ours(None)}
        for every in (1, 2, 5):
            arms[f"guided, P={every}"] = ours(every)
        for every in (2, 5):
            arms[f"guided by a field pooled 2x2, P={every}"] = ours(every, 2)
        with torch.no_grad():
            times = medians(arms, max(1, self.rounds // 3), self.device)
        for name, ms in times.items():
            self.say(f"{grid}: a step, {name}", ms=ms / 10, speedup=times["dense"] / ms)
        if self.device.type == "cuda":
            self.say("peak memory", gib=torch.cuda.max_memory_allocated() / 2**30)


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true", help="toy size, on the CPU if there is no GPU")
    parser.add_argument("--out", type=Path, default=Path("out/bench"), help="folder for window.jsonl")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=("attention", "step"))
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not options.toy:
        raise SystemExit("the full shape needs a GPU; --toy runs anywhere")
    bench = Bench(TOY if options.toy else FULL, device, options.out, options.rounds)
    bench.say(
        "environment", device=torch.cuda.get_device_name() if device == "cuda" else "cpu", torch=torch.__version__
    )
    if options.only != "step":
        with torch.no_grad():
            for grid in bench.sizes["grids"]:
                bench.attention(grid)
    if options.only != "attention":
        bench.step(bench.sizes["grids"][0])


if __name__ == "__main__":
    main()
