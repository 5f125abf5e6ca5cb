"""Recall against density: what the script measures is what the maps written out in fp64 say."""

import json
import sys
from itertools import pairwise, product
from pathlib import Path

import pytest
import torch
from tiny import tiny_pipeline

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

import annsa_recall
from annsa_recall import DENSITIES, GROUPS, KEYS, MEANS, METHODS, RANDOM, annsa, mean, recalls

from diffaccel import Accel, Grid, Site
from diffaccel.cache import Entries

ORACLES = {f"AnnSA, {groups}": f"oracle: {name}" for groups, name in GROUPS.items()}
ORACLES |= dict.fromkeys((MEANS, RANDOM), "oracle: consecutive blocks")
SITE = Site(0, "self", 3, 4, 10, 30, "denoise", "cond", Grid(2, 1, 22))


def tensors(tokens=333, queries=44):
    """Around a few centres, so that some blocks are worth more than others."""
    q, k = torch.randn(2, queries, 2, 16), torch.randn(2, tokens, 2, 16)
    k += 2 * torch.randn(2, 7, 2, 16)[:, torch.arange(tokens) // 48]
    return q, Entries(k, torch.randn_like(k), torch.arange(tokens) * 30 // tokens)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recall")
    tiny_pipeline().save_pretrained(folder / "model")
    arguments = ["--model", folder / "model", "--frames", 65, "--size", "96x64", "--steps", 4, "--min-past", 2]
    assert annsa_recall.main([*map(str, arguments), "--out", str(folder / "out")]) == 0
    return folder / "out", [json.loads(line) for line in (folder / "out" / "recall.jsonl").read_text().splitlines()]


def test_it_leaves_a_line_for_every_method_density_and_call(ran):
    folder, rows = ran
    calls = {(row["layer"], row["step"], row["block"], row["keys"]) for row in rows}
    assert len(rows) == len(METHODS) * len(DENSITIES) * len(calls)
    assert {row["method"] for row in rows} == set(METHODS)
    # 17 latent frames of 24 tokens in blocks of 2, 3, 3, ...: a past of twice a block's length from block 3 on
    sampled = product((0, 1), (2, 3), (3, 4, 5))
    assert calls == {(layer, step, block, 24 * (3 * block - 1)) for layer, step, block in sampled}
    table = (folder / "table.md").read_text()
    for method in METHODS:
        each = " | ".join(f"{mean(rows, method=method, density=density):.3f}" for density in DENSITIES)
        assert f"| {method} | {each} |" in table
    assert (folder / "recall.png").stat().st_size > 10_000


def test_no_choice_beats_its_oracle_and_random_blocks_hold_their_share(ran):
    _, rows = ran
    found = {(r["method"], r["density"], r["layer"], r["step"], r["block"]): r for r in rows}
    for (method, *call), row in found.items():
        if method in ORACLES:
            best = found[ORACLES[method], *call]
            assert row["recall"] <= best["recall"] + 1e-5
            assert row["read"] == best["read"]
        assert 0 < row["recall"] <= found[KEYS, *call]["recall"] + 1e-5
    for density in DENSITIES:
        share, recall = (mean(rows, value, method=RANDOM, density=density) for value in ("read", "recall"))
        assert recall == pytest.approx(share, abs=0.03)
        assert share == pytest.approx(density, rel=0.2)
    for method in METHODS:
        assert all(a < b for a, b in pairwise(mean(rows, method=method, density=density) for density in DENSITIES))


def test_generation_stays_dense(ran):
    def generate(accel):
        pipe = tiny_pipeline()
        run = accel.apply(pipe)
        try:
            return pipe(
                "a red circle", height=64, width=96, num_frames=33, num_inference_steps=2, output_type="latent",
                generator=torch.Generator().manual_seed(0),
            ).frames  # fmt: skip
        finally:
            run.remove(check=False)

    watch = annsa_recall.Watch((0, 1), (2,), (1, 2))
    torch.testing.assert_close(generate(Accel(selection=watch)), generate(Accel()), atol=1e-4, rtol=1e-4)
    assert watch.rows


def test_at_density_1_recall_is_1():
    q, entries = tensors()
    assert recalls(q, entries, SITE, 1.0) == dict.fromkeys(METHODS, (1.0, 1.0))


@pytest.mark.parametrize("density", [0.1, 0.4])
def test_recalls_are_those_of_maps_written_out(density):
    q, entries = tensors()
    found = recalls(q, entries, SITE, density)
    for groups in GROUPS:
        exact = written_out(q, entries, annsa(density, groups).plan(q, entries, SITE), groups == "place")
        for name, value in zip((f"AnnSA, {groups}", f"oracle: {GROUPS[groups]}", MEANS, KEYS), exact, strict=False):
            assert found[name][1] == pytest.approx(value, abs=1e-5), name


def written_out(q, entries, chosen, place):
    """Recall of what was chosen, of the best blocks and, for blocks by place, of block means and of the best keys."""
    blocks, count, size = chosen.blocks, entries.count, chosen.blocks.key_block
    edges = [(start, min(start + size, count)) for start in range(0, count, size)]
    sums = torch.zeros(4, dtype=torch.float64)
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            k = chosen.k[b, :, h].double()
            order = torch.arange(q.shape[1]) if chosen.order is None else chosen.order[b, h]
            for number, rows in enumerate(order.split(blocks.query_block)):
                maps = (q[b, rows, h].double() @ k.T / 4).softmax(-1)
                named = blocks.lists[b, h, number, : blocks.counts[b, h, number]].tolist()
                mass = [float(maps[:, start:end].sum()) for start, end in edges]
                score = [float(q[b, rows, h].double().mean(0) @ k[start:end].mean(0)) for start, end in edges]
                last = [len(edges) - 1] if count % size else []  # too short to choose, in every list
                assert set(last) <= set(named)

                def best(scores, mass=mass, last=last, named=named):
                    ranked = sorted(set(range(len(edges))) - set(last), key=lambda i: -scores[i])
                    return sum(mass[i] for i in [*last, *ranked[: len(named) - len(last)]])

                held = sum(mass[i] for i in named), best(mass), best(score), maps.topk(chosen.keys_read).values.sum()
                sums += torch.tensor([float(part) for part in held], dtype=torch.float64)
    means = (sums / (q.shape[0] * q.shape[1] * q.shape[2])).tolist()
    return means if place else means[:2]
