"""Presets in files: what is written is read again, and what is wrong in one is said."""

from pathlib import Path

import pytest

from diffaccel import Accel, AnnCA, AnnSA, FlashBlock, HostCache, PadCollapse, SinkRecent, TempCache
from diffaccel.cli.checks import accel_for, check_preset
from diffaccel.errors import KnobError
from diffaccel.pipelines.presets import PRESETS, balanced
from diffaccel.preset_file import read_preset, write_preset
from diffaccel.settings import UsageError, build_accel
from diffaccel.techniques import TECHNIQUES


@pytest.mark.parametrize(
    "accel",
    [
        *(preset() for preset in PRESETS.values()),
        *(Accel(**{technique.slot: technique()}) for technique in TECHNIQUES if technique.__name__ != "TokenCount"),
        Accel(kernel="sdpa"),
        Accel(cache=TempCache(threshold=None, budget="24 frames", bits=4), reuse=FlashBlock(refresh=(0,))),
        Accel(cache=TempCache(threshold=(0.9, 0.95, 1.0), budget=40_000, hold="host"), prompt=AnnCA(bits=4)),
        Accel(selection=AnnSA(0.3, layers=(0, 5)), cache=SinkRecent(9, 1, summaries="frame")),
        Accel(cache=HostCache(recent_frames=3), prompt=PadCollapse(), reuse=FlashBlock(refresh=4)),
    ],
    ids=str,
)
def test_what_is_written_is_read_again(accel, tmp_path):
    file = tmp_path / "preset.toml"
    write_preset(file, accel, ["why", "and\nhow"])
    assert read_preset(file) == accel
    assert file.read_text().startswith("# why\n# and how\nversion = 1\n")
    assert [path.name for path in tmp_path.iterdir()] == ["preset.toml"]


def test_what_is_left_out_is_the_default(tmp_path):
    file = tmp_path / "preset.toml"
    file.write_text('version = 1\n[reuse]\nmethod = "FlashBlock"\nmin_past = 1')
    accel = read_preset(file)
    assert accel == Accel(reuse=FlashBlock(min_past=1.0))
    assert isinstance(accel.reuse.min_past, float)


def test_a_file_stands_where_a_name_does(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_preset(Path("mine.toml"), balanced())
    check_preset("mine.toml", ["cache.threshold=0.5"])
    changed = accel_for(None, "./mine.toml", ["cache.threshold=0.5"], {})
    assert changed == build_accel("balanced", ["cache.threshold=0.5"])
    with pytest.raises(KnobError, match="unknown preset 'mine'"):
        check_preset("mine", [])
    with pytest.raises(KnobError, match="unknown preset"):  # what a page sends is a name, never a file
        build_accel("mine.toml")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("version = 2", "is of version 2, and diffaccel 0.1.0 reads version 1; upgrade diffaccel, or write "),
        ('kernel = "auto"', "is of version None"),
        ("version = 1\nversion = 2", "cannot be read: "),
        ("\xff\xfe", "cannot be read: "),
        ("version = 1\nspeed = 3", "unknown key 'speed': choose one of cache, selection, prompt, reuse, window"),
        ("version = 1\nkernel = 3", "kernel takes text, got 3"),
        ('version = 1\nkernel = "sdpaa"', "unknown kernel 'sdpaa'"),
        ("version = 1\ncache = 3", "cache is a table, [cache], with a method and its knobs, got 3"),
        ("version = 1\n[cache]\nthreshold = 0.9", "unknown method in [cache] 'None': choose one of TempCache"),
        ('version = 1\n[cache]\nmethod = "FlashBlock"', "unknown method in [cache] 'FlashBlock'"),
        ('version = 1\n[cache]\nmethod = "TempCache"\nsize = 3', "unknown knob of TempCache in [cache] 'size'"),
        ('version = 1\n[cache]\nmethod = "TempCache"\nthreshold = "0.9"', "cache.threshold takes a number or "),
        ('version = 1\n[cache]\nmethod = "TempCache"\nsink_frames = true', "takes a whole number, got True"),
        ('version = 1\n[cache]\nmethod = "TempCache"\nthreshold = []', "cache.threshold takes a number or "),
        ('version = 1\n[cache]\nmethod = "TempCache"\nthreshold = 1.5', "TempCache: threshold"),
        ('version = 1\n[reuse]\nmethod = "FlashBlock"\nresidual = 1', "reuse.residual takes true or false, got 1"),
        ('version = 1\n[reuse]\nmethod = "FlashBlock"\nrefresh = [0, 1.5]', "reuse.refresh takes a whole number or "),
    ],
)
def test_what_is_wrong_in_a_file_is_one_sentence(text, said, tmp_path):
    file = tmp_path / "preset.toml"
    file.write_text(text, "latin-1")
    with pytest.raises(UsageError) as raised:
        read_preset(file)
    assert str(file) in str(raised.value)
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(UsageError, match=r"the preset file '.*none\.toml' cannot be read: .*No such file"):
        check_preset(str(tmp_path / "none.toml"), [])
