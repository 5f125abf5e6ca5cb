"""One model on several devices, tokens split between them and heads in self-attention: two processes, one video."""

import os
import pathlib
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from diffusers import ContextParallelConfig
from test_policies import PROMPTS
from tiny import tiny_pipeline

from diffaccel import Accel, AnnCA, AnnSA, FlashBlock, PadCollapse, SinkRecent, TempCache
from diffaccel.errors import UnsupportedError
from diffaccel.spread import Spread

ARMS = {
    "dense": Accel(),
    "a window": Accel(cache=SinkRecent(3, 1), prompt=PadCollapse()),
    "merged and reused": Accel(
        cache=TempCache(0.3, budget="9 frames", heads="per_head"), reuse=FlashBlock(refresh=2, min_past=0)
    ),
    "chosen": Accel(selection=AnnSA(0.5, dense_steps=0, min_past=0)),
}
SETTINGS = {"height": 64, "width": 64, "num_frames": 45, "num_inference_steps": 3, "output_type": "latent"}


def made(pipe, accel):
    with accel(pipe) as run:
        frames = pipe(PROMPTS[0], generator=torch.Generator().manual_seed(0), guidance_scale=3.0, **SETTINGS).frames
    return frames, run.report()


def worker(folder):
    """What each of two processes does: the videos that both should make, and what a device held."""
    device = "cuda" if torch.cuda.device_count() > 1 else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    else:
        torch.accelerator.device_count = lambda: 2  # diffusers divides by it, which has nothing to split on a CPU
    torch.distributed.init_process_group("nccl" if device == "cuda" else "gloo")
    pipe = tiny_pipeline().to(device)
    pipe.transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
    found = {}
    for name, accel in ARMS.items():
        frames, report = made(pipe, accel)
        cache = report.blocks[-1]["bytes"]
        found[name] = (frames.cpu(), cache, {slot: counts.engaged for slot, counts in report.slots.items()})
    torch.save(found, f"{folder}/{os.environ['RANK']}.pt")
    torch.distributed.destroy_process_group()


def together(folder):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    here = pathlib.Path(__file__).parent
    started = []
    for rank in ("0", "1"):
        given = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command = [sys.executable, "-c", f"import test_spread; test_spread.worker({str(folder)!r})"]
        started.append(subprocess.Popen(command, env={**os.environ, **given}, cwd=here))
    assert [process.wait(timeout=300) for process in started] == [0, 0]
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


def check(folder):
    pipe = tiny_pipeline()
    if torch.cuda.device_count() > 1:
        pipe.to("cuda")
    ranks = together(folder)
    for name, accel in ARMS.items():
        frames, report = made(pipe, accel)
        for found, held, engaged in (rank[name] for rank in ranks):
            torch.testing.assert_close(found, frames.cpu(), atol=2e-4, rtol=0)
            assert 0.4 < held / report.blocks[-1]["bytes"] < 0.6
            assert engaged == {slot: counts.engaged for slot, counts in report.slots.items()}


def test_two_processes_make_the_video_of_one_and_hold_half_each(tmp_path):
    check(tmp_path)


@pytest.mark.gpu
def test_two_gpus_make_the_video_of_one(tmp_path):
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    check(tmp_path)


def shared(**changes):
    return ContextParallelConfig(**{"ulysses_degree": 2, **changes})


@pytest.mark.parametrize(
    ("accel", "message"),
    [
        (Accel(cache=TempCache(0.9)), "set cache.heads='per_head'"),
        (Accel(cache=TempCache(0.9, variant="paper", heads="per_head")), "set cache.variant='phase'"),
        (Accel(prompt=AnnCA()), "AnnCA chooses by all queries"),
        (Accel(selection=AnnSA(0.5, groups="prompt")), "groups='prompt' goes by all queries"),
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


@pytest.mark.parametrize(("heads", "tokens", "what"), [(3, 8, "3 heads"), (4, 9, "9 tokens of a forward")])
def test_what_does_not_divide_is_refused(heads, tokens, what):
    with pytest.raises(UnsupportedError, match=f"{what} cannot be shared by 2 devices: choose"):
        Spread(None, 2, 0).check(heads, tokens)
