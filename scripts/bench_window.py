"""How fast attention under FreeSwim's windows is, and a denoising step with them; correctness is checked first.

    python scripts/bench_window.py --out DIR          # one GPU, some minutes
    python scripts/bench_window.py --toy --out DIR    # any machine, seconds; figures mean nothing

One self-attention of Wan2.1-1.3B (12 heads of 128) over all frames at once, at 1088x1920 with 81 frames (21 x 68 x 120
tokens) and 2176x3840 with 33 (9 x 136 x 240), windows of 31 x 53. Arms: dense with every kernel there is, the published
execution (flex attention under a mask of single tokens in raster order), and boxes by tile. Useful TFLOP/s count the
pairs that the window reads. Then a denoising step with guidance at the first size, random weights, of two layers with
all arms alternating and of 30 once: dense, as published (two rows), windows alone, and guided at every P-th step by
passes over the whole field or over the native one. Results go to DIR/window.jsonl as they come.
"""

import argparse
import math
import time
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
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from diffaccel import Accel, FullFieldGuide, Grid, InwardWindow, Site
from diffaccel.cache import Entries
from diffaccel.kernel import KERNELS, Partial
from diffaccel.kernel.boxes import Boxes, over_boxes
from diffaccel.pipelines.backbones._diffusers import WanAttnProcessor
from diffaccel.rotary import rotate

Step = Callable[[int], list[Tensor]]
"""Runs so many steps; gives what the two forwards of the last one made."""

FULL: dict[str, Any] = {
    "heads": 12,
    "dim": 128,
    "grids": (Grid(21, 68, 120), Grid(9, 136, 240)),
    "size": (31, 53),
    "tiles": ((31, 53), (17, 30), (17, 20), (7, 13), (8, 8), (4, 6), (2, 3), (1, 1)),
    "tile": (7, 13),
    "layers": (2, 30),
}
TOY: dict[str, Any] = {
    "heads": 2,
    "dim": 16,
    "grids": (Grid(2, 10, 12),),
    "size": (5, 7),
    "tiles": ((5, 7), (2, 3), (1, 1)),
    "tile": (1, 2),
    "layers": (1, 2),
}
CHECKED = 64  # queries that are compared with attention written out
PUBLISHED = "published, flex over single tokens"


