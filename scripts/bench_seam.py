"""What the seam costs and what reuse saves, at the shape of Wan2.1-1.3B; correctness is checked first.

    python scripts/bench_seam.py --out DIR          # one GPU, about two minutes
    python scripts/bench_seam.py --toy --out DIR    # any machine, seconds; figures mean nothing

One forward of a block of 3 latent frames at 480x832 (4 680 queries) over 7 blocks of cached past (32 760 keys). The
plain arm is a stock transformer whose processor writes into a preallocated cache and calls the same dense kernel
without a log-sum-exp; arms alternate in one process. Random weights: nothing here depends on their values. Results go
to DIR/seam.jsonl line by line.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from timing import Says, medians
from torch import Tensor

from diffaccel import Accel, FlashBlock, PadCollapse
from diffaccel.cache import Entries
from diffaccel.kernel import KERNELS, merge, resolve
from diffaccel.kernel.merge import merge_eager
from diffaccel.kernel.weighted import over_entries

SHAPES = {
    "wan-1.3b": {
        "layers": 30,
        "heads": 12,
        "dim": 128,
        "ffn": 8960,
        "text": 4096,
        "h": 60,
        "w": 104,
        "blocks": 7,
    },
    "toy": {"layers": 2, "heads": 2, "dim": 24, "ffn": 64, "text": 32, "h": 8, "w": 8, "blocks": 2},
}
FRAMES = 3


class PlainProcessor(WanAttnProcessor):
    """Stock attention over a preallocated cache: what a user would write by hand, without any seam."""

    def __init__(self, dense: Callable[[Tensor, Tensor, Tensor], Tensor], cache: SimpleNamespace | None) -> None:
        super().__init__()
        self.dense, self.cache = dense, cache

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(source)), attn.to_v(source)
        q, k, v = (x.unflatten(2, (attn.heads, -1)) for x in (q, k, v))
        if rotary_emb is not None:
            q, k = rotated(q, *rotary_emb), rotated(k, *rotary_emb)
        if self.cache is not None:
            end = self.cache.past + k.shape[1]
            self.cache.k[:, self.cache.past : end], self.cache.v[:, self.cache.past : end] = k, v
            k, v = self.cache.k[:, :end], self.cache.v[:, :end]
        out = self.dense(q, k, v).flatten(2, 3).type_as(q)
        return attn.to_out[1](attn.to_out[0](out))


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    out = torch.empty_like(x)
    out[..., 0::2] = even * cos[..., 0::2] - odd * sin[..., 1::2]
    out[..., 1::2] = even * sin[..., 1::2] + odd * cos[..., 0::2]
    return out


def plain_dense(kernel: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The kernel called for its output alone."""
    if kernel == "fa3":
        from fa3_fwd_interface import flash_attn_func

        return lambda q, k, v: flash_attn_func(q, k, v)
    backend = torch.nn.attention.SDPBackend.CUDNN_ATTENTION

    def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if not q.is_cuda:
            return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        with torch.nn.attention.sdpa_kernel(backend):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    return sdpa


