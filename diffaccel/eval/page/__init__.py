"""The page of a report: one file that opens offline, with its style, script and videos inside."""

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from ...version import __version__

_HERE = Path(__file__).parent


def render(title: str, folders: Sequence[Mapping[str, Any]], videos: Sequence[str], beside: bool) -> str:
    """The HTML of a report on `folders` (`report.Folder.page`); `videos` are base64, `beside` whether others are files.

    Everything that is put in is escaped. The page's own policy allows no script or style but those written here, and
    no address but the videos'.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    style, script = ((_HERE / name).read_text("utf-8") for name in ("page.css", "page.js"))
    sources = "blob: 'self' file:" if beside else "blob:"
    policy = (
        f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; media-src {sources}; "
        "base-uri 'none'; form-action 'none'"
    )
    return environment.get_template("page.html.j2").render(
        title=title,
        folders=folders,
        videos=videos,
        policy=policy,
        style=Markup(style),
        script=Markup(script),
        version=__version__,
        data=_data,
    )


def _data(value: Any) -> Markup:
    """JSON that can stand in a script element: nothing in it ends the element."""
    text = json.dumps(value, allow_nan=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
