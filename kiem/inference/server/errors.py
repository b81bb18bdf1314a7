"""Answers that are errors, in the form of OpenAI's API."""

from __future__ import annotations

from typing import Any

_MOST_CHARACTERS = 60


class ApiError(Exception):
    """An answer that is an error in OpenAI's form.

    Args:
        status: the HTTP status.
        message: what is wrong.
        param: the field of the request that it is about.
        code: OpenAI's word for it, if there is one.
        headers: of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = headers

    def body(self) -> dict[str, Any]:
        """Returns the JSON that the client gets."""
        kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        error = {"message": self.message, "type": kinds.get(self.status, kind)}
        return {"error": {**error, "param": self.param, "code": self.code}}


def shown(value: object) -> str:
    """Returns what a client has sent as an error message quotes it: of a long one the beginning."""
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= _MOST_CHARACTERS else f"{text[:_MOST_CHARACTERS]}..."
