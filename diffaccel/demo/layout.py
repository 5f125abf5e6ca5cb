"""The page: a tab for each kind of request, and what connects its parts with the desk."""

import asyncio
import inspect
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from ..errors import DiffaccelError
from ..pipelines.presets import PRESETS
from ..reuse.token_count import TokenCount
from ..settings import UsageError, build_accel, describe_technique
from ..text import PRESETS as TEXT_PRESETS
from .asked import MOST_SEED, Asked, Larger, Text, Video, from_fields, from_json, to_json
from .desk import Desk
from .knobs import as_text, build_knobs, changes, held
from .result import problem

_PAGE = Path(__file__).parent / "page"
_POLL = 0.1  # seconds between two looks at a request
_NEW_SEED = f"() => Math.floor(Math.random() * {MOST_SEED + 1})"
_PRIVATE: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}


@dataclass
class Tab:
    """The parts of one tab that hold settings, how they are read and how they are filled."""

    parts: list[Any]
    read: Callable[[Sequence[Any]], Asked]
    fill: Callable[[Any], list[Any]]
    panel: Any


def build_page(desk: Desk) -> gr.Blocks:
    """The page of a desk, to be mounted."""
    with gr.Blocks(title="diffaccel", analytics_enabled=False, fill_width=True) as page:
        gr.Markdown(
            "# diffaccel\nVideo and block diffusion made faster at inference time, without training. Every figure is "
            "measured in the run it stands beside."
        )
        tabs: dict[str, Tab] = {}
        with gr.Tabs(elem_id="tabs") as chosen:
            with gr.Tab("Video", id="video"):
                tabs["video"] = _video(desk)
            if desk.models.larger:
                with gr.Tab("Larger than trained", id="larger"):
                    tabs["larger"] = _larger(desk)
            if desk.models.texts:
                with gr.Tab("Text", id="text"):
                    tabs["text"] = _text(desk)
        _sharing(desk, page, chosen, tabs)

        def leave(request: gr.Request) -> None:
            desk.leave(_page_of(request))

        page.unload(leave)
    return page


def theme() -> gr.Theme:
    """Fonts of the reader's own machine: nothing is fetched."""
    sans, mono = ["system-ui", "sans-serif"], ["ui-monospace", "monospace"]
    made = gr.themes.Base(primary_hue="indigo", font=sans, font_mono=mono)
    return made.set(block_info_text_color="*neutral_600", block_info_text_color_dark="*neutral_300")


def style() -> str:
    return (_PAGE / "demo.css").read_text(encoding="utf-8")


# -- tabs ----------------------------------------------------------------------------------------------------------


def _video(desk: Desk) -> Tab:
    usual = desk.models.usual("video")
    assert isinstance(usual, Video)
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            fields = _shared(desk, usual, list(desk.models.videos), "what the video should show")
            fields["arms"] = gr.Radio(
                list(Video.ARMS), value=usual.arms, label="make", info="both: on the same noise, one after the other"
            )
            fields["preset"] = gr.Radio(
                list(PRESETS),
                value=usual.preset,
                label="preset",
                info=" ".join(f"{name}: {_summary(preset)}" for name, preset in PRESETS.items()),
            )
            limits = desk.models.limits
            with gr.Row():
                fields["frames"] = _number(usual.frames, "frames", f"1 + 4k, at most {limits.frames}")
                fields["steps"] = _number(usual.steps, "steps", f"of each block, at most {limits.steps}")
            with gr.Row():
                fields["width"] = _number(usual.width, "width", f"pixels, at most {limits.side}")
                fields["height"] = _number(usual.height, "height", f"pixels, at most {limits.side}")
            with gr.Row():
                fields["guidance"] = _number(usual.guidance, "guidance", "1 is none")
                fields["seed"] = _seed(usual.seed)
            fields["negative"] = gr.Textbox("", label="what not to show", info="acts through guidance", max_lines=2)
            with gr.Accordion("Techniques and their knobs", open=False):
                knobs = build_knobs(build_accel(usual.preset))
        panel, start = _result()

    names, parts = list(fields), [*fields.values(), knobs]

    def read(values: Sequence[Any]) -> Asked:
        given = dict(zip(names, values, strict=False))
        return from_fields(usual, **given, set=changes(given["preset"], values[-1]))

    def fill(asked: Video) -> list[Any]:
        return [*(getattr(asked, name) for name in names), held(build_accel(asked.preset, asked.set))]

    fields["preset"].input(lambda preset: held(build_accel(preset)), fields["preset"], knobs, queue=False, **_PRIVATE)
    _follow_model(desk, "video", fields, ("frames", "width", "height", "steps", "guidance"))
    return _started(desk, Tab(parts, read, fill, panel), start, fields["prompt"])


