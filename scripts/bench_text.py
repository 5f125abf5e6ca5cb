"""Time a denoising step of a block-diffusion language model, by how much text lies before the block at work.

    python scripts/bench_text.py --past 512 2048 8192                                # two CPU cores
    python scripts/bench_text.py --shape 8b --past 2048 8192 32768 --batch 1 8 --json text.json    # a GPU

Random weights. Arms: the whole text forwarded (what diffusers' LLaDA2Pipeline does), the cache of finished blocks with
everything read together, the outside computed apart and stored, reused with nothing dirty or dirty rows dropped, and
reused with one row recomputed. No arm has a token changed but by hand, so each is one forward of its kind.
"""

import argparse
import json
import platform
from pathlib import Path
from typing import Any

import torch
from timing import medians
from transformers import LlamaConfig, LlamaForCausalLM

from diffaccel.pipelines.block_lm import BlockLM, TokenCount

SHAPES: dict[str, dict[str, int]] = {
    "small": {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 6, "num_attention_heads": 4},
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
}


def step(lm: LlamaForCausalLM, ids: torch.Tensor, block: int, answer: str) -> Any:
    """A call that forwards one denoising step of its kind."""
    reuse = {"stored": TokenCount(tau=2), "dropped": TokenCount(tau=block + 1, dirty="drop")}
    reuse["recomputed"] = TokenCount(tau=block + 1)
    model = BlockLM(lm, block, reuse=reuse.get(answer), cache=answer != "uncached")
    model(ids)
    changed, other = ids.clone(), ids.clone()
    changed[:, -1] = (ids[:, -1] + 1) % 512
    other[:, -block:] = (ids[:, -block:] + 1) % 512
    turn = [ids, other] if answer == "stored" else [changed]

    def call() -> None:
        model(turn[0])
        turn.reverse()  # all of the block changes, so that the outside is computed anew

    return call


def main() -> None:
    """Parse the command line, time, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=tuple(SHAPES), default="small")
    parser.add_argument("--past", type=int, nargs="+", default=[512, 2048, 8192], help="tokens before the block")
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--block", type=int, default=8)
    parser.add_argument("--uncached", type=int, default=4096, help="tokens up to which that arm is timed as well")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    cuda = torch.cuda.is_available()
    device, dtype = torch.device("cuda" if cuda else "cpu"), torch.bfloat16 if cuda else torch.float32
    torch.manual_seed(0)
    with torch.device(device):
        config = LlamaConfig(vocab_size=512, max_position_embeddings=1 << 17, **SHAPES[args.shape])
        lm = LlamaForCausalLM(config).to(dtype).eval()
    name = torch.cuda.get_device_name() if cuda else f"{platform.machine()} cpu, {torch.get_num_threads()} threads"
    print(f"{name}, {dtype}, torch {torch.__version__}, shape {args.shape}, block {args.block}; ms a step")
    rows = []
    for batch in args.batch:
        for past in args.past:
            ids = torch.randint(512, (batch, past // args.block * args.block + args.block), device=device)
            kinds = ["cached", "stored", "dropped", "recomputed"]
            with torch.no_grad():
                found = medians({kind: step(lm, ids, args.block, kind) for kind in kinds}, args.rounds, device)
                if batch * past <= args.uncached:  # the uncached arm alone would take most of the time
                    found |= medians({"uncached": step(lm, ids, args.block, "uncached")}, 3, device)
            rows.append({"batch": batch, "past": past, **found})
            line = ", ".join(f"{kind} {ms:.2f}" for kind, ms in found.items())
            print(f"batch {batch} past {past}: {line}", flush=True)
    if args.json:
        content = {"device": name, "dtype": str(dtype), "torch": torch.__version__, "shape": args.shape, "rows": rows}
        args.json.write_text(json.dumps({**content, "block": args.block}, indent=2) + "\n")


if __name__ == "__main__":
    main()
