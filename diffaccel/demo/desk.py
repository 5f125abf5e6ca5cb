"""Where pages hand in what they ask for, and where what came of it is found again."""

import dataclasses
import tempfile
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from ..cli.job import slugs
from ..settings import UsageError
from .asked import Asked
from .models import Models
from .result import Result
from .worker import Ticket, Worker

MOST_KEPT = 30
"""Results that stay in memory, and their files in a folder that is not the user's own."""


@dataclasses.dataclass(frozen=True)
class Request:
    """One request on its way."""

    ticket: Ticket
    result: Result
    worker: Worker

    def state(self) -> dict[str, Any]:
        return self.result.state(self.ticket, self.worker)

    def cancel(self) -> None:
        self.worker.cancel(self.ticket)


class Desk:
    """Takes requests, one at a time from each page, and keeps the newest results.

    Args:
        models: what may be asked for.
        folder: where videos are kept; None keeps those of the newest results, in a folder that goes with the server.
    """

    def __init__(self, models: Models, folder: Path | None = None) -> None:
        self.models = models
        self._temporary = tempfile.TemporaryDirectory(prefix="diffaccel-demo-") if folder is None else None
        self.folder = Path(self._temporary.name) if self._temporary else Path(folder or "")
        self.folder.mkdir(exist_ok=True)
        self._of_page: dict[str, Request] = {}
        self._results: OrderedDict[str, Result] = OrderedDict()

    def submit(self, page: str, asked: Asked) -> Request:
        """Raises `UsageError` or `KnobError` for what cannot be had, and while the page waits for something else."""
        before = self._of_page.get(page)
        if before is not None and not before.ticket.over:
            raise UsageError("this page is waiting for something already; cancel that first")
        model = self.models.of(asked)
        check, make = _work_of(asked)
        check(asked, model, self.models.limits)
        result = Result(asked, name=slugs([asked.prompt])[0])
        result.name += f"-{result.key[:6].strip('-_')}"
        result.folder = self.folder
        ticket = model.worker.submit(partial(make, asked, model, result))
        self._of_page[page] = Request(ticket, result, model.worker)
        self._results[result.key] = result
        self._forget()
        return self._of_page[page]

    def cancel(self, page: str) -> None:
        """Ends what a page waits for, if anything."""
        if (request := self._of_page.get(page)) is not None:
            request.cancel()

    def leave(self, page: str) -> None:
        """A page was closed: what it waited for ends."""
        self.cancel(page)
        self._of_page.pop(page, None)

    def result(self, key: str) -> Result:
        """Raises `KeyError` if there is none of that key."""
        return self._results[key]

    def close(self) -> None:
        """Cancels what pages wait for; a temporary folder goes, once nothing is written there."""
        for request in self._of_page.values():
            request.cancel()
            request.ticket.wait()
        if self._temporary is not None:
            self._temporary.cleanup()

    def _forget(self) -> None:
        at_work = {request.result.key for request in self._of_page.values() if not request.ticket.over}
        for key in list(self._results)[:-MOST_KEPT]:
            if key in at_work:
                continue
            result = self._results.pop(key)
            for clip in result.clips if self._temporary is not None else ():
                if clip.file is not None:
                    clip.file.unlink(missing_ok=True)


def _work_of(asked: Asked) -> tuple[Callable[..., None], Callable[..., None]]:
    """How a request is checked, and how it is made; the model's libraries are imported by now."""
    from . import enlarging, making, writing

    works: dict[str, tuple[Callable[..., None], Callable[..., None]]] = {
        "video": (making.check_video, making.make_video),
        "larger": (enlarging.check_larger, enlarging.make_larger),
        "text": (writing.check_text, writing.write_text),
    }
    return works[asked.tab]
