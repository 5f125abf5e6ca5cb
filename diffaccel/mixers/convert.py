"""Put mixers in place of attention layers, teach them what those compute, and put the layers back."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedError
from .mixer import Mixer

Forward = Callable[[], Any]
"""One forward of the model on one batch; where it calls a layer several times, as a pipeline does, the first counts."""


class Replaced(nn.Module):
    """What stands in the model: its mixer, or the layer itself while that is the teacher."""

    def __init__(self, layer: nn.Module, mixer: Mixer) -> None:
        super().__init__()
        given = next(layer.parameters())
        self.wide = torch.promote_types(given.dtype, torch.float32)  # what it learns and computes in
        self.teacher, self.mixer, self.taught = layer, mixer.to(given.device, self.wide).eval(), False
        self.seen: list[tuple[Tensor, Any, Tensor]] = []  # input, rotary tables and output of the teacher

    @property
    def processor(self) -> Mixer:
        """What runs in place of a stock processor, by which `Accel` refuses the layer."""
        return self.mixer

    def forward(self, *args: Any, **given: Any) -> Any:
        """As the layer is called by diffusers (hidden states, prompt, mask, tables) or transformers (by name)."""
        x = args[0] if args else given["hidden_states"]
        pos = args[3] if len(args) > 3 else given.get("position_embeddings", given.get("rotary_emb"))
        if (args[1] if len(args) > 1 else given.get("encoder_hidden_states")) is not None:
            raise UnsupportedError("a mixer replaces self-attention, and this layer reads a prompt: name another layer")
        if given.get("past_key_values") is not None:
            raise UnsupportedError("a mixer keeps a state and no keys: call the model with use_cache=False")
        named = "hidden_states" in given
        if self.taught:
            out = self.teacher(*args, **given)
            self.seen.append((x, pos, out[0] if named else out))
            return out
        out = self.student(x, pos).to(x.dtype)
        return (out, None) if named else out

    def student(self, x: Tensor, pos: Any) -> Tensor:
        """What the mixer answers, in fp32 or wider."""
        out: Tensor = self.mixer(x.to(self.wide), None, pos)[0]
        return out


@contextmanager
def convert(
    model: nn.Module, layers: Sequence[str], make: Callable[[nn.Module], Mixer]
) -> Iterator[dict[str, Replaced]]:
    """Replace attention layers of `model`; leaving puts the layers back as they were.

    Args:
        layers: names in `model.named_modules()`, such as "blocks.3.attn1" or "model.layers.0.self_attn".
        make: the mixer for a layer, such as `Based` or `partial(Based, block=8)`.

    Raises:
        UnsupportedError: a name of no layer, or a layer that is no attention mixers know.
    """
    known = dict(model.named_modules())
    if missing := [name for name in layers if name not in known]:
        raise UnsupportedError(f"{type(model).__name__} has no layer {', '.join(missing)}; see model.named_modules()")
    made = {name: Replaced(known[name], make(known[name])) for name in layers}
    try:
        for name, put in made.items():
            _set(model, name, put)
        yield made
    finally:
        for name, put in made.items():
            _set(model, name, put.teacher)


def _set(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, module)


def observe(replaced: dict[str, Replaced], forward: Forward) -> dict[str, tuple[Tensor, Any, Tensor]]:
    """What the layers are given and answer in one forward of the model as it was: (x, pos, output) of each."""
    for put in replaced.values():
        put.taught, put.seen = True, []
    try:
        with torch.no_grad():
            forward()
        return {name: put.seen[0] for name, put in replaced.items()}
    finally:
        for put in replaced.values():
            put.taught, put.seen = False, []


def error(found: Tensor, wanted: Tensor) -> Tensor:
    """Mean square of the difference over that of `wanted`."""
    return (found - wanted).square().mean() / wanted.square().mean()


@torch.no_grad()
def errors(replaced: dict[str, Replaced], data: Iterable[Forward]) -> dict[str, float]:
    """The relative error of each layer's output, given the teacher's own input, the mean over `data`."""
    rows: dict[str, list[float]] = {name: [] for name in replaced}
    for forward in data:
        for name, (x, pos, wanted) in observe(replaced, forward).items():
            rows[name].append(float(error(replaced[name].student(x, pos), wanted)))
    return {name: sum(row) / len(row) for name, row in rows.items()}


def distil(replaced: dict[str, Replaced], data: Iterable[Forward], lr: float = 1e-3) -> list[float]:
    """Teach every mixer its layer's output on the layer's own input, one step of Adam a batch of `data`.

    Returns the loss of every step: the sum over layers of the relative error and the mixer's `penalty`.
    """
    parameters = [p for put in replaced.values() for p in put.mixer.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=lr)
    losses = []
    for forward in data:
        loss = torch.zeros(())
        for name, (x, pos, wanted) in observe(replaced, forward).items():
            mixer = replaced[name].mixer.train()
            found = replaced[name].student(x, pos)
            loss = loss.to(found) + error(found, wanted) + mixer.penalty()
            mixer.eval()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses
