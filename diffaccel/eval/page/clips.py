"""Videos of a report: inside of the page as long as they fit, beside it from there on."""

import base64
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ..store import EvalError


@dataclass
class Clips:
    """The files that a page shows. `embedded` has them as base64, by number; `beside` how many are files, `missing`
    how many are not there. Raises `EvalError` for a file that is outside of its folder."""

    page: Path  # the folder that the page is written into
    most_bytes: float
    embedded: list[str] = field(default_factory=list)
    beside: int = 0
    missing: int = 0
    bytes: int = 0

    def source(self, folder: Path, name: str) -> dict[str, Any] | None:
        """Where a player finds a video: {"clip": number} or {"href": address}; None where there is none."""
        file = (folder / name).resolve()
        if not file.is_relative_to(folder.resolve()):
            raise EvalError(f"the rows of '{folder}' name a video outside of it, '{name}'; only its own are shown")
        if not file.is_file():
            self.missing += 1
            return None
        size = -(-file.stat().st_size // 3) * 4
        if self.bytes + size > self.most_bytes:
            self.beside += 1
            return {"href": quote(Path(os.path.relpath(file, self.page.resolve())).as_posix())}
        self.bytes += size
        self.embedded.append(base64.b64encode(file.read_bytes()).decode())
        return {"clip": len(self.embedded) - 1}


def units(folder: Path, rows: Sequence[dict[str, Any]], ways: dict[str, str], clips: Clips) -> list[dict[str, Any]]:
    """For each prompt and seed its name, number of frames, and videos: the dense one first, then those of the rows."""
    found: dict[tuple[int, int], dict[str, Any]] = {}
    for row in rows:
        key = row["prompt"], row["seed"]
        if key not in found:
            dense = clips.source(folder, row["dense"])
            found[key] = {
                "name": f"{row['text']} (seed {row['seed']})",
                "frames": len(row["frames"]["psnr"]),
                "videos": [{"name": "dense", **dense}] if dense else [],
            }
        video = clips.source(folder, row["video"])
        if video:
            who = ways[row["way"]] if row["arm"] == "dense" else f"{row['arm']}, {ways[row['way']]}"
            found[key]["videos"].append({"name": who, **video})
    return list(found.values())
