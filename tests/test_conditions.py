"""A condition of its own for every block: exactly what a run is that knew them all, whenever they were asked for."""

import copy
from types import MappingProxyType

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanAttnProcessor, WanTransformer3DModel
from test_causal_wan import (
    HEIGHT,
    OTHER,
    PROMPT,
    SETTINGS,
    TOKENS,
    WIDTH,
    distance,
    euler_sigmas,
    first_noise,
    full_forward,
    generate,
    oracle,
    pixels,
    seed,
    texts,
)
from test_graphed import launched  # noqa: F401
from test_rolling import ROLLING, W
from test_rolling import oracle as rolling_oracle
from tiny import CHANNELS, tiny_pipeline, tiny_transformer

from diffaccel import Accel, AnnCA, FlashBlock, PadCollapse, SinkRecent, TempCache
from diffaccel.errors import KnobError, UnsupportedError
from diffaccel.pipelines import block_ranges
from diffaccel.pipelines.streaming import encode

SIZES, BUTTONS = [1, 3, 3], 5


class World(WanTransformer3DModel):
    """A world model: latents are shifted by what was pressed in each frame, (B, n, BUTTONS)."""

    everything = None  # of all frames, for a forward that is given none

    def forward(self, hidden_states, timestep, encoder_hidden_states, actions=None, **given):
        pressed = self.everything[:, : hidden_states.shape[2]] if actions is None else actions
        shift = self.buttons(pressed).transpose(1, 2)[..., None, None]
        return super().forward(hidden_states + shift, timestep, encoder_hidden_states, **given)


def world():
    torch.manual_seed(7)
    model = tiny_transformer()
    model.__class__ = World
    model.buttons = torch.nn.Linear(BUTTONS, CHANNELS)
    return model


def pressed(frames=7, rows=1):
    return torch.randn(rows, frames, BUTTONS, generator=seed(11))


def by_block(actions, sizes=SIZES):
    return [{"actions": part} for part in actions.split(sizes, 1)]


@pytest.fixture
def pipe():
    return tiny_pipeline()


@pytest.fixture
def player():
    pipe = tiny_pipeline()
    pipe.register_modules(transformer=world())
    return pipe


class OwnPrompt(WanAttnProcessor):
    """Cross-attention in which each token sees the prompt of its own frame, among several put together."""

    def __init__(self, prompt_of_frame, prompts):
        super().__init__()
        wanted = torch.tensor(prompt_of_frame).repeat_interleave(TOKENS)
        self.mask = wanted[:, None] == torch.arange(prompts).repeat_interleave(8)[None]

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        return super().__call__(
            attn, hidden_states, encoder_hidden_states, self.mask[: hidden_states.shape[1]], rotary_emb
        )


def with_own_prompts(transformer, prompt_of_frame, prompts):
    model = copy.deepcopy(transformer)
    for block in model.blocks:
        block.attn2.processor = OwnPrompt(prompt_of_frame, prompts)
    return model


# -- actions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_actions_of_every_block_are_those_of_one_forward_over_all(player, guidance):
    actions, asked = pressed(), []

    def condition(block, start, pipe):
        asked.append((block, start, pipe is player))
        return {"actions": actions[:, start : start + SIZES[block]]}

    found = generate(player, condition=condition, negative_prompt=OTHER, guidance_scale=guidance)
    model = copy.deepcopy(player.transformer)
    model.everything = actions
    words = texts(player, PROMPT, OTHER)[: 1 if guidance == 1 else 2]
    expected = oracle(model, first_noise(), words, SIZES, euler_sigmas(3, 3.0), guidance)
    assert distance(found, expected) <= 1e-5
    assert asked == [(0, 0, True), (1, 1, True), (2, 4, True)]
    model.everything = actions.roll(1, 1)
    other = oracle(model, first_noise(), words, SIZES, euler_sigmas(3, 3.0), guidance)
    assert distance(found, other) > 1e-2  # the oracle can tell


def test_a_list_or_an_iterator_stands_for_a_function(player):
    entries = by_block(pressed())
    found = generate(player, condition=entries)
    assert torch.equal(generate(player, condition=iter(entries)), found)
    assert torch.equal(generate(player, condition=lambda block, start, pipe: entries[block]), found)


