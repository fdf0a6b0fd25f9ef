"""Connections to the page, limited so that a client that opens very many does not block others."""

from __future__ import annotations

import asyncio
from typing import ClassVar

from uvicorn.protocols.http.h11_impl import H11Protocol

_IDLE = 100


class Connection(H11Protocol):
    """A connection of uvicorn. uvicorn would wait forever for a request; here the oldest idle connection is closed.

    It uses h11, which limits the size of a request's headers.
    """

    _idle: ClassVar[dict[Connection, None]] = {}  # connections that wait for a complete request, oldest first

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """See `asyncio.Protocol`."""
        super().connection_made(transport)
        self._count()

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        super().data_received(data)
        self._count()

    def connection_lost(self, exc: Exception | None) -> None:
        """See `asyncio.Protocol`."""
        self._idle.pop(self, None)
        super().connection_lost(exc)

    def _count(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self._idle.pop(self, None)
        elif not self.transport.is_closing():
            self._idle.setdefault(self)
            if len(self._idle) > _IDLE:
                oldest = next(iter(self._idle))
                del self._idle[oldest]
                oldest.transport.abort()
