"""`diffaccel tune`: the setting that serves a target best, as a preset file."""

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from ..settings import build_accel, describe_accel
from .asked import (
    Call,
    Compiling,
    Device,
    Dtype,
    Frames,
    Guidance,
    Kind,
    Model,
    Negative,
    Offload,
    PromptsFile,
    Restart,
    Sampler,
    Seed,
    Size,
    Steps,
    Texts,
    compile_blocks,
    measures_of,
    open_setup,
    unique_prompts,
    working,
)
from .checks import check_arguments, check_parent, fail, one_sentence, require, say
from .eval_show import show_frontier, show_quality, write_page
from .show import readable

if TYPE_CHECKING:
    from ..accel import Accel
    from ..eval.arms import Setup
    from ..eval.goal import Final, Goal
    from ..eval.tune import Candidate, Search

_PROMPTS = 2  # of the bundled model's own, where none is given


def tune(
    texts: Texts = None,
    out: Annotated[Path, typer.Option("-o", "--out", help="the preset; results lie beside it")] = Path("preset.toml"),
    target_psnr: Annotated[
        float | None, typer.Option(metavar="DB", help="the fastest of those so near to dense on every prompt")
    ] = None,
    target_speedup: Annotated[
        float | None,
        typer.Option(metavar="TIMES", help="the nearest to dense of those that denoise so much faster"),
    ] = None,
    memory: Annotated[
        str | None, typer.Option(metavar="8GB", help="the nearest to dense of those whose peak fits (on a CPU: caches)")
    ] = None,
    minutes: Annotated[float, typer.Option(help="of measuring; asked again with more, a search goes on")] = 10.0,
    prompts_file: PromptsFile = None,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="SLOT[.KNOB]=VALUE", help="is not searched; as in generate"),
    ] = None,
    seed: Seed = 0,
    model: Model = None,
    frames: Frames = None,
    size: Size = None,
    steps: Steps = None,
    guidance: Guidance = None,
    negative: Negative = None,
    dtype: Dtype = None,
    device: Device = None,
    offload: Offload = "none",
    pipeline: Kind = None,
    sampler: Sampler = None,
    compiling: Compiling = "auto",
    restart: Restart = False,
) -> None:
    """Search for the setting that serves a target best; `generate --preset FILE` then takes it.

    Settings are tried by successive halving within --minutes: on one prompt, the better half on more. The best are
    measured anew beside dense attention, alternating, into a folder that `diffaccel report` reads. Exit code 1, and no
    preset, where nothing reaches the target.
    """
    with one_sentence():
        from ..calibrate import PROMPTS
        from ..eval.finals import Generations, chosen, generations_kept, measure_finalists, space_of
        from ..eval.store import Store
        from ..eval.tune import FINALISTS, Search, check_optuna

        goal, fixed = _goal(target_psnr, target_speedup, memory), changes or []
        require(minutes > 0, f"--minutes must be above 0, got {minutes:g}")
        require(out.suffix.lower() == ".toml" and not out.is_dir(), f"-o must name a .toml file, got '{out}'")
        check_parent(out)
        build_accel("exact", fixed)
        check_optuna()
        given = unique_prompts(texts, prompts_file) if texts or prompts_file else list(PROMPTS[:_PROMPTS])
        folder, call = out.with_suffix(".tune"), Call(frames, size, steps, guidance, negative, sampler)
        setup, ranks = open_setup(
            folder, _dense(fixed), given, [seed], call, model, pipeline, dtype, device, offload, 16.0
        )
        require(ranks.count == 1, "tune measures in one process; start it without the launcher")
        require(
            goal.kind != "memory" or setup.causal or setup.device.type == "cuda",
            f"--memory is the caches' on a CPU, and {type(setup.pipe).__name__} keeps none; use a GPU",
        )
        measures = measures_of(setup, None, None, None)
        compile_blocks(compiling, setup, 8 * len(given))
        if restart:
            Store(folder).clear()
        folder.mkdir(exist_ok=True)
        store = Store(folder / "search", note=lambda sentence: say(f"note: {sentence}"))
        asked = {**setup.asked("tune"), "arms": {}}  # rows are of settings, whatever is searched for
        store.ask(asked, restart=restart)
        with working(setup, "tune") as (setup, progress):
            search = Search(
                goal,
                space_of(setup, goal, fixed),
                Generations(setup),
                store,
                len(given),
                60 * minutes,
                lambda asked: _build(setup, asked),
                seed=seed,
                keep=generations_kept(len(given), FINALISTS),
                tell=lambda label: progress.arm(label, 0, 0),
            )
            _check_floor(search, goal)
            candidates = search.run()
            finalists = search.finalists(candidates)
            typer.echo(f"{_tried(search)}; {len(finalists)} of them measured anew")
            if not finalists:
                _give_up(search, goal, search.nearest(candidates))
            measured = measure_finalists(setup, finalists, measures, progress)
        summary = show_quality(folder)
        show_frontier(Store(folder).rows("frontier"))
        write_page(folder)
        kept = chosen(goal, measured)
        if kept is None:
            _give_up(search, goal, *min(measured, key=lambda pair: goal.missing(pair[1].figures)))
        _write(out, setup, goal, kept, summary)


