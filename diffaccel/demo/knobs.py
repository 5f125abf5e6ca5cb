"""Techniques and their knobs as parts of a page, to and from the `--set` changes of the command line."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import gradio as gr

from ..accel import Accel
from ..kernel import CHOICES
from ..pipelines.presets import PRESETS
from ..policy import SLOTS, Policy
from ..settings import build_accel, describe_technique
from ..techniques import TECHNIQUES
from .asked import FILE_KNOBS

QUESTIONS = {
    "cache": "what is kept of earlier blocks?",
    "selection": "what is worth reading there?",
    "prompt": "which tokens of the prompt are worth reading?",
    "reuse": "is attention to earlier blocks needed again at this step?",
    "window": "where may a query look?",
}


@dataclasses.dataclass
class Knobs:
    """The parts, in the order in which `changes` takes their values and `values` gives them."""

    methods: dict[str, gr.Dropdown] = dataclasses.field(default_factory=dict)
    knobs: dict[tuple[type[Policy], str], Any] = dataclasses.field(default_factory=dict)
    kernel: Any = None

    @property
    def parts(self) -> list[Any]:
        return [*self.methods.values(), *self.knobs.values(), self.kernel]

    def changes(self, preset: str, values: Sequence[Any]) -> tuple[str, ...]:
        """What was changed from the preset, as `build_accel` takes it."""
        methods = dict(zip(self.methods, values, strict=False))
        knobs = dict(zip(self.knobs, values[len(methods) :], strict=False))
        policies, found = PRESETS[preset]().policies(), []
        for slot, method in methods.items():
            policy = policies.get(slot)
            same = policy is not None and type(policy).__name__ == method
            if not same and (policy is not None or method != "none"):
                found.append(f"{slot}={method}")
            for (technique, name), value in knobs.items():
                if technique.__name__ == method and technique.slot == slot:
                    before = (policy if same and policy is not None else technique()).values()[name]
                    if (text := as_text(value)) not in ("", as_text(before)):
                        found.append(f"{slot}.{name}={text}")
        kernel = values[-1]
        return (*found, *([f"kernel={kernel}"] if kernel != "auto" else []))

    def values(self, accel: Accel) -> list[Any]:
        """What the parts hold for an `Accel`; techniques that it lacks have their defaults."""
        policies = accel.policies()
        methods = [type(policies[slot]).__name__ if slot in policies else "none" for slot in self.methods]
        knobs = []
        for technique, name in self.knobs:
            policy = policies.get(technique.slot)
            value = (policy if isinstance(policy, technique) else technique()).values()[name]
            knobs.append(value if isinstance(value, bool) else as_text(value))
        return [*methods, *knobs, accel.kernel]


def build_knobs(preset: str, changes: Sequence[str] = ()) -> Knobs:
    """Puts them on the page that is being built; a technique's knobs show while it is chosen."""
    made, accel = Knobs(), build_accel(preset, changes)
    chosen = {slot: type(policy).__name__ for slot, policy in accel.policies().items()}
    for slot in SLOTS:
        here = [technique for technique in TECHNIQUES if technique.slot == slot]
        names = ["none", *(technique.__name__ for technique in here)]
        made.methods[slot] = gr.Dropdown(names, value="none", label=slot, info=QUESTIONS[slot], elem_id=f"slot-{slot}")
        groups = []
        for technique in here:
            with gr.Column(visible=chosen.get(slot) == technique.__name__) as group:
                about = describe_technique(technique)
                gr.Markdown(f"{technique.__name__} {about['summary']}. ({about['paper']})")
                knobs = [knob for knob in about["knobs"] if knob["name"] not in FILE_KNOBS]
                with gr.Accordion(f"Knobs of {technique.__name__}", open=False, visible=bool(knobs)):
                    for knob in knobs:
                        made.knobs[technique, knob["name"]] = _part(technique.__name__, knob)
            groups.append(group)
        made.methods[slot].change(
            lambda method, names=names: [gr.Column(visible=method == name) for name in names[1:]],
            made.methods[slot],
            groups,
            queue=False,
            show_progress="hidden",
            api_visibility="private",
        )
    made.kernel = gr.Dropdown(list(CHOICES), value="auto", label="kernel", info="auto takes the fastest that can run")
    for part, value in zip(made.parts, made.values(accel), strict=True):
        part.value = value
    return made


def as_text(value: Any) -> str:
    """As the command line takes it."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (tuple, list)):
        return ",".join(map(as_text, value))
    return str(value).strip()


def _part(technique: str, knob: dict[str, Any]) -> Any:
    shared = {"label": knob["name"], "info": knob["help"], "elem_id": f"knob-{technique}-{knob['name']}"}
    if knob["choices"]:
        none = ["none"] if knob["type"].endswith("none") else []
        return gr.Dropdown([*none, *knob["choices"]], **shared)
    if isinstance(knob["default"], bool):
        return gr.Checkbox(**shared)
    return gr.Textbox(max_lines=1, placeholder=knob["type"], **shared)
