"""What holds for every technique, alone and composed, in whole generations of a small causal pipeline."""

import gc
import itertools
import weakref
from functools import cache

import pytest
import torch
from matrix import MATRIX
from tiny import tiny_pipeline

from diffaccel import Accel, KnobError
from diffaccel.accel import active_run
from diffaccel.cache.scored import Scored
from diffaccel.profile import ProfileError
from diffaccel.selection.ranked import Choosing, Ranked
from diffaccel.techniques import TECHNIQUES

PROMPTS = ["a red circle moves left", "a blue square moves right up"]
ids = [f"{i}-{row.name}" for i, row in enumerate(MATRIX)]
every = pytest.mark.parametrize("row", MATRIX, ids=ids)
lossy = pytest.mark.parametrize("row", [row for row in MATRIX if row.lossy], ids=lambda row: row.name)


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


def generate(pipe, accel, prompts=PROMPTS, seeds=(0, 1), guidance=2.0, **changes):
    settings = {"height": 32, "width": 48, "num_frames": 33, "num_inference_steps": 4, "output_type": "latent"}
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    with accel(pipe) as run:
        frames = pipe(
            list(prompts) or None, generator=generators, guidance_scale=guidance, **(settings | changes)
        ).frames
    return frames, run


@pytest.fixture
def no_collector():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.fixture(scope="module")
def dense(pipe):
    """The dense video of so many steps."""
    return cache(lambda steps: generate(pipe, Accel(), num_inference_steps=steps)[0])


def of(pipe, row, accel, **changes):
    return generate(pipe, accel, num_inference_steps=row.steps, **changes)


def test_every_technique_is_in_the_matrix():
    rows = {type(policy) for row in MATRIX for policy in row.exact.policies().values()}
    assert rows == set(TECHNIQUES)


@every
def test_exact_setting_is_dense_attention(pipe, dense, row):
    found, run = of(pipe, row, row.exact)
    assert all(policy.is_exact for policy in row.exact.policies().values())
    assert all(slot.engaged for slot in run.report().slots.values())
    if row.bits:
        assert torch.equal(found, dense(row.steps))
    else:
        torch.testing.assert_close(found, dense(row.steps), atol=1e-4, rtol=0)


@lossy
def test_lossy_setting_is_finite_different_and_counted_and_leaves_nothing_in_memory(pipe, dense, row, no_collector):
    held = weakref.WeakSet()

    def note(pipe, block, blocks, tensors):
        for memory in active_run(pipe).all_memories():
            held.update([memory, *memory.older])

    found, run = of(pipe, row, row.lossy, callback_on_chunk_end=note)
    assert not held  # freed where it is let go, and not when Python finds a cycle
    assert torch.isfinite(found).all()
    assert (found - dense(row.steps)).abs().max() > 1e-4
    for slot, counts in run.report().slots.items():
        assert counts.engaged
        assert 0 < counts.keys_read < counts.keys_total + row.reads_all, slot
        assert counts.keys_read <= counts.keys_kept <= counts.keys_total, slot


@every
def test_leaving_restores_bit_for_bit(pipe, dense, row):
    processors = [a.processor for b in pipe.transformer.blocks for a in (b.attn1, b.attn2)]
    attributes = set(vars(pipe.transformer))
    hooks = len(pipe.transformer.rope._forward_hooks)
    of(pipe, row, row.lossy or row.exact)
    assert [a.processor for b in pipe.transformer.blocks for a in (b.attn1, b.attn2)] == processors
    assert set(vars(pipe.transformer)) == attributes
    assert len(pipe.transformer.rope._forward_hooks) == hooks
    assert torch.equal(of(pipe, row, Accel())[0], dense(row.steps))


@lossy
def test_same_seed_same_bits_and_runs_share_nothing(pipe, row):
    first, run = of(pipe, row, row.lossy)
    of(pipe, row, row.lossy, seeds=(5, 6))
    again, other = of(pipe, row, row.lossy)
    assert torch.equal(first, again)
    assert run.report().slots == other.report().slots


