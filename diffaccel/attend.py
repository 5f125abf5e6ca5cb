"""The seam: every attention of an accelerated model goes through `attend`.

    reuse      is it needed at this step?        no: the stored partial
    cache      what is kept of earlier blocks?   keys, values, positions, multiplicities
    window     where may it look?                positions only
    selection  what is worth reading there?      content
    kernel     (out, lse) of what is left
    merge      the parts, exactly

A backbone (`diffaccel.pipelines.backbones`) brings a model's attention here; axis letters are in `shapes.py`.
"""

from collections.abc import Sequence

from torch import Tensor

from .cache import Reader, Tier
from .kernel import Partial, merge
from .run import Run
from .site import Site


def attend(q_BSHD: Tensor, k_BNHD: Tensor, v_BNHD: Tensor, site: Site, run: Run) -> Tensor:
    """Attention of one call, (B, S, H, D); keys come rotated, from this call's own tokens or from the prompt."""
    call = run.open(site, q_BSHD)  # decides what is read of a tier, runs the kernel, counts

    def read(tiers: Sequence[Tier], q: Tensor = q_BSHD, reader: Reader = call.read) -> Partial:
        return merge([tier.partial(q, reader) for tier in tiers if tier.count])

    if site.part == "cross":
        out = run.crossed(site, lambda: read([run.prompt(q_BSHD, k_BNHD, v_BNHD, site)]).out)
    elif (text := site.text) is not None:  # only video chooses, and only among video: text is read by all and reads all
        (q, q_text), (k, k_text), (v, v_text) = map(text.split, (q_BSHD, k_BNHD, v_BNHD))
        tiers = [run.whole(k, v, site), text.tier(k_text, v_text)]
        out = text.join(read(tiers, q).out, read(tiers, q_text, call.read_all).out)
    elif not run.causal:
        out = read([run.whole(k_BNHD, v_BNHD, site)]).out
    else:
        memory = run.memory(site)
        memory.place(k_BNHD, v_BNHD, site, q_BSHD)
        answer = run.reuse_answer(site, memory)
        if answer == "together":
            out = read(memory.past_and_block()).out
        else:
            inside = read([memory.block()])
            outside = run.outside(answer, site, memory, call, lambda reader: read(memory.past(), reader=reader))
            run.saw(site, outside, inside)
            out = merge([outside, inside]).out
    run.close(call, keys=k_BNHD.shape[1])
    return out
