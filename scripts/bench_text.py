"""Time a block of a block-diffusion language model, by how much text lies before it and how many rows a batch has.

    python scripts/bench_text.py --past 512 2048 8192                                          # two CPU cores
    python scripts/bench_text.py --shape 8b --past 4096 32768 131072 --batch 1 4 16 --out DIR  # a GPU

Random weights, and random keys as the past. A block is forwarded once a step, `--unmask` tokens change after each, and
its first step also forwards the block before, as in a text. Arms: the cache of finished blocks alone, whose steps are
launched one by one or (on a GPU) replayed as CUDA graphs, and attention to the past reused until tau tokens changed.
Reused steps are compared with the exact ones first, in the one case where both must agree: nothing changed.
Sampling is not part of it.
"""

import argparse
import json
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from timing import medians
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from diffaccel.pipelines.block_lm import BlockLM, TokenCount

SHAPES: dict[str, dict[str, int]] = {
    "small": {
        "vocab_size": 512,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 64,
    },
    "8b": {
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
}


class Bench:
    """One model over one past. The arms differ in how a step is answered, and share cache and graphs."""

    def __init__(self, lm: Qwen3ForCausalLM, block: int, batch: int, past: int, unmask: int, taus: list[int]) -> None:
        self.block, self.unmask, self.taus = block, unmask, taus
        self.model = BlockLM(lm, block, reuse=TokenCount(tau=2))
        self.model.check()
        self.graphs = self.model.no_graphs is None
        start = past // block * block
        self.ids = torch.randint(2, lm.config.vocab_size, (batch, start + block), device=lm.device)
        self.ids[:, start:] = 0  # masked
        self._fill(start)

    def _fill(self, start: int) -> None:
        """Random keys: to forward the past would take most of the time."""
        config, progress = self.model.lm.config, self.model._progress
        batch, length = self.ids.shape
        sizes = (batch, config.num_key_value_heads, length + self.block, config.head_dim)
        for layer in range(config.num_hidden_layers):
            key, value = (torch.randn(sizes, device=self.ids.device, dtype=self.model.dtype) for _ in range(2))
            progress.cache.update(key, value, layer)
        progress.cache.crop(start - sizes[2])
        valid = torch.ones_like(self.ids, dtype=torch.bool)
        positions = torch.arange(length, device=self.ids.device).expand(batch, -1)
        progress.seen = tuple(part[:, :start].clone() for part in (self.ids, valid, positions))

    def write(self, reuse: TokenCount | None, replayed: bool) -> list[Tensor]:
        """Logits of every step of the block."""
        self.model.reuse, self.model.no_graphs = reuse, None if replayed else "launched one by one"
        start = self.ids.shape[1] - self.block
        self.ids[:, start - 1] ^= 1  # the block before is forwarded again
        self.ids[:, start:] = 0
        found = []
        for done in range(0, self.block, self.unmask):
            found.append(self.model(self.ids).logits)
            self.ids[:, start + done : start + done + self.unmask] = 1
        return found

    def arms(self) -> dict[str, Callable[[], object]]:
        def arm(reuse: TokenCount | None, replayed: bool) -> Callable[[], object]:
            return lambda: self.write(reuse, replayed)

        found = {"exact, launched": arm(None, False)}
        if self.graphs:
            found["exact"] = arm(None, True)
        for tau in self.taus:
            found[f"tau {tau}"] = arm(TokenCount(tau=tau), self.graphs)
        return found

    def check(self) -> None:
        """Raise unless steps that reuse, and steps that are replayed, give the logits of launched exact ones."""
        still = self.ids.clone()
        ways = [(None, False), *[(None, True)] * self.graphs]
        ways += [(TokenCount(tau=2), way) for way in ([True] if self.graphs else [False])]
        found = []
        for reuse, replayed in ways:
            self.model.reuse, self.model.no_graphs = reuse, None if replayed else "launched one by one"
            still[:, -self.block - 1] ^= 1
            self.model(still)
            still[:, -self.block - 1] ^= 1
            self.model(still)  # of a block before that is what it was
            found.append(self.model(still).logits.float())
        three = self.ids[:1, -3 * self.block :]
        allowed = 4 * self.model._noise(three, self.model._uncached(three))  # random layers amplify rounding
        for (reuse, replayed), logits in zip(ways[1:], found[1:], strict=True):
            error = float((logits - found[0]).square().mean().sqrt() / found[0].square().mean().sqrt())
            if not error <= allowed:
                raise SystemExit(f"RED: {reuse}, replayed={replayed}: off by {error:.2g} of {allowed:.2g}")


def main() -> None:
    """Parse the command line, time, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=tuple(SHAPES), default="small")
    parser.add_argument("--past", type=int, nargs="+", default=[512, 2048, 8192], help="tokens before the block, a row")
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--block", type=int, nargs="+", default=[8])
    parser.add_argument("--unmask", type=int, default=1, help="tokens that change a step")
    parser.add_argument("--tau", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--most", type=int, default=600_000, help="leave out pasts of more tokens over the batch")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, help="folder for text.jsonl")
    args = parser.parse_args()
    cuda = torch.cuda.is_available()
    device, dtype = torch.device("cuda" if cuda else "cpu"), torch.bfloat16 if cuda else torch.float32
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    with torch.device(device):
        lm = Qwen3ForCausalLM(Qwen3Config(max_position_embeddings=1 << 18, **SHAPES[args.shape])).eval()
    for layer in lm.model.layers:  # else random layers amplify rounding until the check of the results means nothing
        for part in (layer.self_attn.o_proj, layer.mlp.down_proj):
            part.weight.data.mul_((2 * len(lm.model.layers)) ** -0.5)
    torch.set_default_dtype(torch.float32)
    name = torch.cuda.get_device_name() if cuda else f"{platform.machine()} cpu, {torch.get_num_threads()} threads"
    where: dict[str, Any] = {"device": name, "dtype": str(dtype), "torch": torch.__version__, "shape": args.shape}
    print(f"{name}, {dtype}, torch {torch.__version__}, shape {args.shape}; ms a step (speed-up over exact), tokens/s")
    log = None
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        log = (args.out / "text.jsonl").open("a")
    for block in args.block:
        for batch in args.batch:
            for past in args.past:
                if batch * past > args.most:
                    continue
                with torch.no_grad():
                    bench = Bench(lm, block, batch, past, args.unmask, args.tau)
                    bench.check()
                    times = medians(bench.arms(), args.rounds, device)
                exact, steps = times.get("exact", times["exact, launched"]), -(-block // args.unmask)
                parts = [
                    f"{arm} {ms / steps:.2f} ({exact / ms:.2f}x, {1e3 * batch * block / ms:.0f}/s)"
                    for arm, ms in times.items()
                ]
                print(f"block {block} batch {batch} past {past}: {', '.join(parts)}", flush=True)
                if not bench.graphs:
                    print(f"  no graphs: {bench.model._find_no_graphs()}")
                if log:
                    row = {**where, "block": block, "batch": batch, "past": past, "unmask": args.unmask, "ms": times}
                    log.write(json.dumps(row) + "\n")
                    log.flush()
                del bench


if __name__ == "__main__":
    main()
