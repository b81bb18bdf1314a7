"""Access control: the API key, the host names of the server, and pages of other sites.

Without a key the server listens on loopback only. A page of another site, opened in a browser on
this machine, could still reach it: directly, which a browser marks with the page's Origin, or by
a name of its own that it lets point to this machine (DNS rebinding), which shows in the Host. Both
are refused, and no header ever allows another origin to read a response.

With a key neither is checked: behind a proxy the Host is whatever the proxy sends. A page of
another site does not know the key. A browser may add it as a password, but then Sec-Fetch-Site,
which no page can forge, gives the page away; in browsers without it the page could send no JSON
(see app.py).
"""

from __future__ import annotations

import base64
import binascii
import hmac
import ipaddress
import re

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kiem.inference.server.errors import ApiError
from kiem.inference.server.metrics import ServerMetrics

# For probes, which have no key and use any host name; the response reveals nothing else.
_OPEN_PATH = "/health"
_OTHER_SITES = ("cross-site", "same-site")  # the latter is another host of the same domain
_BEHIND_PROXY = "Behind a reverse proxy it needs --api-key."
_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "cache-control": "no-store",
}


def is_loopback(host: str) -> bool:
    """Returns whether a host name or address means this machine alone."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def with_access_control(app: ASGIApp, api_key: str | None, metrics: ServerMetrics) -> ASGIApp:
    """Returns an application that refuses requests that may not pass.

    It adds headers to every response, and counts it.

    Args:
        app: the application behind it.
        api_key: what every request must carry; None: nothing, for servers on loopback.
        metrics: where responses are counted.
    """

    async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
                metrics.responses.labels(message["status"]).inc()
            await send(message)

        chosen = app
        try:
            if scope["type"] == "http" and scope["path"] != _OPEN_PATH:
                _check(Headers(scope=scope), api_key)
        except ApiError as error:
            chosen = error.response()
        await chosen(scope, receive, send_with_headers)

    return guarded


def _check(headers: Headers, api_key: str | None) -> None:
    host, origin = headers.get("host", ""), headers.get("origin")
    if api_key is not None:
        _check_key(headers.get("authorization", ""), api_key.encode())
        # Without an Origin it is a link that somebody follows.
        if origin is not None and headers.get("sec-fetch-site") in _OTHER_SITES:
            raise ApiError(403, "Pages of other sites may not use this server.")
    elif not is_loopback(re.sub(r":\d+$", "", host).strip("[]").lower()):
        message = f"This server does not answer to the name {host!r}. {_BEHIND_PROXY}"
        raise ApiError(403, message)
    elif origin is not None and origin.partition("://")[2] != host:
        message = f"Pages of other sites may not use this server. {_BEHIND_PROXY}"
        raise ApiError(403, message)


def _check_key(authorization: str, expected: bytes) -> None:
    """Checks the key, a bearer token or the password that a browser asks for."""
    scheme, _, given = authorization.partition(" ")
    key = given.strip().encode("latin-1")
    if scheme.lower() == "basic":
        try:
            key = base64.b64decode(key, validate=True).partition(b":")[2]
        except binascii.Error:
            key = b""
    if scheme.lower() not in ("bearer", "basic") or not hmac.compare_digest(key, expected):
        raise ApiError(
            401,
            "The API key is missing or wrong.",
            code="invalid_api_key",
            headers={"www-authenticate": 'Basic realm="kiem: the API key is the password"'},
        )
