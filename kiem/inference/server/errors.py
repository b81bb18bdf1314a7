"""Error responses in the form of OpenAI's API."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

_MOST_CHARACTERS = 60
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class ApiError(HTTPException):
    """An error response.

    Args:
        status: the HTTP status.
        message: what is wrong.
        param: the field of the request that it is about.
        code: OpenAI's code for it, if there is one.
        headers: of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(status, message, headers)
        self._param = param
        self._code = code

    def body(self) -> dict[str, Any]:
        """Returns the JSON that the client gets."""
        default = "server_error" if self.status_code >= 500 else "invalid_request_error"
        error = {"message": self.detail, "type": _TYPES.get(self.status_code, default)}
        return {"error": {**error, "param": self._param, "code": self._code}}

    def response(self) -> JSONResponse:
        """Returns the response."""
        return JSONResponse(self.body(), self.status_code, self.headers)


def server_failed() -> ApiError:
    """Returns the error for a request that an error inside the server has ended."""
    return ApiError(500, "The server has failed at this request; its log says at what.")


def shown(value: object) -> str:
    """Returns a value from a request as an error message quotes it, cut if it is long."""
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= _MOST_CHARACTERS else f"{text[:_MOST_CHARACTERS]}..."
