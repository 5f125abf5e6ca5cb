"""What entering and leaving `with accel(pipe)` costs: every family at its class's own size, which is a published one.

    python scripts/bench_patch.py               # any machine, a minute; no memory for weights is needed
    python scripts/bench_patch.py --rounds 50

Models lie on the meta device. Patching exchanges the attention processors of all layers and puts one hook on the root,
restoring gives them back; neither looks at weights. Least and median milliseconds.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from families import FAMILIES, Family  # noqa: E402

from diffaccel import Accel, FlashBlock, PadCollapse, TempCache  # noqa: E402
from diffaccel.backbone import find  # noqa: E402

EVERYWHERE = Accel(cache=TempCache(), reuse=FlashBlock(), prompt=PadCollapse())


def published(family: Family) -> Any:
    """As much of a pipeline as patching looks at, around a model of the size that its class has by default."""
    kind = type(family.pipe().transformer)
    with torch.device("meta"):
        model = kind()
    return SimpleNamespace(transformer=model, block_causal=family.causal)


def asked(family: Family) -> Accel:
    """Techniques in several slots, where a family takes these."""
    return EVERYWHERE if family.causal and family.takes_prompt else Accel()


def measure(pipe: Any, accel: Accel, rounds: int) -> tuple[list[float], list[float]]:
    """Milliseconds of patching and of restoring, each round's."""
    find(pipe)  # imports what it needs once a process
    patch, restore = [], []
    for _ in range(rounds):
        began = time.perf_counter()
        run = accel.apply(pipe)
        patched = time.perf_counter()
        run.remove(check=False)
        restore.append(1e3 * (time.perf_counter() - patched))
        patch.append(1e3 * (patched - began))
    return patch, restore


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    print("| family | layers | patch, least / median | restore, least / median |\n|---|---|---|---|")
    for family in FAMILIES:
        pipe = published(family)
        layers = find(pipe)[0].geometry(pipe.transformer).layers
        found = measure(pipe, asked(family), options.rounds)
        patch, restore = (f"{min(times):.1f} / {statistics.median(times):.1f} ms" for times in found)
        print(f"| {family.name} | {layers} | {patch} | {restore} |", flush=True)


if __name__ == "__main__":
    main()
