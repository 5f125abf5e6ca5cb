"""The README's figures are those of the committed evaluation."""

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
EVALUATION = ROOT / "samples" / "evaluation"


@pytest.fixture(scope="module")
def figures():
    spec = importlib.util.spec_from_file_location("readme_figures", ROOT / "scripts" / "readme_figures.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_readme_says_what_was_measured(figures):
    report = json.loads((EVALUATION / "report.json").read_text())
    readme = (ROOT / "README.md").read_text()
    assert figures.written(readme, report) == readme, "python scripts/readme_figures.py"
    report["folders"][0]["speed"]["lengths"]["49"]["balanced"]["speedup"]["total"]["ratio"] += 1
    assert figures.written(readme, report) != readme


def test_the_evaluation_is_small_and_of_the_prompts_beside_it():
    assert {file.name for file in EVALUATION.iterdir()} == {"report.html", "report.md", "report.json"}
    assert sum(file.stat().st_size for file in EVALUATION.iterdir()) < 1.5e6
    report = json.loads((EVALUATION / "report.json").read_text())
    asked = report["folders"][0]["asked"][0]
    assert asked["prompts"] == (ROOT / "samples" / "prompts.txt").read_text().splitlines()
    assert list(asked["arms"]) == ["exact", "balanced", "fast"]
    page = (EVALUATION / "report.html").read_text()
    assert page.count('"clip"') == 4 * 9  # of every prompt dense, three presets in two ways, noise floor, another seed
    assert '"href":' not in page  # no video that only the run had
