"""What is said of which technique works where is what is found: README, package and command line."""

import json
import sys
from pathlib import Path

import pytest
from families import FAMILIES, REFUSED
from typer.testing import CliRunner

from diffaccel.cli import app
from diffaccel.support import support
from diffaccel.techniques import TECHNIQUES

sys.path.append(str(Path(__file__).resolve().parent.parent / "scripts"))
import methods_table
import support_matrix


@pytest.fixture(scope="module")
def found():
    return support_matrix.find()


def test_readme_and_package_say_what_was_found(found):
    for path, text in support_matrix.written(found).items():
        assert path.read_text() == text, f"{path.name} is out of date: run scripts/support_matrix.py"


def test_readme_lists_every_technique():
    assert methods_table.table() in methods_table.README.read_text(), "run scripts/methods_table.py"


def test_an_exact_setting_that_is_not_dense_is_told(monkeypatch):
    family, technique = FAMILIES[0], next(t for t in TECHNIQUES if t.__name__ == "InwardWindow")
    dense = family.generate(family.pipe(), **support_matrix.FEW)
    assert support_matrix.ask(family, technique, dense) == {"takes": "yes", "why": ""}
    assert support_matrix.ask(family, technique, dense + 0.5) == {
        "takes": "approximately", "why": "its exact setting differs from dense attention by 5e-01"
    }  # fmt: skip


def test_every_family_that_is_registered_is_asked():
    from diffaccel import backbone

    asked = {backbone.find(family.pipe())[0].name for family in [*FAMILIES, *REFUSED]}
    assert asked == {family.name for family in backbone._FAMILIES}


def run(*arguments):
    return CliRunner().invoke(app, ["methods", "--pipeline", *arguments])


def test_on_the_command_line():
    text = run("Kandinsky 5").stdout
    assert "InwardWindow: yes\n" in text
    assert "AnnCA: no, AnnCA (slot prompt) cannot run on Kandinsky 5: its prompt attends to itself" in text
    assert json.loads(run("Flux", "--json").stdout) == support()["Flux"]
    refused = run("Kandinsky")
    assert refused.exit_code == 2
    assert "unknown family of pipelines 'Kandinsky'" in refused.stderr
    assert "did you mean 'Kandinsky 5'?" in refused.stderr
