"""Settings to start from. Presets are plain functions that return an `Accel`; change one with `dataclasses.replace`.

    from diffaccel.pipelines.presets import balanced

    with balanced()(pipe) as run:
        frames = pipe("a large red circle moves left").frames

`balanced` and `fast` use what earlier chunks leave behind, so they need a block-causal pipeline; a bidirectional one
refuses them with the reason, and takes `exact`.
"""

from collections.abc import Callable

from diffaccel.accel import Accel
from diffaccel.techniques import FlashBlock, PadCollapse, TempCache


def exact() -> Accel:
    """Nothing is approximated: the padding of the prompt, whose keys and values are all alike, is read as one key with
    its multiplicity. Equal to dense attention up to rounding; saves cross-attention time when prompts are short."""
    return Accel(prompt=PadCollapse())


def balanced() -> Accel:
    """Small visible change for a smaller cache and less attention: keys of older frames that hardly changed are merged,
    and attention to them is computed at every second denoising step once the past is twice as long as a block. The
    newest block and the pass that writes the cache stay exact. Trades fine detail of long videos; their beginning is
    as dense."""
    return Accel(prompt=PadCollapse(), cache=TempCache(threshold=0.95), reuse=FlashBlock(refresh=2))


def fast() -> Accel:
    """As `balanced`, merging more and recomputing less: every third step. Trades more: moving objects may take another
    path than in the dense video while the scene stays the one of the prompt."""
    return Accel(prompt=PadCollapse(), cache=TempCache(threshold=0.9), reuse=FlashBlock(refresh=3))


PRESETS: dict[str, Callable[[], Accel]] = {"exact": exact, "balanced": balanced, "fast": fast}
"""Every preset by the name the command line uses."""
