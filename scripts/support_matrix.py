"""Which technique works on which family of backbones: asked of tiny random models, written down for README and package.

    python scripts/support_matrix.py            # any machine, under a minute
    python scripts/support_matrix.py --check    # write nothing; exit 1 if what is written is not what was found

The families are those of `tests/families.py`, the settings the first of each technique in `tests/matrix.py`.
"""

import argparse
import json
import sys
from pathlib import Path
from string import ascii_uppercase

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from families import FAMILIES, REFUSED, Family  # noqa: E402
from matrix import MATRIX  # noqa: E402
from profiles import fitted  # noqa: E402

from diffaccel import Accel, UnsupportedError  # noqa: E402
from diffaccel.policy import Policy  # noqa: E402
from diffaccel.techniques import TECHNIQUES  # noqa: E402

JSON, README = ROOT / "diffaccel" / "support.json", ROOT / "README.md"
BEGIN, END = "<!-- support: scripts/support_matrix.py -->\n", "<!-- end of support -->"
ROUNDING = 1e-4  # of latents, after all steps
FEW = {"guided": False, "steps": 2}
Found = dict[str, dict[str, dict[str, str]]]


def settings(technique: type[Policy]) -> tuple[Accel, Accel]:
    """The exact setting and one that is not, the same where the technique is lossless."""
    rows = (row for row in MATRIX if isinstance(getattr(row.exact, technique.slot), technique))
    row = min(rows, key=lambda row: len(row.exact.policies()))
    return row.exact, row.lossy or row.exact


def ask(family: Family, technique: type[Policy], dense: torch.Tensor) -> dict[str, str]:
    (exact, lossy), slot, why = settings(technique), technique.slot, ""
    if family.grid.frames == 1 and "sink_frames" in technique.knobs() and not technique.needs_blocks:
        policy = getattr(lossy, slot)
        lossy = Accel(**lossy.policies() | {slot: type(policy)(**policy.values() | {"sink_frames": 0})})
        why = "with `sink_frames=0`: the only frame is the first"
    pipe = family.pipe()
    lossy = fitted(lossy, pipe)
    few = FEW | {"steps": max(FEW["steps"], technique.least_steps)}
    try:
        with exact(pipe):
            same = family.generate(pipe, **FEW)
        with lossy(pipe):  # an error if it never engages
            found = family.generate(pipe, **few)
    except UnsupportedError as error:
        return {"takes": "no", "why": str(error).replace(type(pipe).__name__, family.name)}
    assert torch.isfinite(found).all()
    if (off := float((same - dense).abs().max())) > ROUNDING:
        return {"takes": "approximately", "why": f"its exact setting differs from dense attention by {off:.0e}"}
    return {"takes": "yes", "why": why}


def find() -> Found:
    found: Found = {}
    for family in [*FAMILIES, *REFUSED]:
        pipe = family.pipe()
        dense = family.generate(pipe, **FEW)
        found[family.name] = {technique.__name__: ask(family, technique, dense) for technique in TECHNIQUES}
    return found


def table(found: Found) -> str:
    """A row a family, a column a group of techniques that fare alike everywhere, listed above; reasons below."""
    groups: dict[tuple[tuple[str, str], ...], list[str]] = {}
    for name in (technique.__name__ for technique in TECHNIQUES):
        fares = tuple((of[name]["takes"], reason(of[name]["why"])) for of in found.values())
        groups.setdefault(fares, []).append(name)
    columns = list(zip(ascii_uppercase, groups.values(), strict=False))
    reasons: list[str] = []
    lines = [f"* **{letter}**: {', '.join(f'`{name}`' for name in names)}" for letter, names in columns]
    lines += ["", f"| family | {' | '.join(letter for letter, _ in columns)} |", "|---" * (1 + len(columns)) + "|"]
    for row, family in enumerate(found):
        cells = []
        for takes, why in (fares[row] for fares in groups):
            if why and why not in reasons:
                reasons.append(why)
            number = f" ({1 + reasons.index(why)})" if why else ""
            cells.append(takes + number)
        lines.append(f"| {family} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *(f"{number}. {why}" for number, why in enumerate(reasons, 1)), ""])


def reason(sentence: str) -> str:
    """What lies behind a refusal, without its technique, its pipeline and the remedy."""
    head, _, tail = sentence.partition(": ")
    if "cannot run on" in head:
        return tail.partition(": ")[0]
    if "earlier blocks" in head:
        _, _, history = head.partition(" has none that stay, for ")
        return f"it acts on earlier blocks, and {history or 'the whole video is generated at once'}"
    return sentence


def written(found: Found) -> dict[Path, str]:
    """What README and package should hold."""
    before, _, rest = README.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    return {
        JSON: json.dumps(found, indent=1, ensure_ascii=False) + "\n",
        README: before + BEGIN + table(found) + END + after,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check, stale = parser.parse_args().check, []
    for path, text in written(find()).items():
        if not path.exists() or path.read_text() != text:
            stale.append(path.name)
            if not check:
                path.write_text(text)
    print(f"{'stale' if check else 'written'}: {', '.join(stale)}" if stale else "as written")
    sys.exit(bool(check and stale))


if __name__ == "__main__":
    main()
