"""One model on several devices, tokens split between them and heads in self-attention: two processes, one video."""

import gc
import os
import pathlib
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig, WanPipeline
from test_graphed import launching
from test_policies import PROMPTS
from tiny import tiny_components, tiny_pipeline, tiny_transformer

from diffaccel import Accel, AnnCA, AnnSA, FlashBlock, PadCollapse, SinkRecent, TempCache, TokenSelect
from diffaccel.errors import UnsupportedError
from diffaccel.joint import Text
from diffaccel.pipelines import FreeSwimPipeline, graphed, share_heads
from diffaccel.spread import Spread

ARMS = {
    "dense": Accel(),
    "a window": Accel(cache=SinkRecent(3, 1), prompt=PadCollapse()),
    "merged and reused": Accel(
        cache=TempCache(0.3, budget="9 frames", heads="per_head"), reuse=FlashBlock(refresh=2, min_past=0)
    ),
    "chosen": Accel(selection=AnnSA(0.5, dense_steps=0, min_past=0)),
}
REPEATS = Accel(cache=SinkRecent(3, 1), reuse=FlashBlock(refresh=(0,), min_past=0))
SETTINGS = {"height": 64, "width": 64, "num_frames": 45, "num_inference_steps": 3, "output_type": "latent"}


def made(pipe, accel, **given):
    given = {**SETTINGS, "guidance_scale": 3.0, **given}
    with accel(pipe) as run:
        frames = pipe(PROMPTS[0], generator=torch.Generator().manual_seed(0), **given).frames
    return frames.cpu(), run.report(), run.replayed


def enlarged(pipe):
    """Windows, and passes over the whole frame on a smaller grid."""
    runs = []
    frames = FreeSwimPipeline(pipe, native=(32, 32), tile=(1, 1))(
        PROMPTS[0], height=64, width=64, num_frames=9, num_inference_steps=4, guidance_scale=2.0,
        generator=torch.Generator().manual_seed(0), output_type="latent", on_run=runs.append,
    ).frames  # fmt: skip
    return frames.cpu(), {slot: (c.engaged, c.keys_read) for slot, c in runs[0].report().slots.items()}


def at_once():
    pipe = WanPipeline(**tiny_components())
    pipe.set_progress_bar_config(disable=True)
    return pipe


# -- what each of two processes does -----------------------------------------------------------------------------------


def join():
    """Meet the other process; gives the device of this one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    else:
        torch.accelerator.device_count = lambda: 2  # diffusers divides by it, which has nothing to split on a CPU
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    return device


def leave(folder, found):
    gc.collect()  # graphs go before the group that they exchange in
    torch.save(found, f"{folder}/{os.environ['RANK']}.pt")
    dist.destroy_process_group()


def exchanges(pipe, patch):
    """How often everybody sent to everybody in one layer of one forward."""
    count, own = [0], dist.all_to_all_single

    def counted(*args, **kwargs):
        count[0] += 1
        return own(*args, **kwargs)

    with patch.context() as patched:
        patched.setattr(dist, "all_to_all_single", counted)
        _, report, _ = made(pipe, Accel())
    return count[0] / sum(row.calls for row in report.layers if row.part == "self")


def replays(pipe, patch, device):
    """Forwards that are replayed, and again where one process finds what a graph read to lie elsewhere."""
    if device == "cpu":
        launching(patch)
    found, own, calls = [made(pipe, REPEATS, num_frames=65, graphs=True)], graphed.replay.key, [0]

    def moved(*args):
        calls[0] += 1
        key = own(*args)
        return (key, "elsewhere") if calls[0] == 34 and dist.get_rank() == 0 else key

    patch.setattr(graphed.replay, "key", moved)
    found.append(made(pipe, REPEATS, num_frames=65, graphs=True))
    return [(frames, replayed) for frames, _, replayed in found]


def worker(folder):
    device, patch = join(), pytest.MonkeyPatch()
    pipe = tiny_pipeline().to(device)
    pipe.transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
    found = {}
    for name, accel in ARMS.items():
        frames, report, _ = made(pipe, accel)
        cache = report.blocks[-1]["bytes"]
        found[name] = (frames, cache, {slot: counts.engaged for slot, counts in report.slots.items()})
    found["exchanges"] = exchanges(pipe, patch)
    found["replayed"] = replays(pipe, patch, device)
    patch.undo()
    stock = at_once().to(device)
    share_heads(stock)
    found["enlarged"] = [enlarged(pipe), enlarged(stock)]
    if dist.get_rank() == 0:  # alone it decodes, where there are two GPUs on the other one
        pipe.vae.to("cuda:1" if device == "cuda" else "cpu")
        found["pixels"] = made(pipe, Accel(), num_frames=9, output_type="pt")[0]
    else:
        made(pipe, Accel(), num_frames=9)
    leave(folder, found)


def together(folder, module="test_spread", gpus=""):
    """What the `worker` of a module found in each of two processes, which see these GPUs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    here = pathlib.Path(__file__).parent
    started = []
    for rank in ("0", "1"):
        given = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command = [sys.executable, "-c", f"import {module}; {module}.worker({str(folder)!r})"]
        environment = {**os.environ, **given, "CUDA_VISIBLE_DEVICES": gpus}
        started.append(subprocess.Popen(command, env=environment, cwd=here))
    assert [process.wait(timeout=300) for process in started] == [0, 0]
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


# -- against one process -----------------------------------------------------------------------------------------------


