"""Every technique in one table: what `diffaccel methods` lists, written down for the README.

python scripts/methods_table.py            # seconds; --check writes nothing and exits 1 where the README is stale
"""

import argparse
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from diffaccel.policy import Policy  # noqa: E402
from diffaccel.techniques import TECHNIQUES  # noqa: E402

README = ROOT / "README.md"
BEGIN, END = "<!-- methods: scripts/methods_table.py -->\n", "<!-- end of methods -->"


def linked(paper: str) -> str:
    """arXiv numbers as links."""
    return re.sub(r"(?:arXiv )?\b(\d{4}\.\d{5})\b", r"[\1](https://arxiv.org/abs/\1)", paper)


def row(technique: type[Policy]) -> str:
    exact = ", ".join(f"`{name}={value!r}`" for name, value in technique.exact.items()) or "always"
    pipelines = "causal" if technique.needs_blocks else "any"
    cells = (technique.slot, f"`{technique.__name__}`", linked(technique.paper), technique.summary)
    return f"| {' | '.join((*cells, technique.needs, pipelines, exact))} |"


def table() -> str:
    lines = ["| slot | technique | paper | what it does | needs before | pipelines | exact at |", "|---" * 7 + "|"]
    order = sorted(TECHNIQUES, key=lambda technique: list(SLOTS).index(technique.slot))
    return "\n".join(lines + [row(technique) for technique in order]) + "\n"


SLOTS = ("reuse", "cache", "window", "selection", "prompt")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    before, _, rest = README.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    text = before + BEGIN + table() + END + after
    stale = text != README.read_text()
    if stale and not check:
        README.write_text(text)
    print("stale" if stale else "as it was")
    sys.exit(1 if stale and check else 0)


if __name__ == "__main__":
    main()