@lossy
def test_a_batch_row_equals_the_row_alone(pipe, row):
    both, _ = of(pipe, row, row.lossy)
    for index in range(2):
        alone, _ = of(pipe, row, row.lossy, prompts=[PROMPTS[index]], seeds=(index,))
        torch.testing.assert_close(alone[0], both[index], atol=1e-4, rtol=0)


@lossy
def test_guidance_branches_are_isolated(pipe, row):
    """With a guidance scale of 1 + tiny the unconditional branch must not leak into the conditional one."""
    conditional, _ = of(pipe, row, row.lossy, guidance=1.0)
    guided, _ = of(pipe, row, row.lossy, guidance=1.0 + 1e-7)
    torch.testing.assert_close(guided, conditional, atol=1e-4, rtol=0)


@lossy
def test_two_generations_in_one_run_do_not_mix(pipe, row):
    alone, _ = of(pipe, row, row.lossy)
    with row.lossy(pipe):
        size = {"height": 32, "width": 48, "num_frames": 33}
        settings = size | {"num_inference_steps": row.steps, "output_type": "latent"}
        for seeds in ((7, 8), (0, 1)):
            generators = [torch.Generator().manual_seed(seed) for seed in seeds]
            last = pipe(PROMPTS, generator=generators, guidance_scale=2.0, **settings).frames
    assert torch.equal(last, alone)


@pytest.mark.parametrize("technique", TECHNIQUES, ids=lambda t: t.__name__)
def test_every_technique_says_what_it_is(technique):
    assert technique.slot in {"cache", "selection", "prompt", "reuse", "window"}
    assert technique.paper
    assert technique.summary
    assert all(item.metadata["help"] for item in technique.knobs().values())
    assert set(technique.exact) <= set(technique.knobs())
    assert technique(**technique.exact).is_exact