class Copies:
    """In place of a kernel: what is left is the copying."""

    name = "copies alone"

    @staticmethod
    def partial(q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Partial:
        return Partial(torch.empty_like(q), torch.empty(q.shape[:-1], device=q.device))


def published_mask(window: InwardWindow, grid: Grid, device: torch.device) -> BlockMask:
    """The window of every token by itself, in the tokens' own order, for flex attention: as the authors run it."""
    assert window.size is not None
    (rows, columns), height, width = window.size, grid.height, grid.width

    def seen(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        place, other = query % (height * width), key % (height * width)
        top = (place // width - rows // 2).clamp(0, height - rows)
        left = (place % width - columns // 2).clamp(0, width - columns)
        row, column = other // width, other % width
        return (row >= top) & (row < top + rows) & (column >= left) & (column < left + columns)

    make = torch.compile(create_block_mask) if device.type == "cuda" else create_block_mask
    return make(seen, None, None, grid.tokens, grid.tokens, device=device)


def flex(*parts: Tensor, block_mask: BlockMask, scale: float) -> Tensor:
    run = compiled_flex if parts[0].is_cuda else flex_attention  # on the CPU it is written out
    return run(*parts, block_mask=block_mask, scale=scale)  # type: ignore[return-value]


compiled_flex = torch.compile(flex_attention, dynamic=False)


class Bench(Says):
    """What all measurements share."""

    def __init__(self, sizes: dict[str, Any], device: str, out: Path, rounds: int, compiled: bool = False) -> None:
        self.sizes, self.device, self.rounds, self.compiled = sizes, torch.device(device), rounds, compiled
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
        if self.device.type == "cuda":
            mask, parts = published_mask(window, grid, self.device), [x.transpose(1, 2).contiguous() for x in (q, k, v)]
            arms[PUBLISHED] = partial(flex, *parts, block_mask=mask, scale=scale)
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
        allowed = 2 * torch.finfo(self.dtype).eps * float(found.abs().max()) + 1e-5
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

    # -- a denoising step -----------------------------------------------------------------------------------------

    def model(self, layers: int) -> WanTransformer3DModel:
        shape = SHAPES["wan-1.3b" if self.device.type == "cuda" else "toy"]
        with torch.device(self.device):
            model = WanTransformer3DModel(
                num_attention_heads=self.sizes["heads"], attention_head_dim=self.sizes["dim"], ffn_dim=shape["ffn"],
                num_layers=layers, text_dim=shape["text"], rope_max_seq_len=1024,
            )  # fmt: skip
        for name, module in model.named_children():
            if name != "rope":  # its tables stay fp32, as in a checkpoint that is loaded in bf16
                module.to(self.dtype)
        return model.eval()

    def arms(self, model: WanTransformer3DModel, grid: Grid, window: InwardWindow) -> dict[str, tuple[int, Step]]:
        """By name: steps until all repeats, and what makes one, given its number."""
        latents = self.draw(1, 16, grid.frames, 2 * grid.height, 2 * grid.width)
        texts = [self.draw(1, 512, model.config["text_dim"]) for _ in range(2)]
        times = torch.ones(1, device=self.device)

        def forwards() -> list[Tensor]:
            return [model(hidden_states=latents, timestep=times, encoder_hidden_states=text)[0] for text in texts]

        def ours(accel: Accel) -> Step:
            def run(steps: int) -> list[Tensor]:
                found: list[Tensor] = []
                with accel(SimpleNamespace(transformer=model)) as run:
                    for number in range(steps):
                        at = SimpleNamespace(timesteps=range(100), step_index=number, begin_index=0)
                        run.pipe = SimpleNamespace(scheduler=at)
                        found = forwards()
                return found

            return run

        native = min(grid.height / (window.size[0] - 1), grid.width / (window.size[1] - 1))  # type: ignore[index]
        found = {"dense": (1, ours(Accel())), "windows alone": (1, ours(Accel(window=window)))}
        for every in (2, 5):
            found[f"whole field, P={every}"] = every, ours(Accel(window=window, reuse=FullFieldGuide(every)))
        for every, hold in ((1, "device"), (2, "device"), (2, "int8"), (2, "host"), (5, "device")):
            guide = FullFieldGuide(every, shrink=native, hold=hold)
            name = f"native field, P={every}" + ("" if hold == "device" else f", {hold}")
            found[name] = every, ours(Accel(window=window, reuse=guide))
        found["as published, P=2"] = 2, TwoRows.over(model, latents, texts, times, window, grid, every=2)
        return found

    def step(self, grid: Grid) -> None:
        """A step of two forwards, with the prompt and without."""
        size = self.sizes["size"]
        self.check_step(grid)
        for layers in self.sizes["layers"][: 1 if self.compiled else None]:
            model = self.model(layers)
            if self.compiled:
                model.compile_repeated_blocks(fullgraph=True)
            weights = sum(x.numel() * x.element_size() for x in model.parameters())
            arms = self.arms(model, grid, InwardWindow(size, self.sizes["tile"]))
            if self.compiled:
                del arms["as published, P=2"]
            if layers == min(self.sizes["layers"]):
                rounds = max(1, self.rounds // 3)
                calls = {name: partial(run, steps) for name, (steps, run) in arms.items()}
                times = medians(calls, rounds, self.device)
            else:  # too long to be repeated; what launches first has been compiled
                times = {name: self.once(name, partial(run, steps), weights) for name, (steps, run) in arms.items()}
            times = {name: ms / arms[name][0] for name, ms in times.items()}
            what = f"{grid}, {layers} layers{', compiled' * self.compiled}: a step"
            for name, ms in times.items():
                over = times.get("as published, P=2", math.nan) / ms
                self.say(f"{what}, {name}", ms=ms, over_dense=times["dense"] / ms, over_published=over)

    def check_step(self, grid: Grid) -> None:
        """A guided step is the published one."""
        size = self.sizes["size"]
        model, small = self.model(1), Grid(grid.frames, size[0] + 3, size[1] + 2)
        model.blocks[0].attn1.norm_q.weight.mul_(10)  # what steers is then seen through rounding
        for attention in (model.blocks[0].attn1, model.blocks[0].attn2):
            attention.to_out[0].weight.mul_(100)
        arms = self.arms(model, small, InwardWindow(size))
        allowed = 2 * torch.finfo(self.dtype).eps + 1e-5
        expected, found, other = (
            arms[name][1](2) for name in ("as published, P=2", "whole field, P=2", "windows alone")
        )
        if not max(apart(one, two) for one, two in zip(expected, found, strict=True)) <= allowed:
            raise SystemExit(f"RED: a guided step is not the published one: off by more than {allowed:.3g}")
        if not apart(expected[0], other[0]) > 2 * allowed:
            raise SystemExit("RED: the check would not have seen a step without the guide")

    def once(self, name: str, run: Callable[[], object], weights: int) -> float:
        """Milliseconds, and the memory at most beside the weights."""
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
        began = time.perf_counter()
        run()
        if cuda:
            torch.cuda.synchronize()
        ms = 1e3 * (time.perf_counter() - began)
        self.say(f"  {name}", ms=ms, gib=(torch.cuda.max_memory_allocated() - weights) / 2**30 if cuda else math.nan)
        return ms


def apart(one: Tensor, other: Tensor) -> float:
    """Norm of the difference over that of `one`."""
    return float((one.float() - other.float()).norm() / one.float().norm())


class TwoRows(WanAttnProcessor):  # type: ignore[misc]
    """The published loop: row 0 sees windows, row 1 the whole field and lends row 0 its cross-attention."""

    def __init__(self, state: dict[Any, Any], layer: int) -> None:
        super().__init__()
        self.state, self.layer = state, layer

    @classmethod
    def over(
        cls,
        model: Any,
        latents: Tensor,
        texts: list[Tensor],
        times: Tensor,
        window: InwardWindow,
        grid: Grid,
        every: int,
    ) -> Step:
        """Steps of `model` that way, the branch with the prompt first."""
        state: dict[Any, Any] = {"scale": window.scale(SimpleNamespace(grid=grid))}  # type: ignore[arg-type]
        attentions = [a for block in model.blocks for a in (block.attn1, block.attn2)]

        def run(steps: int) -> list[Tensor]:
            if "mask" not in state:
                state["mask"] = published_mask(window, grid, latents.device)
            before, found = [a.processor for a in attentions], []
            for number, attention in enumerate(attentions):
                attention.processor = cls(state, number)
            try:
                for step in range(steps):
                    found = []
                    for branch, text in enumerate(texts):
                        state["steered"], state["guide"] = branch == 0, branch == 0 and step % every == 0
                        rows = (x.expand(2, *x.shape[1:]) for x in (latents, times, text))
                        given = dict(zip(("hidden_states", "timestep", "encoder_hidden_states"), rows, strict=True))
                        found.append(model(**given)[0][:1])
            finally:
                for attention, processor in zip(attentions, before, strict=True):
                    attention.processor = processor
            return found

        return run

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None, rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:  # fmt: skip
        state, cross = self.state, encoder_hidden_states is not None
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(source)), attn.to_v(source)
        q, k, v = (x.unflatten(2, (attn.heads, -1)) for x in (q, k, v))
        if rotary_emb is not None:
            q, k = rotate(q, *rotary_emb), rotate(k, *rotary_emb)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        scale = q.shape[-1] ** -0.5
        if not cross:
            scale *= state["scale"]
            window = flex(q[:1], k[:1], v[:1], block_mask=state["mask"], scale=scale)
            whole = scaled_dot_product_attention(q[1:], k[1:], v[1:], scale=scale) if state["guide"] else window
            out = torch.cat([window, whole])
        elif not state["steered"]:
            out = scaled_dot_product_attention(q, k, v, scale=scale)
        else:
            if state["guide"]:
                state[self.layer] = scaled_dot_product_attention(q[1:], k[1:], v[1:], scale=scale)
            out = state[self.layer].expand(2, -1, -1, -1)
        return attn.to_out[1](attn.to_out[0](out.transpose(1, 2).flatten(2)))  # type: ignore[no-any-return]


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true", help="toy size, on the CPU if there is no GPU")
    parser.add_argument("--out", type=Path, default=Path("out/bench"), help="folder for window.jsonl")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=("attention", "step"))
    parser.add_argument("--compile", action="store_true", help="of the steps those of few layers, blocks compiled")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not options.toy:
        raise SystemExit("the full shape needs a GPU; --toy runs anywhere")
    bench = Bench(TOY if options.toy else FULL, device, options.out, options.rounds, options.compile)
    bench.say(
        "environment", device=torch.cuda.get_device_name() if device == "cuda" else "cpu", torch=torch.__version__
    )
    if options.only != "step":
        with torch.no_grad():
            for grid in bench.sizes["grids"]:
                bench.attention(grid)
    if options.only != "attention":
        with torch.no_grad():
            bench.step(bench.sizes["grids"][0])


if __name__ == "__main__":
    main()
