"""VBench and VBench-Long: videos under the names they expect, and their scores where the package is installed."""

import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..report import write_json
from .store import EvalError

CUSTOM = (
    "subject_consistency",
    "background_consistency",
    "temporal_flickering",
    "motion_smoothness",
    "dynamic_degree",
    "aesthetic_quality",
    "imaging_quality",
)
"""Dimensions that VBench measures on prompts of one's own. The others belong to its own prompts."""

LONG_CUSTOM = tuple(name for name in CUSTOM if name != "temporal_flickering")
"""The same of VBench-Long."""

_LONG = {
    "clip_length_config": "clip_length_mix.yaml",
    "sb_clip2clip_feat_extractor": "dino",
    "bg_clip2clip_feat_extractor": "clip",
    "w_inclip": 1.0,
    "w_clip2clip": 0.0,
    "use_semantic_splitting": False,
    "dev_flag": False,
    "num_of_samples_per_prompt": 5,
    "static_filter_flag": False,
    "imaging_quality_preprocessing_mode": "longer",
}  # what its own command passes where nothing is said


def video_name(prompt: str, index: int) -> str:
    """`{prompt}-{index}.mp4`, which is how VBench finds a video of a prompt.

    A prompt of VBench's stays as it is. Of others, what no file name can hold becomes a space, and the end of what is
    longer than 240 bytes is cut.
    """
    plain = re.sub(r"\s+", " ", re.sub(r"[/\\\x00-\x1f]", " ", prompt)).strip().lstrip(".") or "video"
    return f"{plain.encode()[:240].decode(errors='ignore').rstrip()}-{index}.mp4"


def lay_out(folder: Path, rows: Sequence[Mapping[str, Any]], seeds: Sequence[int]) -> dict[str, Path]:
    """`vbench/ARM/` of an evaluation's folder, with the free-running videos of every arm and of dense attention, and
    `prompts.json` beside, which gives each video's prompt. Gives the folder of each arm.

    Raises `EvalError` where two prompts become one name.
    """
    root = folder / "vbench"
    videos: dict[str, dict[str, tuple[str, str]]] = {}
    for row in rows:
        if row["way"] == "free_running":
            name = video_name(row["text"], list(seeds).index(row["seed"]))
            for arm, file in ((row["arm"], row["video"]), ("dense", row["dense"])):
                held = videos.setdefault(arm, {}).setdefault(name, (file, row["text"]))
                if held[0] != file:
                    raise EvalError(
                        f"two prompts become the one name '{name}' for VBench: {held[1]!r} and {row['text']!r}; "
                        "change one of them"
                    )
    places = {}
    for arm, files in videos.items():
        from .arms import file_name

        place = root / file_name(arm)
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        for name, (file, _) in files.items():
            _link(folder / file, place / name)
        write_json(root / f"{file_name(arm)}.prompts.json", {name: text for name, (_, text) in files.items()})
        places[arm] = place
    return places


def missing(long: bool) -> str | None:
    """Why VBench cannot be run here, or None."""
    import importlib.util

    if importlib.util.find_spec("vbench2_beta_long" if long else "vbench") is None:
        name = "VBench-Long" if long else "VBench"
        return (
            f"{name} is not installed here, so its scores were not measured; its releases pin old versions of "
            "transformers and numpy: give it an environment of its own, and run it there on the videos laid out for it"
        )
    return None


def evaluate(
    places: Mapping[str, Path], out: Path, *, device: Any, long: bool = False, dimensions: Sequence[str] | None = None
) -> dict[str, dict[str, float]]:
    """Run VBench (or VBench-Long) over the folders of `lay_out`: the score of every arm and dimension.

    On the prompts of VBench's own suite all that were asked for are measured, in its standard mode; else the dimensions
    that it takes for prompts of one's own. Its files and `scores.json` go into `out`.
    """
    import vbench

    suite = Path(vbench.__file__).parent / "VBench_full_info.json"
    known = {entry["prompt_en"] for entry in json.loads(suite.read_text("utf-8"))} if suite.is_file() else set()
    scores: dict[str, dict[str, float]] = {}
    for arm, place in places.items():
        prompts = json.loads((place.parent / f"{place.name}.prompts.json").read_text("utf-8"))
        standard = set(prompts.values()) <= known
        name, asked = place.name, list(dimensions or (LONG_CUSTOM if long else CUSTOM))
        if long:
            import vbench2_beta_long as beta

            mode = "long_vbench_standard" if standard else "long_custom_input"
            here = Path(beta.__file__).parent / "configs"
            files = {
                "slow_fast_eval_config": str(here / "slow_fast_params.yaml"),
                "sb_mapping_file_path": str(here / "subject_mapping_table.yaml"),
                "bg_mapping_file_path": str(here / "background_mapping_table.yaml"),
            }
            judge: Any = beta.VBenchLong(device, str(suite), str(out))
            judge.evaluate(str(place), name, dimension_list=asked, mode=mode, **_LONG, **files)
        else:
            mode = "vbench_standard" if standard else "custom_input"
            judge = vbench.VBench(device, str(suite), str(out))
            judge.evaluate(str(place), name, prompt_list=[] if standard else prompts, dimension_list=asked, mode=mode)
        found = json.loads((out / f"{name}_eval_results.json").read_text("utf-8"))
        scores[arm] = {dimension: float(values[0]) for dimension, values in found.items()}
    write_json(out / "scores.json", scores)
    return scores


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)
