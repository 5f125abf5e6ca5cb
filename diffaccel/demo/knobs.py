"""Techniques and their knobs as one part of a page, to and from the `--set` changes of the command line.

What the part holds: `{"methods": {slot: technique or "none"}, "knobs": {slot: {knob: text}}, "kernel": name}`, with
the knobs of the chosen techniques alone. A field of Gradio's own for every knob of every technique would be some 300,
and each event of the page would carry and go through them all.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gradio as gr

from ..accel import Accel
from ..kernel import CHOICES
from ..pipelines.presets import PRESETS
from ..policy import SLOTS, Policy
from ..settings import UsageError, describe_technique
from ..techniques import TECHNIQUES
from .asked import FILE_KNOBS

_PAGE = Path(__file__).parent / "page"
QUESTIONS = {
    "cache": "what is kept of earlier blocks?",
    "selection": "what is worth reading there?",
    "prompt": "which tokens of the prompt are worth reading?",
    "reuse": "is attention to earlier blocks needed again at this step?",
    "window": "where may a query look?",
}


def build_knobs(accel: Accel) -> gr.HTML:
    """Puts the part on the page that is being built."""
    # In the script, as Gradio loses further props of a part that is updated before it is first shown; as JSON in a
    # string, as Gradio takes every name that stands in plain quotes there for that of an event.
    catalog = json.dumps(json.dumps({"slots": [_slot(slot) for slot in SLOTS], "kernels": list(CHOICES)}))
    return gr.HTML(
        value=held(accel),
        html_template='<div class="da-knobs"></div>',
        js_on_load=f"const catalog = JSON.parse({catalog});\n{(_PAGE / 'knobs.js').read_text(encoding='utf-8')}",
        apply_default_css=False,
    )


def held(accel: Accel) -> dict[str, Any]:
    """What the part holds for an `Accel`."""
    policies = accel.policies()
    return {
        "methods": {slot: type(policies[slot]).__name__ if slot in policies else "none" for slot in SLOTS},
        "knobs": {slot: _texts(policy) for slot, policy in policies.items()},
        "kernel": accel.kernel,
    }


def changes(preset: str, value: Any) -> tuple[str, ...]:
    """What was changed from the preset, as `build_accel` takes it. Raises `UsageError` for a value of another form."""
    methods, knobs, kernel = _parts(value)
    policies, found = PRESETS[preset]().policies(), []
    for slot, method in methods.items():
        policy = policies.get(slot)
        same = policy is not None and type(policy).__name__ == method
        if not same and (policy is not None or method != "none"):
            found.append(f"{slot}={method}")
        if method == "none":
            continue
        technique = next((one for one in TECHNIQUES if (one.slot, one.__name__) == (slot, method)), None)
        before = _texts(policy if same and policy is not None else technique()) if technique else {}
        for name, text in knobs.get(slot, {}).items():
            if (text := str(text).strip()) not in ("", before.get(name)):
                found.append(f"{slot}.{name}={text}")
    return (*found, *([f"kernel={kernel}"] if kernel != "auto" else []))


def as_text(value: Any) -> str:
    """As the command line takes it."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (tuple, list)):
        return ",".join(map(as_text, value))
    return str(value).strip()


def _parts(value: Any) -> tuple[dict[str, str], dict[str, dict[str, str]], str]:
    """A page's value, which anybody can send."""
    methods, knobs = ((value.get(name) if isinstance(value, Mapping) else None) for name in ("methods", "knobs"))
    if not isinstance(methods, Mapping) or not isinstance(knobs, Mapping):
        raise UsageError("techniques come as a table of methods and one of knobs; load the page anew")
    if not all(isinstance(texts, Mapping) for texts in knobs.values()):
        raise UsageError("knobs come as a table of texts for each slot; load the page anew")
    return dict(methods), {slot: dict(texts) for slot, texts in knobs.items()}, str(value.get("kernel", "auto"))


def _texts(policy: Policy) -> dict[str, str]:
    return {name: as_text(value) for name, value in policy.values().items() if name not in FILE_KNOBS}


def _slot(slot: str) -> dict[str, Any]:
    techniques = [technique for technique in TECHNIQUES if technique.slot == slot]
    return {"name": slot, "question": QUESTIONS[slot], "techniques": [_technique(one) for one in techniques]}


def _technique(technique: type[Policy]) -> dict[str, Any]:
    about = describe_technique(technique)
    knobs = [knob for knob in about["knobs"] if knob["name"] not in FILE_KNOBS]
    return {
        "name": about["name"],
        "about": f"{about['name']} {about['summary']}. ({about['paper']})",
        "knobs": [
            {
                "name": knob["name"],
                "help": knob["help"],
                "type": knob["type"],
                "default": as_text(knob["default"]),
                "choices": _choices(knob),
            }
            for knob in knobs
        ],
    }


def _choices(knob: dict[str, Any]) -> list[str] | None:
    """What there is to choose from, None where anything may be typed."""
    if isinstance(knob["default"], bool):
        return ["true", "false"]
    if not knob["choices"]:
        return None
    return [*(["none"] if knob["type"].endswith("none") else []), *map(as_text, knob["choices"])]