class Bench(Says):
    def __init__(self, shape: dict[str, int], device: str, out: Path, rounds: int, log: str = "seam.jsonl") -> None:
        self.shape, self.device, self.rounds = shape, torch.device(device), rounds
        self.dtype = torch.bfloat16 if device == "cuda" else torch.float32
        self.out = out
        out.mkdir(parents=True, exist_ok=True)
        self.log = (out / log).open("w")
        torch.manual_seed(0)
        with self.device:
            self.model = WanTransformer3DModel(
                num_attention_heads=shape["heads"],
                attention_head_dim=shape["dim"],
                ffn_dim=shape["ffn"],
                num_layers=shape["layers"],
                text_dim=shape["text"],
            )
        kept = set(WanTransformer3DModel._keep_in_fp32_modules)  # as from_pretrained(torch_dtype=...) leaves them
        for name, tensor in self.model.eval().named_parameters():
            if not kept & set(name.split(".")):
                tensor.data = tensor.data.to(self.dtype)
        self.pipe = SimpleNamespace(transformer=self.model, block_causal=True)
        self.latents = [self.randn(1, 16, FRAMES, shape["h"], shape["w"]) for _ in range(2)]
        self.text = self.randn(1, 512, shape["text"])
        self.text[:, 40:] = 0
        self.tokens = FRAMES * shape["h"] * shape["w"] // 4
        self.kernel = resolve("auto", self.device, self.dtype, shape["dim"]).name

    def randn(self, *size: int) -> Tensor:
        return torch.randn(size, device=self.device).to(self.dtype)

    def forward(self, latents: Tensor, t: float) -> Tensor:
        timestep = torch.full((1,), t, device=self.device)
        return self.model(latents, timestep, self.text, return_dict=False)[0]

    def time(self, arms: dict[str, Callable[[], object]], rounds: int | None = None) -> dict[str, float]:
        return medians(arms, rounds or self.rounds, self.device)

    # -- correctness ---------------------------------------------------------------------------------------------

    def check_kernels(self) -> None:
        """Every usable kernel against fp64 on odd shapes, plain and with multiplicities."""
        heads, dim = self.shape["heads"], self.shape["dim"]
        for queries, keys in ((63, 1000), (129, 77), (5, 3)):
            q, k, v = (self.randn(1, n, heads, dim) for n in (queries, keys, keys))
            cut = keys // 3
            entries = Entries(k, v, multiplicity=((cut, 1), (keys - cut, 3)))
            bias = entries.log_weight()
            for weighted in (False, True):
                scores = torch.einsum("bshd,bnhd->bshn", q.double(), k.double()) * dim**-0.5
                scores = scores + bias if weighted else scores
                exact = torch.einsum("bshn,bnhd->bshd", scores.softmax(-1), v.double())
                for name, kernel in KERNELS.items():
                    if kernel.unusable(self.device, self.dtype, dim):
                        continue
                    found = (
                        over_entries(kernel, q, entries, dim**-0.5, None)
                        if weighted
                        else kernel.partial(q, k, v, scale=dim**-0.5)
                    )
                    error = float((found.out.double() - exact).abs().max())
                    lse = float((found.lse.double() - scores.logsumexp(-1)).abs().max())
                    allowed = 2 * torch.finfo(self.dtype).eps * float(v.abs().max()) + 1e-5
                    if not (error <= allowed and lse <= 1e-4):
                        raise SystemExit(
                            f"RED: {name} {queries}x{keys} weighted={weighted}: {error=} {lse=} {allowed=}"
                        )
        self.say(
            "kernels agree with fp64",
            kernels=[n for n, k in KERNELS.items() if not k.unusable(self.device, self.dtype, dim)],
        )

    def check_forward(self, plain: Tensor, seam: Tensor) -> None:
        error = float((plain - seam).float().norm() / plain.float().norm())
        allowed = 2e-2 if self.dtype == torch.bfloat16 else 1e-5
        self.say("seam and plain arm agree", relative_error=error)
        if not error <= allowed:
            raise SystemExit(f"RED: the seam's forward differs from the plain one by {error}")

    # -- measurements --------------------------------------------------------------------------------------------

    def kernels(self) -> None:
        heads, dim, past = self.shape["heads"], self.shape["dim"], self.shape["blocks"] * self.tokens
        q, k, v = (self.randn(1, n, heads, dim) for n in (self.tokens, past, past))
        scale = dim**-0.5
        arms = {"output only, " + self.kernel: lambda: plain_dense(self.kernel)(q, k, v)}
        for name, kernel in KERNELS.items():
            if name != "reference" and kernel.unusable(self.device, self.dtype, dim) is None:
                arms[f"with lse, {name}"] = lambda kernel=kernel: kernel.partial(q, k, v, scale=scale)
        kernel = KERNELS[self.kernel]
        for groups in (2, 4, 8, 16, 32):
            sizes = tuple((past // groups, m + 1) for m in range(groups))
            entries = Entries(k[:, : sum(n for n, _ in sizes)], v[:, : sum(n for n, _ in sizes)], None, sizes)
            arms[f"{groups} multiplicities"] = lambda e=entries: over_entries(kernel, q, e, scale, None)
        parts = [kernel.partial(q, k[:, :64], v[:, :64], scale=scale) for _ in range(2)]
        arms["merge of two partials"] = lambda: merge(parts)
        arms["merge of two partials, written out"] = lambda: merge_eager(parts)
        for name, ms in self.time(arms).items():
            self.say(f"attention {self.tokens} x {past}: {name}", ms=ms)

    def fill_plain(self) -> Callable[[], Tensor]:
        """The plain arm over a cache of the given past; restores the stock processors when its caller is done."""
        room, heads, dim = (self.shape["blocks"] + 1) * self.tokens, self.shape["heads"], self.shape["dim"]
        dense = plain_dense(self.kernel)
        self.stock = [(a, a.processor) for b in self.model.blocks for a in (b.attn1, b.attn2)]
        self.plain = []
        for block in self.model.blocks:
            k, v = (self.randn(1, room, heads, dim) for _ in range(2))
            cache = SimpleNamespace(k=k, v=v, past=0)
            self.plain += [
                (block.attn1, PlainProcessor(dense, cache)),
                (block.attn2, PlainProcessor(dense, None)),
            ]
        rope = self.model.rope

        def frames(start: int) -> Callable[..., tuple[Tensor, Tensor]]:
            def hook(_: object, args: tuple[Tensor], tables: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
                per_frame = tables[0].shape[1] // FRAMES
                moved = []
                for table, angles in zip(tables, (rope.freqs_cos, rope.freqs_sin), strict=True):
                    table = table.clone()
                    rows = angles[start : start + FRAMES, : rope.t_dim].repeat_interleave(per_frame, 0)
                    table[0, :, 0, : rope.t_dim] = rows
                    moved.append(table)
                return tuple(moved)

            return hook

        self.install(self.plain)
        for block in range(self.shape["blocks"]):
            handle = rope.register_forward_hook(frames(block * FRAMES))
            self.forward(self.latents[block % 2], 0.0)
            handle.remove()
            for _, processor in self.plain[::2]:
                processor.cache.past += self.tokens
        self.install(self.stock)
        start = self.shape["blocks"] * FRAMES
        hook = frames(start)

        def arm() -> Tensor:
            self.install(self.plain)
            handle = rope.register_forward_hook(hook)
            found = self.forward(self.latents[0], 500.0)
            handle.remove()
            self.install(self.stock)
            return found

        return arm

    def install(self, processors: list) -> None:
        for attention, processor in processors:
            attention.processor = processor

    def fill_seam(self, accel: Accel, steps: int = 4) -> tuple[object, Callable[[int], Tensor]]:
        """An applied run with the same past, and the forward of the next block at a step."""
        run = accel.apply(self.pipe)
        blocks = self.shape["blocks"]
        run.begin(frames=(blocks + 1) * FRAMES)
        for block in range(blocks):
            with run.at(block=block, start=block * FRAMES, step=steps, steps=steps, phase="clean"):
                self.forward(self.latents[block % 2], 0.0)

        def arm(step: int) -> Tensor:
            with run.at(block=blocks, start=blocks * FRAMES, step=step, steps=steps):
                return self.forward(self.latents[0], 500.0)

        return run, arm

    def overhead(self) -> None:
        """The seam with everything exact beside the plain arm: both patched in and out around every forward."""
        plain = self.fill_plain()
        run, seam = self.fill_seam(Accel())
        patched = [(a, a.processor) for b in self.model.blocks for a in (b.attn1, b.attn2)]
        root, rope = self.model.forward, dict(self.model.rope._forward_hooks)
        bare = root.__wrapped__

        def plain_arm() -> Tensor:
            self.model.forward = bare
            self.model.rope._forward_hooks.clear()
            found = plain()
            self.model.forward = root
            self.model.rope._forward_hooks.update(rope)
            self.install(patched)
            return found

        self.check_forward(plain_arm(), seam(0))
        ms = self.time({"plain": plain_arm, "seam": lambda: seam(0)})
        self.say("forward, exact", plain_ms=ms["plain"], seam_ms=ms["seam"], overhead=ms["seam"] / ms["plain"] - 1)
        run.remove(check=False)
        self.plain = []
        for name, accel in {
            "PadCollapse": Accel(prompt=PadCollapse()),
            "FlashBlock(refresh=3)": Accel(reuse=FlashBlock(refresh=3)),
        }.items():
            run, arm = self.fill_seam(accel)
            ms = self.time({"step 0": lambda arm=arm: arm(0), "step 1": lambda arm=arm: arm(1)})
            self.say(f"forward, {name}", step_0_ms=ms["step 0"], step_1_ms=ms["step 1"])
            run.remove(check=False)

    def compiled(self) -> None:
        """The same forward with the blocks compiled: how many graphs, how fast."""
        run, arm = self.fill_seam(Accel())
        eager = self.time({"eager": lambda: arm(0)})["eager"]
        expected = arm(0)
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        self.model.compile_repeated_blocks(fullgraph=True)
        began = time.perf_counter()
        found = arm(0)
        first = time.perf_counter() - began
        self.check_forward(expected, found)
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        ms = self.time({"compiled": lambda: arm(0)})["compiled"]
        self.say("forward, blocks compiled", eager_ms=eager, compiled_ms=ms, graphs=graphs, first_call_s=first)
        run.remove(check=False)
        run, arm = self.fill_seam(Accel(prompt=PadCollapse(), reuse=FlashBlock(refresh=3)))
        times = self.time({"step 0": lambda: arm(0), "step 1": lambda: arm(1)})
        what = "forward, compiled, PadCollapse and FlashBlock(refresh=3)"
        self.say(what, step_0_ms=times["step 0"], step_1_ms=times["step 1"])
        run.remove(check=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--toy", action="store_true", help="toy size, on the CPU if there is no GPU")
    parser.add_argument("--out", type=Path, default=Path("out/bench"), help="folder for seam.jsonl")
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not options.toy:
        raise SystemExit("the full shape needs a GPU; --toy runs anywhere")
    with torch.no_grad():
        bench = Bench(SHAPES["toy" if options.toy else "wan-1.3b"], device, options.out, options.rounds)
        name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
        bench.say("environment", device=name, torch=torch.__version__, kernel=bench.kernel, tokens=bench.tokens)
        bench.check_kernels()
        bench.overhead()
        bench.kernels()
        bench.compiled()


if __name__ == "__main__":
    main()
