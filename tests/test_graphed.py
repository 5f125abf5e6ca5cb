"""Forwards that repeat are replayed: the same video, the same counts, and nothing replayed that does not repeat."""

import gc
from dataclasses import replace

import pytest
import torch
from test_policies import PROMPTS
from tiny import tiny_pipeline
from torch.nn.functional import pad

from diffaccel import Accel, AnnCA, AnnSA, FlashBlock, InwardWindow, PadCollapse, SinkRecent, TempCache
from diffaccel.cache import merged
from diffaccel.errors import UnsupportedError
from diffaccel.kernel import KERNELS, Partial, weighted
from diffaccel.pipelines import graphed

FLASH = FlashBlock(refresh=(0,), min_past=0)
SETTINGS = {"height": 64, "width": 64, "num_frames": 65, "num_inference_steps": 4, "output_type": "latent"}
FORWARDS = 5
REPEAT = {  # all forwards of a block, 4 steps and the clean pass, once 3 of 6 blocks are past
    "merged": Accel(cache=TempCache(0.3, budget="9 frames")),
    "merged and reused": Accel(cache=TempCache(0.3, budget="9 frames"), reuse=FLASH),
    "sink and recent": Accel(cache=SinkRecent(3, 1)),
    "all": Accel(cache=SinkRecent(3, 1), reuse=FLASH, prompt=PadCollapse()),
}
ALONE = {
    "dense": Accel(),
    "merged entries, head by head": Accel(cache=TempCache(0.3, heads="per_head")),
    "merged entries in 8 bits": Accel(cache=TempCache(0.3, bits=8)),
    "extrapolated": Accel(reuse=FlashBlock(refresh=(0, 2), min_past=0, extrapolate=0.5), cache=SinkRecent(3, 1)),
    "selected": Accel(selection=AnnSA(0.3, dense_steps=0, min_past=0)),
    "windows": Accel(window=InwardWindow((2, 2))),
    "prompt tokens chosen block by block": Accel(prompt=AnnCA(bits=4, tables=1), cache=SinkRecent(3, 1)),
}


def made(pipe, accel, timing=False, **given):
    generator = torch.Generator().manual_seed(0)
    with accel(pipe, timing=timing) as run:
        given = {**SETTINGS, "guidance_scale": 1.0, **given}
        frames = pipe(PROMPTS[0], generator=generator, **given).frames
    return frames, run.report()


def slots(report):
    return {
        slot: (c.calls, c.skipped, c.keys_total, c.keys_read, c.keys_kept, c.engaged)
        for slot, c in report.slots.items()
    } | {(row.layer, row.part): replace(row, seconds=None) for row in report.layers}


def in_place(q, room, scale):
    """What FlashAttention-3 does on a GPU."""
    n = int(room.used)
    wide = KERNELS["reference"].partial(
        pad(q, (0, weighted.CHANNELS), value=1.0), room.k[:, :n], room.v[:, :n], scale=scale
    )
    return Partial(wide.out[..., : q.shape[-1]], wide.lse)


@pytest.fixture
def launched(monkeypatch):
    return launching(monkeypatch)


def launching(monkeypatch):
    """On the CPU: a recorded forward is run again, with nothing counted. Gives the objects that were made."""
    held = []

    class Launched(graphed.GraphedForwards):
        def __init__(self, model, run):
            super().__init__(model, run)
            held.append(self)

        def _record(self, forward):
            mine = self.run.tables
            out = forward()

            def launch():
                with graphed.replay.recording(self.run):
                    where, tables = self.run._where, self.run.tables
                    self.run.tables = mine
                    out.copy_(forward())
                    self.run._where, self.run.tables = where, tables

            return launch, out

    monkeypatch.setattr(graphed, "unfit", lambda model: None)
    monkeypatch.setattr(merged, "can_in_place", lambda device, dtype, dim: True)
    monkeypatch.setattr(weighted, "in_place", in_place)
    monkeypatch.setattr("diffaccel.pipelines.causal_wan.GraphedForwards", Launched)
    return held


@pytest.mark.parametrize("name", REPEAT)
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_what_repeats_is_replayed_and_counted_alike(name, guidance, launched):
    accel, pipe = REPEAT[name], tiny_pipeline()
    expected, usual = made(pipe, accel, guidance_scale=guidance)
    found, report = made(pipe, accel, guidance_scale=guidance, graphs=True)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert slots(report) == slots(usual)
    [forwards] = launched
    branches = 1 if guidance == 1 else 2
    kinds = 1 if accel.reuse is None else 3  # the past is read, read and stored, or what was stored is reused
    assert forwards.captured == kinds * branches
    assert forwards.run.replayed == (3 * FORWARDS - 1) * branches  # the last block has no clean pass
    assert not forwards.run.still
    assert report.kernel == f"{usual.kernel}; {forwards.run.replayed} forwards replayed"