BAD = [
    ("TempCache", {"threshold": 1.5}, r"threshold is a similarity in \[0, 1\].*threshold=1.5"),
    ("TempCache", {"match": "cel"}, r"unknown TempCache.match 'cel'.*did you mean 'cell'"),
    ("TempCache", {"sink_frames": -1}, "sink_frames=-1"),
    ("TempCache", {"recent_frames": -2}, "recent_frames=-2"),
    ("TempCache", {"threshold": (0.9, 1.5)}, r"threshold=\(0.9, 1.5\)"),
    ("TempCache", {"variant": "phse"}, "did you mean 'phase'"),
    ("TempCache", {"representative": "first"}, "choose one of mean, last, medoid"),
    ("TempCache", {"max_multiplicity": 0}, "max_multiplicity=0"),
    ("TempCache", {"heads": "each"}, "choose one of shared, per_head"),
    ("SinkRecent", {"summaries": "cels"}, r"unknown SinkRecent.summaries 'cels'.*did you mean 'cell'"),
    ("TempCache", {"overflow_threshold": 2.0}, r"overflow_threshold is a similarity in \[-1, 1\]"),
    ("TempCache", {"overflow": "age"}, "choose one of merge, recency, mass"),
    ("TempCache", {"bits": 3}, "bits is 8, 4 or 2, .*bits=3"),
    ("TempCache", {"budget": -1}, "a budget is a number of tokens .* got -1"),
    ("TempCache", {"budget": "8 parsecs"}, "units tokens, frames, .*; got '8 parsecs'"),
    ("TempCache", {"budget": "1.5 frames"}, "got '1.5 frames'"),
    ("TempCache", {"hold": "hots"}, "did you mean 'host'"),
    ("TempCache", {"hold": "host", "threshold": None}, "HostCache holds every token"),
    ("FlashBlock", {"extrapolate": 1.5}, "extrapolate=1.5"),
    ("FlashBlock", {"residual": 1}, "residual=1"),
    ("FlashBlock", {"share": 0.5}, "share goes with a profile"),
    ("FlashBlock", {"share": 0}, "share=0"),
    ("FlashBlock", {"cos": 1.5}, "cos=1.5"),
    ("FlashBlock", {"cos": ()}, r"cos=\(\)"),
    ("FlashBlock", {"cos": 0.9}, "cos goes with a profile"),
    ("FlashBlock", {"lse": -1}, "lse=-1"),
    ("FlashBlock", {"profile": "a.json", "refresh": 2}, "refresh and profile"),
    ("AnnSA", {"density": 0}, r"density is a share in \(0, 1\]"),
    ("AnnSA", {"density": 1.2}, "density=1.2"),
    ("AnnSA", {"dense_steps": 1.0}, "dense_steps=1.0"),
    ("AnnSA", {"groups": "kmean"}, "did you mean 'kmeans'"),
    ("AnnSA", {"clean_pass": "no"}, "choose one of dense, sparse"),
    ("AnnSA", {"layers": ()}, r"layers=\(\)"),
    ("AnnSA", {"layers": (-1,)}, r"layers=\(-1,\)"),
    ("AnnSA", {"sink_frames": -1}, "sink_frames=-1"),
    ("AnnSA", {"recent_frames": -1}, "recent_frames=-1"),
    ("AnnSA", {"refresh": "never"}, "choose one of step, block"),
    ("AnnSA", {"every": 0}, "every=0"),
    ("AnnSA", {"every": 2}, 'goes with refresh="step", got every=2, refresh='),
    ("AnnSA", {"min_past": -1}, "min_past=-1"),
    ("AnnSA", {"summaries": "mean"}, "summaries='mean'"),
    ("AnnSA", {"resort": 0.9}, "resort=0.9"),
    ("AnnSA", {"profile": "a.json", "layers": (1,)}, "both say which layers choose"),
    ("AnnSA", {"sparse_layers": 0.5}, "goes with a profile"),
    *[
        (technique.__name__, knobs, message)
        for technique in TECHNIQUES
        if issubclass(technique, Choosing) and technique.__name__ != "AnnSA"
        for knobs, message in [
            *([({"density": 0}, r"density is a share in \(0, 1\]")] if issubclass(technique, Ranked) else []),
            ({"dense_steps": 1.0}, "dense_steps=1.0"),
            ({"clean_pass": "no"}, "choose one of dense, sparse"),
            ({"sink_frames": -1}, "sink_frames=-1"),
            ({"recent_frames": -1}, "recent_frames=-1"),
            ({"refresh": "never"}, "choose one of step, block"),
            ({"every": 0}, "every=0"),
            ({"min_past": -1}, "min_past=-1"),
            ({"summaries": "mean"}, "summaries='mean'"),
        ]
    ],
    ("TokenSelect", {"similarity": 2}, "similarity=2"),
    ("AnnSA", {"similarity": 0.9, "refresh": "step"}, 'goes with refresh="block", got similarity=0.9'),
    ("HyLRA", {"similarity": 0.9}, "who chooses when, so no choice stands by its queries"),
    ("LycheeDecode", {"similarity": 0.9}, "who chooses when, so no choice stands by its queries"),
    ("HeadShard", {"similarity": -2}, "similarity=-2"),
    ("RetrievalAttention", {"similarity": -2}, "similarity=-2"),
    ("SpAttenCascade", {"similarity": 0.9}, "leave similarity out, got similarity=0.9"),
    ("Sticky", {"similarity": 0.9}, "leave similarity out, got similarity=0.9"),
    ("Routed", {"similarity": -2}, "similarity=-2"),
    ("HiP", {"similarity": -2}, "similarity=-2"),
    ("TokenSelect", {"pool": "sum"}, "choose one of mean, max"),
    ("HiP", {"order": "curv"}, "did you mean 'curve'"),
    ("HiP", {"representative": "mean"}, "choose one of middle, first"),
    ("RetrievalAttention", {"index": "hnsw"}, "choose one of flat, ivf, faiss"),
    ("RetrievalAttention", {"nearest": 0}, "nearest=0"),
    ("RetrievalAttention", {"scanned": 0}, "scanned=0"),
    ("RetrievalAttention", {"calibrated": 1}, "calibrated=1"),
    ("RetrievalAttention", {"queries": 0}, "queries=0"),
    ("HyLRA", {"by": "masses"}, "did you mean 'mass'"),
    ("HyLRA", {"least": 0}, "least=0"),
    ("HyLRA", {"dense_layers": (-1,)}, r"dense_layers=\(-1,\)"),
    ("HyLRA", {"dense_layers": ()}, r"at least one, or None for none, got dense_layers=\(\)"),
    ("LycheeDecode", {"retrieval": 1}, "retrieval=1"),
    ("HeadShard", {"unit": "token"}, "choose one of frame, block"),
    ("Routed", {"clusters": 0}, "clusters=0"),
    ("Sticky", {"resident": 0.5}, "resident=0.5"),
    ("Sticky", {"fresh": 0}, "fresh=0"),
    ("SpAttenCascade", {"drop": 1}, "drop=1"),
    ("MassRouter", {"outside": 1.5}, "outside=1.5"),
    ("MassRouter", {"probes": 0}, "probes=0"),
    ("AnnCA", {"bits": 17}, "bits=17"),
    ("AnnCA", {"tables": 0}, "tables=0"),
    ("HostCache", {"recent_frames": -1}, "recent_frames=-1"),
    ("HostCache", {"piece_frames": 0}, "piece_frames=0"),
    ("RemoteCache", {"recent_frames": -1}, "recent_frames=-1"),
    ("RemoteCache", {"device": "gpu 2"}, "device is a device of torch.*device='gpu 2'"),
    ("ZipCache", {"salient": 0}, r"salient is a share in \(0, 1\].*salient=0"),
    ("ZipCache", {"bits": 3}, "bits=3"),
    ("ZipCache", {"other_bits": 8}, "no more than bits, got bits=4, other_bits=8"),
    ("ZipCache", {"recent_frames": -1}, "recent_frames=-1"),
    ("ZipCache", {"sink_frames": -1}, "sink_frames=-1"),
    ("ZipCache", {"probes": 0}, "probes=0"),
    ("ZipCache", {"normalised": "no"}, "normalised='no'"),
    ("ThinK", {"keep": 0}, r"keep is a share in \(0, 1\], got keep=0"),
    ("ThinK", {"recent_frames": -1}, "recent_frames=-1"),
    ("ThinK", {"sink_frames": -1}, "sink_frames=-1"),
    ("ThinK", {"probes": 0}, "probes=0"),
    ("SinkRecent", {"recent_frames": 0}, "recent_frames=0"),
    ("SinkRecent", {"sink_frames": -1}, "sink_frames=-1"),
    ("RollingRebased", {"recent_frames": 0}, "recent_frames=0"),
    ("RollingRebased", {"sink_frames": -1}, "sink_frames=-1"),
    ("FlashBlock", {"refresh": 0}, "refresh=0"),
    ("FlashBlock", {"refresh": ()}, r"refresh=\(\)"),
    ("FlashBlock", {"min_past": -1}, "min_past=-1"),
    ("FlashBlock", {"clean_pass": "skip"}, "choose one of compute, reuse"),
    ("FrameWindow", {"frames": -1}, "frames=-1"),
    ("FrameWindow", {"sink_frames": -1}, "sink_frames=-1"),
    ("InwardWindow", {"size": (0, 3)}, "size is rows and columns >= 1"),
    ("InwardWindow", {"size": (3, 3), "tile": (4, 1)}, "a tile is no larger than its window"),
    ("InwardWindow", {"tile": (0, 1)}, "tile is rows and columns >= 1"),
    ("InwardWindow", {"frames": 0}, "frames is a number of latent frames >= 1, or None for all"),
    ("InwardWindow", {"ratio": 0.5}, "ratio is >= 1"),
    ("FullFieldGuide", {"shrink": 0.5}, "shrink is a ratio >= 1"),
    ("InwardWindow", {"gather_mib": 0}, "gather_mib is a number of MiB >= 1"),
    ("NeighborhoodAttention", {"kernel": (-1, 3, 3)}, "kernel is three lengths >= 0"),
    ("NeighborhoodAttention", {"kernel": (0, 3, 3), "stride": (1, 4, 1)}, "a stride is no longer than its window"),
    ("NeighborhoodAttention", {"stride": 2}, "stride is three steps >= 1"),
    ("NeighborhoodAttention", {"stride": (0, 1, 1)}, r"stride=\(0, 1, 1\)"),
    ("NeighborhoodAttention", {"dilation": (1, 0, 1)}, r"dilation=\(1, 0, 1\)"),
    ("NeighborhoodAttention", {"causal": (True, False)}, r"causal=\(True, False\)"),
    ("NeighborhoodAttention", {"gather_mib": 0}, "gather_mib=0"),
    ("FullFieldGuide", {"every": 0}, "every is a number of steps >= 1"),
    ("FullFieldGuide", {"branches": "uncond"}, "choose one of cond, all"),
    ("FullFieldGuide", {"hold": "disk"}, "choose one of device, int8, host"),
    *[
        (technique.__name__, knobs, message)
        for technique in TECHNIQUES
        if issubclass(technique, Scored)
        for knobs, message in [
            ({"budget": "0 frames"}, "budget is a number of tokens"),
            ({"recent_frames": -1}, "recent_frames=-1"),
            ({"sink_frames": -1}, "sink_frames=-1"),
            ({"probes": 0}, "probes=0"),
            ({"dropped": "hosts"}, r"unknown \w+.dropped 'hosts'.*did you mean 'host'"),
        ]
    ],
    ("H2O", {"normalised": 1.5}, "normalised is True or False"),
    ("LazyEviction", {"alpha": 0}, "alpha=0"),
    ("LazyEviction", {"h2": "code"}, "choose one of paper, off, official"),
    ("TaskKV", {"beta": 1}, "beta=1"),
    ("TaskKV", {"least": -1}, "least=-1"),
    ("TaskKV", {"top": 0}, "top=0"),
    ("TaskKV", {"pool": 2}, "pool=2"),
    *[
        (technique.__name__, {"profile": "none.json"}, "none.json' cannot be read")
        for technique in TECHNIQUES
        if technique.needs == "calibration"
    ],
    ("TriAttention", {"horizon": 0}, "horizon=0"),
    ("RazorAttention", {"share": 1.5}, "share=1.5"),
    ("DuoAttention", {"share": -1}, "share=-1"),
    ("CompressKV", {"lead": 0}, "lead=0"),
    ("CompressKV", {"pool": 2}, "pool=2"),
    ("CompressKV", {"least": 2}, "least=2"),
    ("CompressKV", {"most": 0.5}, "most=0.5"),
    ("TCAStyle", {"side": 0}, "side=0"),
    ("FlowCache", {"threshold": -0.1}, "threshold=-0.1"),
    ("FlowCache", {"warmup": 0}, "warmup=0"),
    ("RKV", {"balance": 2}, "balance=2"),
    ("RKV", {"pool": 2}, "pool=2"),
    ("SnapKV", {"pool": 2}, "pool is an odd number >= 1, got pool=2"),
    ("CAKE", {"pool": 0}, "pool=0"),
    ("CAKE", {"tau1": 0}, "tau1=0"),
    ("CAKE", {"tau2": -1}, "tau2=-1"),
    ("CAKE", {"gamma": -1}, "gamma=-1"),
    ("CAKE", {"probes": 1}, "at least 2 probes"),
]


@pytest.mark.parametrize(("name", "knobs", "message"), BAD, ids=str)
def test_bad_knob_is_refused_with_rule_and_value(name, knobs, message):
    technique = {t.__name__: t for t in TECHNIQUES}[name]
    with pytest.raises((KnobError, ProfileError), match=message):
        technique(**knobs)


def test_every_knob_with_a_rule_is_tried():
    tried = {(name, knob) for name, knobs, _ in BAD for knob in knobs}
    ruled = set(itertools.chain.from_iterable(((t.__name__, k) for k in t.knobs()) for t in TECHNIQUES))
    assert tried >= ruled
