"""SANA's attention is linear: its pipelines are known and refused, in one sentence that says why."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import SanaTransformer2DModel, SanaWMTransformer3DModel
from families import REFUSED, sana_video
from test_families import state

from diffaccel import Accel, AnnSA, FlashBlock, InwardWindow, PadCollapse, TempCache, UnsupportedError

SMALL = {"num_attention_heads": 2, "num_layers": 1, "in_channels": 4}
LINEAR = r"its {} has linear attention{}, which sums over all keys once .* nothing to choose, to keep or to reuse"
MODELS = {
    "SanaVideoTransformer3DModel": (sana_video, ""),
    "SanaTransformer2DModel": (
        lambda: SanaTransformer2DModel(
            **SMALL, attention_head_dim=8, num_cross_attention_heads=2, cross_attention_head_dim=8,
            cross_attention_dim=16, caption_channels=8,
        ),
        "",
    ),
    "SanaWMTransformer3DModel": (
        lambda: SanaWMTransformer3DModel(**SMALL, hidden_size=32, linear_head_dim=16, caption_channels=8),
        " in all but every 4th layer, which has no processor to exchange",
    ),
}  # fmt: skip


@pytest.mark.parametrize("model", MODELS)
def test_what_was_recognised_and_what_is_missing(model):
    make, where = MODELS[model]
    pipe = SimpleNamespace(transformer=make())
    before = state(pipe)
    with pytest.raises(
        UnsupportedError, match="SimpleNamespace is known and not accelerated: " + LINEAR.format(model, where)
    ):
        Accel().apply(pipe)
    for policy in (TempCache(), AnnSA(), PadCollapse(), FlashBlock(), InwardWindow()):
        asked = f"{type(policy).__name__} \\(slot {policy.slot}\\) cannot run on SimpleNamespace: "
        with pytest.raises(UnsupportedError, match=asked + LINEAR.format(model, where)):
            Accel(**{policy.slot: policy}).apply(pipe)
    assert state(pipe) == before
    [row] = Accel().describe(pipe)
    assert row["backbone"] == model
    assert all("linear attention" in why for why in row["refuses"].values())


def test_a_refused_pipeline_runs_as_before():
    [family] = REFUSED
    pipe = family.pipe()
    stock = family.generate(pipe, steps=1)
    with pytest.raises(UnsupportedError), Accel()(pipe):
        pass
    assert torch.equal(family.generate(pipe, steps=1), stock)