def test_blocks_of_given_frames_are_asked_for(player):
    actions, video, sizes = pressed(), pixels(5), [2, 2, 3]
    found = generate(player, condition=by_block(actions, sizes), video=video, guidance_scale=1.0)
    with torch.no_grad():
        condition = encode(player.vae, video.permute(1, 0, 2, 3)[None] * 2 - 1)
    model = copy.deepcopy(player.transformer)
    model.everything = actions
    start = torch.cat([condition, first_noise()[:, :, 2:]], dim=2)
    expected = oracle(model, start, texts(player, PROMPT), sizes, euler_sigmas(3, 3.0), 1.0, given=1)
    assert distance(found, expected) <= 1e-5


def test_a_block_without_a_condition_is_under_the_one_before(player):
    entries = by_block(pressed())
    entries = [entries[0], {"actions": entries[1]["actions"]}, None]
    same = [*entries[:2], entries[1]]
    assert torch.equal(generate(player, condition=entries), generate(player, condition=same))
    assert distance(generate(player, condition=entries), generate(player, condition=by_block(pressed()))) > 1e-2


@pytest.mark.parametrize("overlap", [False, True])
def test_a_condition_may_depend_on_the_frames_given_out(player, overlap):
    settings, shown, given, out = {**SETTINGS, "num_frames": 49, "output_type": "np"}, [], [], []

    def condition(block, start, pipe):
        out.append(len(shown))
        level = float(shown[-1].mean()) if shown else 0.0
        frames = block_ranges(0, 13, 3)[block]
        given.append({"actions": torch.full((1, len(frames), BUTTONS), level)})
        return given[-1]

    for chunk in player.stream(PROMPT, generator=seed(), condition=condition, overlap=overlap, **settings):
        shown.append(chunk)
    assert out == [max(0, block - overlap) for block in range(5)]
    known = list(player.stream(PROMPT, generator=seed(), condition=given, **settings))
    assert all((a == b).all() for a, b in zip(shown, known, strict=True))
    assert len({float(entry["actions"].mean()) for entry in given}) > 2


def test_a_replayed_forward_sees_the_actions_of_its_own_block(player, launched):  # noqa: F811
    sizes = [3] * 7
    accel, given = Accel(cache=SinkRecent(3, 1)), {"num_frames": 81, "guidance_scale": 1.0}
    entries = by_block(pressed(21), sizes)
    with accel(player):
        expected = generate(player, condition=entries, **given)
    with accel(player) as run:
        found = generate(player, condition=entries, graphs=True, **given)
    assert run.replayed > 8
    assert torch.equal(torch.cat([entry["actions"] for entry in entries], 1), pressed(21))  # the player's own tensors
    assert distance(found, expected) <= 1e-5


def test_arguments_no_graph_can_hold_are_run(player, launched):  # noqa: F811
    """Nothing says when such a thing changes."""
    entries = [
        entry | {"attention_kwargs": MappingProxyType({"scale": 1.0})} for entry in by_block(pressed(21), [3] * 7)
    ]
    with Accel(cache=SinkRecent(3, 1))(player) as run:
        generate(player, condition=entries, num_frames=81, guidance_scale=1.0, graphs=True)
    assert run.replayed == 0


@pytest.mark.gpu
def test_actions_are_inputs_of_a_captured_graph(player):
    player.to("cuda")
    accel, given = Accel(cache=SinkRecent(3, 1)), {"num_frames": 81, "guidance_scale": 1.0}
    entries = [{"actions": entry["actions"].cuda()} for entry in by_block(pressed(21), [3] * 7)]
    with accel(player):
        expected = generate(player, condition=entries, **given)
    with accel(player) as run:
        found = generate(player, condition=entries, graphs=True, **given)
    assert run.replayed > 8
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)


# -- prompts ------------------------------------------------------------------------------------------------------


def test_a_prompt_for_every_block_is_cross_attention_to_its_own(pipe):
    prompts = [PROMPT, OTHER, "a green circle"]
    entries = [{"prompt": prompt} for prompt in prompts]
    found = generate(pipe, condition=entries, negative_prompt="a red square", guidance_scale=3.0)
    model = with_own_prompts(pipe.transformer, [0, 1, 1, 1, 2, 2, 2], 3)
    [none] = texts(pipe, "a red square")
    words = [torch.cat([texts(pipe, prompt)[0] for prompt in prompts], 1), none.repeat(1, 3, 1)]
    expected = oracle(model, first_noise(), words, SIZES, euler_sigmas(3, 3.0), 3.0)
    assert distance(found, expected) <= 1e-5
    embeds = [{"prompt_embeds": texts(pipe, prompt)[0]} for prompt in prompts]
    again = generate(pipe, condition=embeds, negative_prompt="a red square", guidance_scale=3.0)
    assert torch.equal(again, found)
    assert distance(generate(pipe, negative_prompt="a red square", guidance_scale=3.0), found) > 1e-3


