"""HTTP connections with a time limit for the next request, which uvicorn lacks."""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol

REQUEST_SECONDS = 10


class Connection(H11Protocol):
    """A client's connection, closed if its next request does not come in time.

    Uvicorn itself would wait forever for the first request, and for the rest of one that has
    begun. Its connections are limited, so silent clients could keep all others out.
    """

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Starts the time limit."""
        super().connection_made(transport)
        self._update_deadline()

    def data_received(self, data: bytes) -> None:
        """Ends the time limit if that was a whole request; else it stays as it was."""
        super().data_received(data)
        self._update_deadline()

    def connection_lost(self, exc: Exception | None) -> None:
        """Ends the time limit."""
        self._end_deadline()
        super().connection_lost(exc)

    def _update_deadline(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self._end_deadline()
        elif self._deadline is None:
            self._deadline = self.loop.call_later(REQUEST_SECONDS, self.transport.close)

    def _end_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _should_upgrade(self) -> bool:
        """Ignores requests for another protocol, as HTTP allows: some clients send many."""
        return False