def check(ranks, device="cpu"):
    pipe = tiny_pipeline().to(device)
    for name, accel in ARMS.items():
        frames, report, _ = made(pipe, accel)
        for found, held, engaged in (rank[name] for rank in ranks):
            torch.testing.assert_close(found, frames, atol=2e-4, rtol=0)
            assert 0.4 < held / report.blocks[-1]["bytes"] < 0.6
            assert engaged == {slot: counts.engaged for slot, counts in report.slots.items()}


def check_enlarged(ranks, device="cpu"):
    for number, pipe in enumerate((tiny_pipeline(), at_once())):
        frames, counts = enlarged(pipe.to(device))
        assert all(engaged for engaged, _ in counts.values())
        for found, counted in (rank["enlarged"][number] for rank in ranks):
            torch.testing.assert_close(found, frames, atol=2e-4, rtol=0)
            assert counted == counts


def check_replayed(ranks, device="cpu"):
    expected, _, _ = made(tiny_pipeline().to(device), REPEATS, num_frames=65)
    [(same, moved), (again, moved_again)] = (rank["replayed"] for rank in ranks)
    for frames, _ in (same, moved, again, moved_again):
        torch.testing.assert_close(frames, expected, atol=2e-4, rtol=0)
    assert same[1] == again[1] > 8
    assert moved[1] == moved_again[1] == same[1] - 1


def check_pixels(ranks, device="cpu"):
    expected, _, _ = made(tiny_pipeline().to(device), Accel(), num_frames=9, output_type="pt")
    torch.testing.assert_close(ranks[0]["pixels"], expected, atol=2e-4, rtol=0)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return together(tmp_path_factory.mktemp("ranks"))


def test_two_processes_make_the_video_of_one_and_hold_half_each(ranks):
    check(ranks)


def test_windows_and_passes_on_a_smaller_grid_are_shared(ranks):
    check_enlarged(ranks)


def test_processes_replay_the_same_forwards_also_where_one_could_not(ranks):
    check_replayed(ranks)


def test_one_process_may_decode_alone(ranks):
    check_pixels(ranks)


def test_an_attention_takes_two_exchanges(ranks):
    assert [rank["exchanges"] for rank in ranks] == [2, 2]


@pytest.mark.gpu
def test_two_gpus_make_the_video_of_one(tmp_path):
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    ranks = together(tmp_path, gpus="0,1")
    for look in (check, check_enlarged, check_replayed, check_pixels):
        look(ranks, "cuda")
    assert [rank["exchanges"] for rank in ranks] == [2, 2]


# -- what is refused ---------------------------------------------------------------------------------------------------


def shared(**changes):
    return ContextParallelConfig(**{"ulysses_degree": 2, **changes})


@pytest.mark.parametrize(
    ("accel", "message"),
    [
        (Accel(cache=TempCache(0.9)), "set cache.heads='per_head'"),
        (Accel(cache=TempCache(0.9, variant="paper", heads="per_head")), "set cache.variant='phase'"),
        (Accel(prompt=AnnCA()), "AnnCA chooses by all queries"),
        (Accel(selection=AnnSA(0.5, groups="prompt")), "groups='prompt' goes by all queries"),
        (Accel(selection=TokenSelect()), "all heads vote together, of which each has a share"),
    ],
)
def test_what_would_see_a_share_is_refused(accel, message):
    with pytest.raises(UnsupportedError, match=f"each of several devices holds some heads .*{message}"):
        Spread.of(shared(), accel)


def test_other_ways_to_split_are_refused():
    for config in (ContextParallelConfig(ring_degree=2), shared(ulysses_anything=True)):
        with pytest.raises(UnsupportedError, match=r"goes by heads here, ContextParallelConfig\(ulysses_degree=N\)"):
            Spread.of(SimpleNamespace(context_parallel_config=config), Accel())
    assert Spread.of(None, Accel()) is None


@pytest.mark.parametrize(
    ("heads", "tokens", "words", "what"),
    [(3, 8, 4, "3 heads"), (4, 9, 4, "9 tokens of a forward"), (4, 8, 5, "5 tokens of a prompt")],
)
def test_what_does_not_divide_is_refused(heads, tokens, words, what):
    text = Text(words, (words,))
    with pytest.raises(UnsupportedError, match=f"{what} cannot be shared by 2 devices: choose"):
        Spread(None, 2, 0).check(heads, tokens, text)
    if words == 5:
        Spread(None, 2, 0, whole_text=True).check(heads, tokens, text)


def test_devices_that_come_in_the_middle_of_a_run_are_refused():
    pipe = SimpleNamespace(transformer=tiny_transformer())
    with Accel()(pipe):
        pipe.transformer._parallel_config = SimpleNamespace(context_parallel_config=shared())
        with pytest.raises(UnsupportedError, match="while it was accelerated"):
            pipe.transformer(None, None, None)


def test_graphs_are_refused_where_the_host_carries_what_is_exchanged(monkeypatch):
    model = SimpleNamespace(device=torch.device("cuda"), modules=list)
    assert graphed.unfit(model) is None
    model._parallel_config = SimpleNamespace(context_parallel_config=shared())
    model._parallel_config.context_parallel_config._ulysses_mesh = SimpleNamespace(get_group=lambda: None)
    for config in ("cuda:nccl", "cpu:gloo,cuda:nccl"):
        monkeypatch.setattr(dist, "get_backend_config", lambda group, config=config: config)
        assert graphed.unfit(model) is None
    monkeypatch.setattr(dist, "get_backend_config", lambda group: "cpu:gloo,cuda:gloo")
    assert graphed.unfit(model) == (
        "these are of a model that is shared over cpu:gloo,cuda:gloo, not cuda:nccl; leave graphs out"
    )