def test_a_prompt_that_stays_is_read_once(pipe, monkeypatch):
    encoded, encode_prompt, negative = [], pipe.encode_prompt, []
    monkeypatch.setattr(pipe, "encode_prompt", lambda *a, **k: encoded.append(a[0]) or encode_prompt(*a, **k))
    found = generate(
        pipe,
        condition=[{"prompt": PROMPT}, {"prompt": OTHER}, {"prompt": OTHER}],
        callback_on_chunk_end=lambda p, b, n, tensors: negative.append(tensors["negative_prompt_embeds"]),
    )
    assert encoded == [PROMPT, OTHER]
    assert negative[0] is negative[1] is negative[2]  # so that nothing made of it is made anew
    assert torch.equal(found, generate(pipe, condition=[None, {"prompt": OTHER}, {}]))


def test_the_negative_prompt_can_change_too(pipe):
    plain = generate(pipe, negative_prompt=OTHER)
    changed = generate(pipe, negative_prompt=OTHER, condition=[None, None, {"negative_prompt": "a green square"}])
    assert torch.equal(changed[:, :, :4], plain[:, :, :4])
    assert distance(changed[:, :, 4:], plain[:, :, 4:]) > 1e-3


@pytest.mark.parametrize("rolling", [False, True])
def test_recomputing_takes_every_block_under_its_own_actions_and_the_new_prompt(player, pipe, rolling):
    entries = [{}] * 5 if rolling else by_block(pressed(13), [1, 3, 3, 3, 3])
    pipe, given = (pipe, ROLLING | {"frames_per_block": 3}) if rolling else (player, {})
    changed = [entry | {"prompt": PROMPT if block < 3 else OTHER} for block, entry in enumerate(entries)]
    settings = {"guidance_scale": 1.0, "num_frames": 49, **given}
    found = generate(pipe, condition=changed, on_prompt_change="recompute", **settings)
    kept = generate(pipe, condition=changed, **settings)
    if not rolling:
        everything_new = generate(pipe, OTHER, condition=entries, history=found, **settings)
        assert torch.equal(found[:, :, 7:], everything_new[:, :, 7:])
    same = {0: 7, 1: 1}[rolling]  # the first frames made before the change
    assert torch.equal(found[:, :, :same], kept[:, :, :same])
    assert distance(found[:, :, 7:], kept[:, :, 7:]) > 1e-5


