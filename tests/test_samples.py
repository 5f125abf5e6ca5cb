"""The samples are short, and each runs from start to end on the bundled model."""

import subprocess
import sys
from pathlib import Path

import pytest

from diffaccel.video import read_video

ROOT = Path(__file__).resolve().parent.parent
SAMPLES = sorted((ROOT / "samples").glob("*.py"))
EXPECTED = {  # what each leaves behind or says; frames are few, so that the suite stays quick
    "01_generate": ("37", "TempCache   yes", "generated.mp4", 37),
    "02_accelerate_your_pipeline": ("9", "bit for bit the same after leaving: True", None, 0),
    "03_stream": ("37", "12 more frames", "streamed.mp4", 37),
    "04_compose": ("37", "LongKeys    yes", None, 0),
}


def test_all_samples_are_run_and_short():
    assert {path.stem for path in SAMPLES} == set(EXPECTED)
    for path in SAMPLES:
        assert len(path.read_text().splitlines()) < 40, path.name


@pytest.mark.parametrize("path", SAMPLES, ids=lambda p: p.stem)
def test_sample_runs(path, tmp_path):
    frames, said, file, count = EXPECTED[path.stem]
    found = subprocess.run([sys.executable, str(path), frames], cwd=tmp_path, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert " ".join(said.split()) in " ".join(found.stdout.split()), found.stdout
    if file:
        assert len(read_video(tmp_path / file)) == count
