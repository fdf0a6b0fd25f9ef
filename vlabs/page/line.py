"""A queue of requests: they are processed one at a time, and only while their client is listening.

The messages are those of Gradio's queue (its protocol `sse_v3`), which its page and its clients understand.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import threading
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

from vlabs.errors import UserError

Message = dict[str, Any]

_CLOSE: Message = {"msg": "close_stream", "event_id": None}
_BEAT = 10.0  # seconds between heartbeats
_UNHEARD = 20.0  # seconds after which a request without a listener is dropped


@dataclass
class Job:
    """A request.

    Attributes:
        session: the client's session.
        work: computes the values of the outputs.
        id: id of the request.
        came: time of its arrival.
        done: nothing is left to do, and its session is told.
    """

    session: str
    work: Callable[[], list[Any]]
    id: str = field(default_factory=lambda: secrets.token_hex(16))
    came: float = field(default_factory=time.monotonic)
    done: bool = False


class Line:
    """The waiting requests and the current one. An event loop adds requests, and another thread processes them.

    Args:
        most: largest number of requests.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._jobs: dict[str, Job] = {}  # in the order of arrival
        self._listeners: dict[str, Callable[[Message], None]] = {}
        self._begun: str | None = None
        self._changed = threading.Condition()

    def join(self, session: str, work: Callable[[], list[Any]]) -> str:
        """Add a request, and return its id.

        Raises:
            UserError: the queue is full.
        """
        job = Job(session, work)
        with self._changed:
            unheard = self._drop_unheard()
            if len(self._jobs) - unheard >= self.most:
                raise UserError(f"{self.most} requests are already waiting: try again in a minute")
            self._jobs[job.id] = job
            self._changed.notify()
        return job.id

    def leave(self, session: str, job: str) -> None:
        """Remove a request. If it is being processed, its result is dropped."""
        with self._changed:
            if job in self._jobs and self._jobs[job].session == session:
                self._finish(self._jobs[job], [])

    def knows(self, session: str) -> bool:
        """Whether a session has a request in the queue."""
        with self._changed:
            return any(job.session == session for job in self._jobs.values())

    async def listen(self, session: str) -> AsyncIterator[Message]:
        """Yield messages about a session's requests until all are done. If it stops listening, they are removed."""
        loop, messages = asyncio.get_running_loop(), asyncio.Queue[Message]()

        def tell(message: Message) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(messages.put_nowait, message)

        with self._changed:
            self._tell(session, _CLOSE)  # end an earlier listener of the session
            self._listeners[session] = tell
            self._changed.notify()
        self._tell_ranks()
        try:
            while True:
                try:
                    message = await asyncio.wait_for(messages.get(), _BEAT)
                except TimeoutError:
                    message = {"msg": "heartbeat"}
                yield message
                if message["msg"] == "process_completed" and self._is_last(message["event_id"], session, tell):
                    message = _CLOSE
                    yield message
                if message is _CLOSE:
                    return
        finally:
            with self._changed:
                if self._listeners.get(session) is tell:  # the client has left before the end
                    del self._listeners[session]
                    for job in [job for job in self._jobs.values() if job.session == session]:
                        del self._jobs[job.id]

    def _is_last(self, heard: str, session: str, tell: Callable[[Message], None]) -> bool:
        """Whether a session has no request left; its listener is then removed."""
        with self._changed:
            # Heard, so it may leave the queue; see `_finish`.
            self._jobs.pop(heard, None)
            if self.knows(session):
                return False
            if self._listeners.get(session) is tell:
                del self._listeners[session]
            return True

    def work(self) -> None:
        """Process the requests one after another, forever."""
        while True:
            job = self._next()
            self._tell(job.session, {"msg": "process_starts", "event_id": job.id, "eta": None})
            began = time.monotonic()
            values = job.work()
            with self._changed:
                self._finish(job, values, time.monotonic() - began)
            self._tell_ranks()

    def _finish(self, job: Job, values: list[Any], seconds: float = 0.0) -> None:
        """Send the result of a request, once. The request stays in the queue until its session has received it."""
        if not job.done:
            job.done = True
            if job.session in self._listeners:
                self._tell(job.session, _completed(job.id, values, seconds))
            else:
                self._jobs.pop(job.id, None)

    def _next(self) -> Job:
        with self._changed:
            while True:
                for job in self._jobs.values():
                    if job.session in self._listeners and not job.done:
                        self._begun = job.id
                        return job
                self._changed.wait()

    def _drop_unheard(self) -> int:
        """Drop requests without a listener that are old or too many; return how many such requests stay."""
        now = time.monotonic()
        unheard = [job for job in self._jobs.values() if job.session not in self._listeners]
        fresh = [job for job in unheard if now - job.came < _UNHEARD][-self.most + 1 :]
        for job in unheard:
            if job not in fresh:
                del self._jobs[job.id]
        return len(fresh)

    def _tell(self, session: str, message: Message) -> None:
        tell = self._listeners.get(session)
        if tell is not None:
            tell(message)

    def _tell_ranks(self) -> None:
        with self._changed:
            waiting = [job for job in self._jobs.values() if job.id != self._begun and not job.done]
        heard = [job for job in waiting if job.session in self._listeners]
        for rank, job in enumerate(heard):
            place = {"event_id": job.id, "rank": rank, "queue_size": len(heard), "rank_eta": None}
            self._tell(job.session, {"msg": "estimation", **place})


def _completed(job: str, values: list[Any], seconds: float) -> Message:
    output = {"data": values, "is_generating": False, "duration": seconds, "average_duration": seconds}
    output |= {"render_config": None, "changed_state_ids": []}
    return {"msg": "process_completed", "event_id": job, "output": output, "success": True}