def test_flushing_leaves_the_last_block(pipe):
    held = []

    def note(pipeline, step, t, tensors):
        held.append(max(memory.count for memory in run._memories.values()) // TOKENS)
        return {}

    with Accel()(pipe) as run:
        condition = [None, None, {"prompt": OTHER}, None]
        generate(pipe, num_frames=37, condition=condition, on_prompt_change="flush", callback_on_step_end=note)
    assert held[:: SETTINGS["num_inference_steps"]] == [0, 1, 3, 6]


TECHNIQUES = {
    "FlashBlock": Accel(reuse=FlashBlock(refresh=3, min_past=0)),
    "AnnCA": Accel(prompt=AnnCA(bits=4, tables=1)),
    "TempCache": Accel(cache=TempCache(0.3)),
    "together": Accel(cache=TempCache(0.3), reuse=FlashBlock(refresh=3, min_past=0), prompt=AnnCA(bits=4, tables=1)),
}


@pytest.mark.parametrize("name", TECHNIQUES)
def test_techniques_keep_nothing_of_the_prompt_before(player, name):
    """Once all is recomputed, the rest is what a run under the new prompt makes of the same past."""
    actions, settings = by_block(pressed(13), [1, 3, 3, 3, 3]), {"num_frames": 49, "guidance_scale": 1.0}
    mixed = [entry | {"prompt": PROMPT if block < 2 else OTHER} for block, entry in enumerate(actions)]
    with TECHNIQUES[name](player) as run:
        found = generate(player, condition=mixed, on_prompt_change="recompute", **settings)
        new = generate(player, OTHER, condition=actions, history=found, **settings)
        old = generate(player, condition=actions, history=found, **settings)
    assert all(slot.engaged for slot in run.report().slots.values())
    # AnnCA goes by the queries at hand, which are those of the clean pass where a block is recomputed
    assert distance(found[:, :, 4:], new[:, :, 4:]) <= (0.02 if TECHNIQUES[name].prompt else 0)
    assert distance(found[:, :, 4:], old[:, :, 4:]) > 0.2


def test_prompt_tokens_are_chosen_anew_when_the_prompt_changes_in_a_block(pipe, monkeypatch):
    chosen, choose = [], AnnCA._kept
    monkeypatch.setattr(AnnCA, "_kept", lambda self, q, prompt: chosen.append(q.shape[1]) or choose(self, q, prompt))
    with Accel(prompt=AnnCA(bits=4, tables=1))(pipe):
        stream = pipe.stream(PROMPT, generator=seed(), **SETTINGS | {"guidance_scale": 1.0})
        next(stream)
        stream.change_prompt(OTHER)  # as many tokens; the first block is committed under it
        list(stream)
    layers = pipe.transformer.config.num_layers
    assert chosen == [TOKENS] * 2 * layers + [3 * TOKENS] * 2 * layers


EXACT = {
    "FlashBlock": Accel(reuse=FlashBlock(refresh=1)),
    "AnnCA": Accel(prompt=AnnCA(bits=0)),
    "PadCollapse": Accel(prompt=PadCollapse()),
    "TempCache": Accel(cache=TempCache(threshold=None)),
}


@pytest.mark.parametrize("name", EXACT)
def test_exact_settings_are_dense_under_changing_conditions(player, name):
    entries = [entry | {"prompt": p} for entry, p in zip(by_block(pressed()), [PROMPT, OTHER, "a"], strict=True)]
    dense = generate(player, condition=entries)
    with EXACT[name](player):
        assert distance(generate(player, condition=entries), dense) <= 1e-5


# -- in a rolling window ------------------------------------------------------------------------------------------


def test_in_a_rolling_window_the_prompt_of_the_newest_block_holds_for_all(pipe):
    prompts, asked = [PROMPT, PROMPT, OTHER, OTHER, "a green circle", OTHER], []
    shown, sizes = [], [1, *[2] * 5]

    def condition(block, start, pipe):
        asked.append((block, start, len(shown)))
        return {"prompt": prompts[block]}

    settings = {**SETTINGS, **ROLLING, "num_frames": 41}
    for chunk in pipe.stream(PROMPT, generator=seed(), condition=condition, **settings):
        shown.append(chunk)
    assert asked == [(b, frames.start, max(0, b - W + 1)) for b, frames in enumerate(block_ranges(0, 11, 2))]
    kinds = list(dict.fromkeys(prompts))
    words = torch.cat([texts(pipe, prompt)[0] for prompt in kinds], 1)

    def under(turn):
        return kinds.index(prompts[min(turn, len(prompts) - 1)])

    def forward(x, at, text, group, turn):
        # a clean block was committed under what held when it was finished
        of_frame = [under(turn if s else b + W - 1) for s, b in zip(at, group, strict=True)]
        return full_forward(with_own_prompts(pipe.transformer, of_frame, len(kinds)), x, at, text, group)

    expected, _ = rolling_oracle(pipe, seed(), [words], sizes, forward=forward)
    assert distance(torch.cat(shown, 2), expected) <= 2e-5


def test_arguments_of_one_block_have_no_place_in_a_rolling_window(player):
    with pytest.raises(UnsupportedError, match="so actions of one block has no place there"):
        generate(player, condition=by_block(pressed(), [1, 2, 2, 2]), **ROLLING)


# -- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("condition", "says"),
    [
        ([{}, {}], "an entry for each of the 3 blocks, those of given frames included, got 2; pass None"),
        (iter([{}, {}]), "it ended after 2; pass None for a block"),
        ([{}, "left", {}], "a dict or None, got str for block 1"),
        ([{}, {}, {"action": 1}], "prompt_embeds, encoder_hidden_states_image, attention_kwargs, got action$"),
        ([{}, {}, {"timestep": 1}], "got timestep"),
        ([{}, {"prompt": [PROMPT, OTHER]}, {}], "1 prompts goes on with as many, got 2"),
        ([{"prompt": " "}, {}, {}], "may not be empty"),
    ],
    ids=["too few", "ends", "no dict", "unknown", "ours", "more prompts", "empty"],
)
def test_a_condition_that_breaks_a_rule_is_refused(pipe, condition, says):
    with pytest.raises(KnobError, match=says):
        generate(pipe, condition=condition)
    assert generate(pipe).shape == (1, CHANNELS, 7, HEIGHT // 8, WIDTH // 8)
