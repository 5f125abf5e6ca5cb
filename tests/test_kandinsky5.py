"""Kandinsky 5: what holds for every family is in `test_families.py`."""

import pytest
import torch
from families import GRID, VIDEO, kandinsky, kandinsky5, noise
from tiny import CHANNELS

from diffaccel import Accel, AnnSA, FullFieldGuide, InwardWindow, PadCollapse, UnsupportedError


def as_pipe(model):
    return type("Pipe", (), {"transformer": model})


def given(branch=0, **more):
    latents = {"hidden_states": noise(1, *VIDEO[1:], CHANNELS), "timestep": torch.tensor([500.0])}
    return latents | kandinsky(1, branch) | more


def test_branches_are_told_apart_where_the_prompt_is_cast_anew_at_every_step(monkeypatch):
    seen, plan = [], InwardWindow.plan
    monkeypatch.setattr(InwardWindow, "plan", lambda *args: seen.append(args[-1].branch) or plan(*args))
    model, branches = kandinsky5(), [given(0), given(1)]
    with Accel(window=InwardWindow((3, 3)))(as_pipe(model)), torch.no_grad():
        for _ in range(3):
            for branch in branches:
                model(**branch | {"encoder_hidden_states": branch["encoder_hidden_states"].clone()})
    first, second = seen[0], seen[2]
    assert first != second
    assert seen == [first, first, second, second] * 3


def test_a_pass_on_a_smaller_grid_is_a_video_of_that_size(monkeypatch):
    model, seen = kandinsky5(), []
    rope = model.visual_rope_embeddings.forward
    monkeypatch.setattr(model.visual_rope_embeddings, "forward", lambda *args: seen.append(args) or rope(*args))
    window = InwardWindow((GRID.height // 2, GRID.width // 2))
    with Accel(window=window, reuse=FullFieldGuide(shrink=2))(as_pipe(model)), torch.no_grad():
        model(**given())
    shapes = [tuple(shape) for shape, *_ in seen]
    assert shapes == [(1, GRID.frames, GRID.height // 2, GRID.width // 2), (1, GRID.frames, GRID.height, GRID.width)]
    assert [place.tolist() for place in seen[0][1]] == [list(range(side)) for side in shapes[0][1:]]


def test_image_to_video_reads_latents_with_a_mask_beside_them():
    model = kandinsky5(visual_cond=True)
    wide = {"hidden_states": noise(1, *VIDEO[1:], 2 * CHANNELS + 1)}
    with torch.no_grad():
        stock = model(**given(**wide)).sample
        with Accel(selection=AnnSA(density=1))(as_pipe(model)):
            torch.testing.assert_close(model(**given(**wide)).sample, stock, atol=2e-5, rtol=0)


def test_the_blocks_of_the_prompt_are_left_alone():
    model = kandinsky5()
    inside = [block.self_attention.processor for block in model.text_transformer_blocks]
    with Accel()(as_pipe(model)):
        assert [block.self_attention.processor for block in model.text_transformer_blocks] == inside


def test_what_it_cannot_take_is_refused():
    with pytest.raises(UnsupportedError, match=r"selects keys itself \(attention_type='nabla'\)"):
        Accel().apply(as_pipe(kandinsky5(attention_type="nabla")))
    with pytest.raises(UnsupportedError, match="its prompt attends to itself"):
        Accel(prompt=PadCollapse()).apply(as_pipe(kandinsky5()))
    model = kandinsky5()
    with Accel()(as_pipe(model)), pytest.raises(UnsupportedError, match="leave sparse_params out"):
        model(**given(sparse_params={"to_fractal": False}))