def _goal(psnr: float | None, speedup: float | None, memory: str | None) -> "Goal":
    from ..cache.budget import parse_bytes
    from ..eval.goal import Goal

    asked = [psnr, speedup, memory]
    count = sum(target is not None for target in asked)
    require(
        count == 1, f"tune takes one of --target-psnr, --target-speedup and --memory, got {count or 'none'} of them"
    )
    if psnr is not None:
        return Goal("psnr", psnr)
    return Goal("speedup", speedup) if speedup is not None else Goal("memory", float(parse_bytes(str(memory))))


def _dense(fixed: Sequence[str]) -> Any:
    """What a setup is opened with: dense attention by the kernel that is asked for."""
    from ..eval.arms import Arm

    kernel = [change for change in fixed if change.partition("=")[0].strip() == "kernel"]
    return lambda causal: {"exact": Arm(build_accel("exact", ["prompt=none", *kernel]))}


def _build(setup: "Setup", changes: Sequence[str]) -> "Accel":
    """A setting that the pipeline takes; of what it takes, the prompts were checked when it was opened."""
    accel = build_accel("exact", changes)
    arguments = {name: value for name, value in setup.arguments.items() if name != "negative_prompt"}
    check_arguments(setup.pipe, accel, arguments, [])
    return accel


def _check_floor(search: "Search", goal: "Goal") -> None:
    if goal.kind == "psnr" and goal.missing(floor := search.floor()) > 0:
        fail(
            f"no setting can be told to reach {goal}: dense attention that is rounded otherwise is {floor.psnr:.1f} dB "
            "from itself here; ask for less, or for --dtype float32; no preset was written",
            1,
        )


def _tried(search: "Search") -> str:
    whole = sum(candidate.prompts == search.prompts for candidate in search.tried.values())
    idle = sum(candidate.idle is not None for candidate in search.tried.values())
    notes = [f"{whole} of them on all prompts"]
    notes += [f"{idle} with a technique that never engaged"] if idle else []
    return f"{len(search.tried)} settings were tried, {', '.join(notes)}; {search.stopped}"


def _give_up(search: "Search", goal: "Goal", nearest: "Candidate | None", final: "Final | None" = None) -> NoReturn:
    """Say what came nearest, and exit with 1."""
    if nearest is None:
        fail(f"no setting was measured: {_tried(search)}; give it more --minutes; no preset was written", 1)
    figures = nearest.figures if final is None else final.figures
    if goal.missing(figures) <= 0:  # a speed-up that is none
        why = (
            f"has {figures.psnr:.1f} dB and {figures.speedups[0]:.2f} times dense's speed, within the spread of rounds"
        )
        fail(f"no setting that reaches {goal} is faster than dense: {nearest.name} {why}; no preset was written", 1)
    fail(
        f"no setting reached {goal}: the nearest, {nearest.name}, has {goal.missed_by(figures)}; ask for less, or give "
        f"it more --minutes; no preset was written ({_tried(search)})",
        1,
    )


def _write(out: Path, setup: "Setup", goal: "Goal", kept: "tuple[Candidate, Final]", summary: dict[str, Any]) -> None:
    from ..eval.runs import DENSE_WAYS
    from ..eval.summary import WAYS
    from ..preset_file import write_preset

    (candidate, final), asked = kept, setup.asked("tune")
    height, width = asked["size"]
    found, dense = summary["arms"][final.name], summary["arms"]["dense"]
    free = found["free_running"]["worst"]["psnr_pooled"]
    scale = {WAYS[way]: dense[way]["worst"]["psnr_pooled"] for way in DENSE_WAYS}
    least, middle, most = final.seconds
    comments = [
        f"Written by diffaccel tune for {goal}, {datetime.now(UTC):%Y-%m-%d}.",
        asked["command"],
        f"Measured on {asked['model']}: {asked['frames']} frames of {width}x{height}, {asked['steps']} steps, guidance "
        f"{asked['guidance']}, {len(asked['prompts'])} prompts, seed {asked['seeds'][0]}",
        ", ".join(f"{name} {value}" for name, value in {**asked["environment"], **asked["versions"]}.items()),
        f"PSNR to dense, least of all prompts: {_decibel(final.figures.psnr)}"
        + (f" with shared history, {_decibel(free)} free-running" if setup.causal else "")
        + "; " + ", ".join(f"{way} {_decibel(value)}" for way, value in scale.items()),
        f"Denoising: {middle:.2f} s ({least:.2f} to {most:.2f}), dense {final.dense[1]:.2f} s "
        f"({final.dense[0]:.2f} to {final.dense[2]:.2f}): {final.figures.speedups[0]:.2f} times as fast",
    ]  # fmt: skip
    if final.figures.bytes is not None:
        where = "Peak memory" if setup.device.type == "cuda" else "Held by caches"
        comments.append(f"{where}: {readable(final.figures.bytes)}")
    write_preset(out, candidate.accel, comments)
    typer.echo("\n".join([f"{out}: {describe_accel(candidate.accel)}", *comments[4:]]))
    typer.echo(f"use it: diffaccel generate PROMPT --preset {out}")


def _decibel(value: float | None) -> str:
    return "identical" if value is None or value == float("inf") else f"{value:.1f} dB"
