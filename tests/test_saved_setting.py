"""`diffaccel_config.json`: a setting that goes with a pipeline, written and read again."""

import json
import types
import typing
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from test_cli import SMALL
from tiny import tiny_pipeline
from typer.testing import CliRunner

from diffaccel import Accel, AnnSA, FlashBlock, KnobError, PadCollapse, TempCache, UnsupportedError
from diffaccel.calibrate import calibrate
from diffaccel.cli import app
from diffaccel.errors import DiffaccelError
from diffaccel.pipelines import CausalWanPipeline
from diffaccel.policy import Selector
from diffaccel.preset_file import CONFIG_FILE, read_preset
from diffaccel.settings import UsageError
from diffaccel.techniques import TECHNIQUES
from diffaccel.version import __version__

NUMBERS = [0, 1, 2, 3, 5, 12]
SHARES = [0.0, 0.25, 0.3, 0.5, 0.9, 1.0]


def values(kind, choices):
    """Values that a knob of that type may take, most of them inside its range."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if choices:
        return st.sampled_from(choices)
    if origin in (typing.Union, types.UnionType):
        return st.one_of([values(part, None) for part in parts])
    if origin is typing.Literal:
        return st.sampled_from(parts)
    if origin is tuple:
        each = values(parts[0], None)
        return (
            st.lists(each, min_size=1, max_size=3).map(tuple) if parts[-1] is ... else st.tuples(*[each] * len(parts))
        )
    kinds = {int: NUMBERS, float: SHARES, bool: [False, True], str: ["6 frames", "40 %"], type(None): [None]}
    return st.sampled_from(kinds[kind])


@st.composite
def setting(draw, technique):
    """The technique with up to two knobs away from their defaults."""
    hints = typing.get_type_hints(technique)
    names = [name for name in technique.knobs() if name != "profile"]
    changed = draw(st.sets(st.sampled_from(names), max_size=2)) if names else []
    drawn = {name: draw(values(hints[name], technique.knobs()[name].metadata.get("choices"))) for name in changed}
    try:
        return Accel(**{technique.slot: technique(**drawn)}, kernel=draw(st.sampled_from(["auto", "sdpa"])))
    except (KnobError, TypeError):
        assume(False)


@pytest.mark.parametrize("technique", TECHNIQUES, ids=lambda technique: technique.__name__)
def test_what_is_saved_is_loaded_again(technique, tmp_path):
    seen = set()

    @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(accel=setting(technique))
    def check(accel):
        accel.save_pretrained(tmp_path)
        assert Accel.from_pretrained(tmp_path) == accel
        seen.add(repr(accel))

    check()
    assert len(seen) >= min(8, 2 + 4 * len(technique.knobs()))  # with kernels: not only defaults


def test_beside_a_pipeline_in_either_order(tmp_path):
    accel = Accel(cache=TempCache(0.3, budget="7 frames"), reuse=FlashBlock(refresh=(0, 2)))
    pipe, first, second = tiny_pipeline(), tmp_path / "first", tmp_path / "second"
    pipe.save_pretrained(first)
    accel.save_pretrained(first)
    accel.save_pretrained(str(second))
    pipe.save_pretrained(second)
    for folder in (first, second):
        opened = CausalWanPipeline.from_pretrained(folder)
        assert Accel.from_pretrained(opened) == Accel.from_pretrained(str(folder)) == accel
        with Accel.from_pretrained(opened)(opened):
            call = {"height": 32, "width": 48, "num_frames": 33, "num_inference_steps": 3, "output_type": "latent"}
            opened("a red circle", **call, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def profile(tmp_path_factory):
    file = tmp_path_factory.mktemp("profile") / "annsa.json"
    size = {"width": 48, "height": 32, "num_frames": 49, "num_inference_steps": 2}
    calibrate(tiny_pipeline(), AnnSA(min_past=0), prompts=["a red circle"], densities=(0.2,), **size).save(file)
    return file


def test_its_profile_goes_with_it(profile, tmp_path):
    accel = Accel(selection=AnnSA(0.2, min_past=0, profile=str(profile)))
    accel.save_pretrained(tmp_path / "model")
    (tmp_path / "model").rename(tmp_path / "moved")
    beside = tmp_path / "moved" / "diffaccel_selection_profile.json"
    assert beside.read_bytes() == profile.read_bytes()
    loaded = Accel.from_pretrained(tmp_path / "moved")
    assert loaded == Accel(selection=replace(accel.selection, profile=str(beside)))
    loaded.save_pretrained(tmp_path / "moved")  # onto itself
    assert Accel.from_pretrained(tmp_path / "moved") == loaded
    loaded.apply(tiny_pipeline()).remove(check=False)
    with pytest.raises(UnsupportedError, match=r"the profile is of another model .*: calibrate this one"):
        loaded.apply(tiny_pipeline(seed=1))
    beside.unlink()
    with pytest.raises(UsageError, match=r"profile.json' cannot be read .*; make one with diffaccel calibrate"):
        Accel.from_pretrained(tmp_path / "moved")


def test_a_technique_of_ones_own_is_not_saved(tmp_path):
    class Mine(Selector):
        slot = "selection"

        def plan(self, q, entries, site):
            return None

    with pytest.raises(UsageError, match=r"Mine \(slot selection\) is none of them; save the rest, and add selection="):
        Accel(selection=Mine()).save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"version": 2}, f"is of version 2, and diffaccel {__version__} reads version 1; upgrade diffaccel, or write"),
        ({"kernel": "auto"}, "is of version None"),
        ([1], "cannot be read: it holds no object"),
        ("{", "cannot be read: "),
        ({"version": 1, "cache": {"method": "FutureCache"}}, "unknown method in [cache] 'FutureCache': choose one of"),
        ({"version": 1, "reuse": {"method": "FlashBlock", "refersh": 2}}, "did you mean 'refresh'?"),
        ({"version": 1, "memory": {}}, "unknown key 'memory': choose one of cache, "),
        (
            {"version": 1, "diffaccel": "9.9", "cache": {"method": "New"}},
            f"by diffaccel 9.9, and this is {__version__})",
        ),
        ({"version": 1, "selection": {"method": "AnnSA", "profile": 3}}, "3' cannot be read (No such file"),
    ],
)
def test_what_cannot_be_read_is_one_sentence(content, said, tmp_path):
    (tmp_path / CONFIG_FILE).write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(DiffaccelError) as raised:
        Accel.from_pretrained(tmp_path)
    assert str(tmp_path / CONFIG_FILE) in str(raised.value)
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


def test_where_nothing_was_saved(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match=r"holds no diffaccel_config\.json; save a setting there"):
        Accel.from_pretrained(tmp_path)
    with pytest.raises(UsageError, match="this CausalWanPipeline was opened from no folder"):
        Accel.from_pretrained(tiny_pipeline())
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UsageError, match=r"no folder 'nobody/nothing', and it cannot be had from the hub: .*; check"):
        Accel.from_pretrained("nobody/nothing")


def test_from_the_hub_come_the_setting_and_its_profiles(monkeypatch, tmp_path):
    Accel(prompt=PadCollapse()).save_pretrained(tmp_path)
    asked = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: asked.append((a, k)) or str(tmp_path))
    assert Accel.from_pretrained("owner/name") == Accel(prompt=PadCollapse())
    assert asked == [(("owner/name",), {"allow_patterns": "diffaccel_*.json"})]


def test_generate_takes_it_up(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pipe = tiny_pipeline()
    pipe.register_to_config(frames_per_block=1)
    pipe.save_pretrained("model")
    Accel(reuse=FlashBlock(refresh=2, min_past=1.0)).save_pretrained("model")

    def run(*more):
        return CliRunner().invoke(app, ["generate", "a red circle", "--model", "model", *SMALL, *more])

    done = run()
    assert done.exit_code == 0, done.output
    assert "note: the setting saved with the model is used, 'model/diffaccel_config.json'; --preset" in done.stderr
    assert "preset model/diffaccel_config.json: reuse FlashBlock(refresh=2, min_past=1.0); kernel auto" in done.stdout
    changed = run("--set", "reuse.min_past=0.5")
    assert "min_past=0.5" in changed.stdout
    other = run("--preset", "exact")
    assert "preset exact: " in other.stdout
    assert CONFIG_FILE not in other.output
    named = run("--preset", f"model/{CONFIG_FILE}")
    assert "reuse FlashBlock(refresh=2, min_past=1.0)" in named.stdout
    (tmp_path / "model" / CONFIG_FILE).write_text("{")
    broken = run()
    assert broken.exit_code == 2
    assert "cannot be read" in broken.stderr


def test_null_is_none_in_json(tmp_path):
    file = tmp_path / "some.json"
    file.write_text('{"version": 1, "cache": {"method": "TempCache", "threshold": null}}')
    assert read_preset(file) == Accel(cache=TempCache(threshold=None))
