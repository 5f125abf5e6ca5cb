"""Who may compute, and when: one thread a model takes tickets in their order, and any ticket can be given back."""

import logging
import threading
from collections import deque
from collections.abc import Callable
from typing import Any, Literal

import torch

from ..errors import DiffaccelError
from ..settings import UsageError

logger = logging.getLogger(__name__)

State = Literal["waiting", "running", "done", "cancelled", "failed"]


class Cancelled(Exception):
    """Raised in the work of a ticket that was cancelled."""


class Ticket:
    """A piece of work on its way. `work(ticket)` runs in the worker's thread and calls `check` at every step; this
    raises `Cancelled` once somebody cancelled."""

    def __init__(self, work: Callable[["Ticket"], None]) -> None:
        self.work = work
        self.state: State = "waiting"
        self.problem: str | None = None
        """Why it failed, as a sentence for who asked."""
        self.overlapped = False
        """Whether another model was at work meanwhile, on the same machine."""
        self._cancelled = threading.Event()
        self._finished = threading.Event()

    @property
    def over(self) -> bool:
        return self._finished.is_set()

    def check(self) -> None:
        if self._cancelled.is_set():
            raise Cancelled

    def wait(self, seconds: float | None = None) -> bool:
        """Waits until it is over; whether it is."""
        return self._finished.wait(seconds)

    def _end(self, state: State, problem: str | None = None) -> None:
        self.state, self.problem = state, problem
        self._finished.set()


class Worker:
    """One thread for one model. At most `most_waiting` tickets wait for it."""

    _running: set["Ticket"] = set()  # of all workers of the process  # noqa: RUF012
    _lock = threading.Lock()

    def __init__(self, name: str, most_waiting: int) -> None:
        self.name, self.most_waiting = name, most_waiting
        self._waiting: deque[Ticket] = deque()
        self._current: Ticket | None = None
        self._changed = threading.Condition()
        self._stopped = False
        self._thread = threading.Thread(target=self._work, name=f"demo {name}", daemon=True)
        self._thread.start()

    def submit(self, work: Callable[[Ticket], None]) -> Ticket:
        """Raises `UsageError` if too many wait already."""
        ticket = Ticket(work)
        with self._changed:
            if len(self._waiting) >= self.most_waiting:
                raise UsageError(f"{len(self._waiting)} others wait for {self.name} already; try again in a while")
            self._waiting.append(ticket)
            self._changed.notify()
        return ticket

    def ahead(self, ticket: Ticket) -> int:
        """How many tickets come before this one, the one at work included; 0 if it is not waiting."""
        with self._changed:
            return self._waiting.index(ticket) + (self._current is not None) if ticket in self._waiting else 0

    def cancel(self, ticket: Ticket) -> None:
        """Ends a ticket: at once where it waits, before its next step where it is at work."""
        with self._changed:
            ticket._cancelled.set()
            if ticket in self._waiting:
                self._waiting.remove(ticket)
                ticket._end("cancelled")

    def close(self) -> None:
        """Cancels everything and ends the thread."""
        with self._changed:
            self._stopped = True
            tickets = [*self._waiting, *([self._current] if self._current else [])]
        for ticket in tickets:
            self.cancel(ticket)
        with self._changed:
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._stopped)
                if not self._waiting:
                    return
                ticket = self._current = self._waiting.popleft()
            try:
                self._run(ticket)
            finally:
                with self._changed:
                    self._current = None

    def _run(self, ticket: Ticket) -> None:
        with Worker._lock:
            for other in Worker._running:
                other.overlapped = ticket.overlapped = True
            Worker._running.add(ticket)
        end: tuple[Any, ...] = ("done",)
        try:
            ticket.state = "running"
            ticket.check()
            ticket.work(ticket)
        except Cancelled:
            end = ("cancelled",)
        except (DiffaccelError, UsageError) as error:
            end = ("failed", str(error))
        except torch.OutOfMemoryError:
            end = ("failed", "this takes more memory than there is; ask for fewer frames or a smaller size")
        except Exception:
            logger.exception("work for %s failed", self.name)
            end = ("failed", "something went wrong inside; the server's log says what")
        with Worker._lock:
            Worker._running.discard(ticket)
        ticket._end(*end)