def _larger(desk: Desk) -> Tab:
    usual = desk.models.usual("larger")
    assert isinstance(usual, Larger)
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            gr.Markdown(
                "FreeSwim: a video of the size that the model knows is made, enlarged, noised and denoised again. "
                "Every query reads a window of the known size, and passes over the whole frame steer it."
            )
            fields = _shared(desk, usual, list(desk.models.larger), "what the video should show")
            limits = desk.models.limits
            with gr.Row():
                fields["scale"] = _number(usual.scale, "times the model's size", f"sides of at most {limits.side}")
                fields["frames"] = _number(usual.frames, "frames", f"1 + 4k, at most {limits.frames}")
            with gr.Row():
                fields["steps"] = _number(usual.steps, "steps", f"of each block, at most {limits.steps}")
                fields["strength"] = _number(usual.strength, "strength", "share of the steps run again, in (0, 1]")
            with gr.Row():
                fields["guidance"] = _number(usual.guidance, "guidance", "1 is none")
                fields["seed"] = _seed(usual.seed)
            fields["guide"] = gr.Checkbox(
                usual.guide, label="guide", info="passes over the whole frame; windows alone repeat what is in it"
            )
        panel, start = _result()
    _follow_model(desk, "larger", fields, ("frames", "steps", "guidance"))
    return _started(desk, _plain(usual, fields, panel), start, fields["prompt"])


def _text(desk: Desk) -> Tab:
    usual = desk.models.usual("text")
    assert isinstance(usual, Text)
    about = describe_technique(TokenCount)
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            fields = _shared(desk, usual, list(desk.models.texts), "what the text goes on from")
            fields["preset"] = gr.Radio(
                list(TEXT_PRESETS),
                value=usual.preset,
                label="preset",
                info="finished blocks are cached in all, which is exact; fast also reuses attention to them "
                "between steps, and auto does so where the text is long enough",
            )
            with gr.Row():
                fields["tokens"] = _number(usual.tokens, "tokens", f"at most {desk.models.limits.tokens}")
                fields["threshold"] = _number(usual.threshold, "threshold", "confidence that unmasks; above 1: evenly")
            with gr.Row():
                fields["temperature"] = _number(usual.temperature, "temperature", "0 takes the likeliest token")
                fields["seed"] = _seed(usual.seed)
            fields["compare"] = gr.Checkbox(
                usual.compare, label="compare", info="also densely, and with the cache alone"
            )
            with gr.Accordion(f"{about['name']} and its knobs", open=False):
                gr.Markdown(f"{about['summary']}. ({about['paper']})")
                knobs = {
                    knob["name"]: gr.Textbox(
                        "", label=knob["name"], info=knob["help"], placeholder="as the preset has it", max_lines=1
                    )
                    for knob in about["knobs"]
                }
        panel, start = _result()

    names, parts = list(fields), [*fields.values(), *knobs.values()]

    def read(values: Sequence[Any]) -> Asked:
        given = dict(zip(names, values, strict=False))
        filled = dict(zip(knobs, values[len(names) :], strict=True))
        given["set"] = tuple(f"reuse.{name}={as_text(value)}" for name, value in filled.items() if value.strip())
        return from_fields(usual, **given)

    def fill(asked: Text) -> list[Any]:
        found = dict(change.removeprefix("reuse.").partition("=")[::2] for change in asked.set)
        if strange := [name for name in found if name not in knobs]:
            raise UsageError(f"the tab text sets {' and '.join(f'reuse.{name}' for name in knobs)}, not {strange[0]}")
        return [*(getattr(asked, name) for name in names), *(found.get(name, "") for name in knobs)]

    return _started(desk, Tab(parts, read, fill, panel), start, fields["prompt"])


def _plain(usual: Asked, fields: dict[str, Any], panel: Any) -> Tab:
    """A tab whose parts are its settings, one each."""
    return Tab(
        list(fields.values()),
        lambda values: from_fields(usual, **dict(zip(fields, values, strict=True))),
        lambda asked: [getattr(asked, name) for name in fields],
        panel,
    )


# -- parts of a tab ------------------------------------------------------------------------------------------------


def _shared(desk: Desk, usual: Asked, models: Sequence[str], about: str) -> dict[str, Any]:
    return {
        "prompt": gr.Textbox(
            usual.prompt,
            label="prompt",
            info=f"{about}; Enter starts, at most {desk.models.limits.prompt} characters",
            max_lines=4,
            elem_id=f"prompt-{usual.tab}",
        ),
        "model": gr.Dropdown(list(models), value=usual.model, label="model", elem_id=f"model-{usual.tab}"),
    }


def _number(value: float, label: str, info: str) -> gr.Number:
    return gr.Number(value, label=label, info=info, min_width=120)


def _seed(value: int) -> gr.Number:
    with gr.Column(min_width=120):
        seed = gr.Number(value, label="seed", info="of the noise", min_width=120)
        gr.Button("New seed", size="sm").click(None, None, seed, js=_NEW_SEED, **_PRIVATE)
    return seed


def _result() -> tuple[Any, tuple[gr.Button, gr.Button]]:
    """Right-hand side: buttons, and the panel that shows what comes."""
    with gr.Column(scale=3, min_width=320):
        with gr.Row():
            start = gr.Button("Generate", variant="primary", min_width=120)
            cancel = gr.Button("Cancel", interactive=False, min_width=120)
        panel = _html("panel.html", "panel.js")
    return panel, (start, cancel)