@pytest.mark.parametrize("name", ALONE)
def test_what_stands_alone_is_run(name, launched):
    pipe = tiny_pipeline()
    expected, usual = made(pipe, ALONE[name])
    found, report = made(pipe, ALONE[name], graphs=True)
    assert torch.equal(found, expected)
    assert slots(report) == slots(usual)
    assert launched[0].captured == 0


def test_a_clean_pass_whose_queries_are_kept_is_run(launched):
    _, _ = made(tiny_pipeline(), Accel(cache=TempCache(0.3, variant="paper", budget="9 frames")), graphs=True)
    assert launched[0].run.replayed == 3 * (FORWARDS - 1)


def test_merged_entries_are_read_as_usual_by_a_kernel_that_was_asked_for(launched):
    accel = replace(REPEAT["merged"], kernel="sdpa")
    _, report = made(tiny_pipeline(), accel, graphs=True)
    assert launched[0].captured == 0
    assert "merged" not in report.kernel


def test_nothing_is_captured_while_calls_are_timed_on_a_gpu(launched):
    _, _ = made(tiny_pipeline(), REPEAT["merged and reused"], timing=True, graphs=True)
    assert launched[0].captured == 0


def test_a_prompt_that_changes_is_read(launched):
    def stream(graphs):
        pipe = tiny_pipeline()
        with Accel(cache=SinkRecent(3, 1))(pipe):
            chunks = pipe.stream(
                PROMPTS[0], generator=torch.Generator().manual_seed(0), guidance_scale=1.0, graphs=graphs, **SETTINGS
            )
            found = [next(chunks) for _ in range(4)]
            chunks.change_prompt(PROMPTS[1])
            return torch.cat([*found, *chunks], 2)

    torch.testing.assert_close(stream(True), stream(False), atol=1e-5, rtol=0)


def test_a_model_on_the_cpu_is_refused():
    with pytest.raises(UnsupportedError, match="that stay on a GPU, and these are on cpu"):
        made(tiny_pipeline(), Accel(), graphs=True)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what torch.compile imports
@pytest.mark.parametrize("name", REPEAT)
@pytest.mark.parametrize("compiled", [False, True])
def test_a_graph_is_the_forward_that_it_stands_for(name, compiled):
    accel = REPEAT[name]
    pipe = tiny_pipeline().to("cuda", torch.bfloat16)
    pipe.vae.to(torch.float32)
    if compiled:
        torch._dynamo.reset()
        pipe.transformer.compile_repeated_blocks(fullgraph=True)
    expected, usual = made(pipe, accel)
    held = []
    init = graphed.GraphedForwards.__init__

    def noted(self, model, run):
        init(self, model, run)
        held.append(self)

    graphed.GraphedForwards.__init__ = noted
    try:
        found, report = made(pipe, accel, graphs=True)
    finally:
        graphed.GraphedForwards.__init__ = init
    torch.testing.assert_close(found, expected, atol=0.05, rtol=0.05)
    assert slots(report) == slots(usual)
    assert held[0].run.replayed >= 2 * FORWARDS


@pytest.mark.gpu
def test_graphs_of_an_earlier_run_are_not_freed_in_the_middle_of_a_capture(monkeypatch):
    """In a cycle they wait for the collector, which here comes whenever an attention runs."""
    pipe = tiny_pipeline().to("cuda", torch.bfloat16)
    pipe.vae.to(torch.float32)
    made(pipe, REPEAT["merged"], graphs=True)
    held = []
    init = graphed.GraphedForwards.__init__

    def cyclic(self, model, run):
        init(self, model, run)
        self.itself = self
        held.append(None)

    monkeypatch.setattr(graphed.GraphedForwards, "__init__", cyclic)
    thresholds = gc.get_threshold()
    gc.set_threshold(1, 1, 1)
    try:
        for _ in range(2):
            made(pipe, REPEAT["merged"], graphs=True)
    finally:
        gc.set_threshold(*thresholds)
    assert len(held) == 2
    assert gc.isenabled()


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")  # it does not see every wait
@pytest.mark.parametrize("name", REPEAT)
@pytest.mark.parametrize("graphs", [False, True])
def test_the_host_waits_for_nothing_while_a_block_is_denoised(name, graphs, monkeypatch):
    """Once blocks repeat; a commit may read how many entries there are."""
    pipe = tiny_pipeline(sampler="few_step").to("cuda", torch.bfloat16)
    pipe.vae.to(torch.float32)
    denoise, watched = type(pipe)._denoise_block, []

    def watching(self, rollout, run, index, *rest):
        if index < 4:
            return denoise(self, rollout, run, index, *rest)
        watched.append(index)
        try:
            torch.cuda.set_sync_debug_mode("error")
            return denoise(self, rollout, run, index, *rest)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(type(pipe), "_denoise_block", watching)
    made(pipe, REPEAT[name], graphs=graphs, num_inference_steps=4)
    assert watched == [4, 5]