def _html(template: str, script: str) -> gr.HTML:
    return gr.HTML(
        value={},
        html_template=(_PAGE / template).read_text(encoding="utf-8"),
        js_on_load=(_PAGE / script).read_text(encoding="utf-8"),
        apply_default_css=False,
    )


def _follow_model(desk: Desk, tab: str, fields: dict[str, Any], names: Sequence[str]) -> None:
    """Another model brings the numbers that it was made for."""

    def usual(model: str) -> list[Any]:
        asked = desk.models.usual(tab, model)
        return [getattr(asked, name) for name in names]

    fields["model"].input(usual, fields["model"], [fields[name] for name in names], queue=False, **_PRIVATE)


def _started(desk: Desk, tab: Tab, buttons: tuple[gr.Button, gr.Button], prompt: gr.Textbox) -> Tab:
    """Connects the buttons of a tab."""
    start, cancel = buttons

    async def run(request: gr.Request, *values: Any) -> AsyncIterator[Any]:
        try:
            job = desk.submit(_page_of(request), tab.read(values))
        except (UsageError, DiffaccelError) as error:
            yield problem(str(error)), gr.skip(), gr.skip()
            return
        yield job.state(), gr.Button(interactive=False), gr.Button(interactive=True)
        shown = None
        while not job.ticket.over:
            if (state := job.state()) != shown:
                shown = state
                yield state, gr.skip(), gr.skip()
            await asyncio.sleep(_POLL)
        yield job.state(), gr.Button(interactive=True), gr.Button(interactive=False)

    gr.on([start.click, prompt.submit], run, tab.parts, [tab.panel, start, cancel], concurrency_limit=None, **_PRIVATE)

    def stop(request: gr.Request) -> None:
        desk.cancel(_page_of(request))

    cancel.click(stop, queue=False, **_PRIVATE)
    return tab


# -- settings ------------------------------------------------------------------------------------------------------


def _sharing(desk: Desk, page: gr.Blocks, chosen: gr.Tabs, tabs: dict[str, Tab]) -> None:
    """Settings as JSON, to copy and to load, and as a link."""
    everything = [part for tab in tabs.values() for part in tab.parts]
    with gr.Accordion("Share settings", open=False):
        gr.Markdown("The address of this page holds what was made last; it can be shared as it is.")
        box = gr.Textbox(label="settings", lines=3, max_lines=8, buttons=["copy"], elem_id="settings")
        with gr.Row():
            shows = {name: gr.Button(f"Show those of {name}", size="sm", min_width=140) for name in tabs}
            load = gr.Button("Load these", size="sm", min_width=140)
    said = gr.HTML(
        value={},
        html_template='<div class="da-say"><p role="alert" hidden></p><a hidden>Link to these settings</a></div>',
        js_on_load=(_PAGE / "say.js").read_text(encoding="utf-8"),
        apply_default_css=False,
    )

    def loaded(text: str) -> list[Any]:
        if not text.strip():
            return [gr.skip()] * (len(everything) + 2)
        try:
            asked = from_json(text, desk.models.usual)
            if asked.tab not in tabs:
                raise UsageError(f"these settings are for the tab {asked.tab}, which this page does not have")
            desk.models.of(asked)
            filled = tabs[asked.tab].fill(asked)
        except (UsageError, DiffaccelError) as error:
            return [*([gr.skip()] * (len(everything) + 1)), {"text": str(error), "bad": True}]
        others = {name: [gr.skip()] * len(tab.parts) for name, tab in tabs.items()}
        values = [value for name in tabs for value in (filled if name == asked.tab else others[name])]
        return [*values, gr.Tabs(selected=asked.tab), {"text": f"Settings of the tab {asked.tab} are loaded."}]

    def from_address(request: gr.Request) -> list[Any]:
        return loaded(request.query_params.get("settings", ""))

    def show(name: str) -> Callable[..., Any]:
        def shown(*values: Any) -> tuple[Any, Any]:
            try:
                settings = to_json(tabs[name].read(values))
            except (UsageError, DiffaccelError) as error:
                return gr.skip(), {"text": str(error), "bad": True}
            return settings, {"settings": settings}

        return shown

    outputs = [*everything, chosen, said]
    load.click(loaded, box, outputs, queue=False, **_PRIVATE)
    page.load(from_address, None, outputs, queue=False, **_PRIVATE)
    for name, button in shows.items():
        button.click(show(name), tabs[name].parts, [box, said], queue=False, **_PRIVATE)


def _page_of(request: gr.Request) -> str:
    return str(request.session_hash)


def _summary(function: Callable[..., Any]) -> str:
    """The first sentence of its docstring."""
    text = " ".join((inspect.getdoc(function) or "").replace("`", "").split())
    return text.split(". ")[0].split(": ")[0].rstrip(".") + "."
