"""Who may use the server: the key, the names it answers to, and pages of other sites.

Without a key the server listens on loopback only. Even there a page of another site, opened in a
browser on this machine, could reach it: by asking directly, which a browser marks with the page's
Origin, or by a name of its own that it lets point to this machine (DNS rebinding), which shows in
the Host. Both are refused, and no header ever allows another origin to read an answer.

With a key neither is looked at: behind a proxy the Host is whatever the proxy sends. A page of
another site does not know the key; one whose browser would add it as a password is betrayed by
Sec-Fetch-Site, which no page can forge, and could send no JSON (see app.py) in browsers without it.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import ipaddress

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kiem.inference.server.errors import ApiError

# For probes, which have no key and ask under any name; the answer says nothing that others may not
# know.
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
    """Says whether a host name or address means this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Guard:
    """Answers what may not pass, and puts the same headers on every answer.

    Args:
        app: what lies behind.
        api_key: what every request must carry; None: nothing, for servers on loopback.
    """

    def __init__(self, app: ASGIApp, api_key: str | None):
        self._app = app
        self._key_hash = None if api_key is None else _hash(api_key.encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        try:
            if scope["path"] != _OPEN_PATH:
                self._check(Headers(scope=scope))
        except ApiError as error:
            answer = JSONResponse(error.body(), error.status, error.headers)
            await answer(scope, receive, send_with_headers)
        else:
            await self._app(scope, receive, send_with_headers)

    def _check(self, headers: Headers) -> None:
        host, origin = headers.get("host", ""), headers.get("origin")
        if self._key_hash is not None:
            self._check_key(headers.get("authorization", ""), self._key_hash)
            # Without an Origin it is a link that somebody follows.
            is_foreign = origin is not None and headers.get("sec-fetch-site") in _OTHER_SITES
        else:
            if not is_loopback(_without_port(host)):
                message = f"This server does not answer to the name {host!r}. {_BEHIND_PROXY}"
                raise ApiError(403, message)
            is_foreign = origin is not None and origin.partition("://")[2] != host
        if is_foreign:
            message = "Pages of other sites may not use this server."
            raise ApiError(403, message if self._key_hash else f"{message} {_BEHIND_PROXY}")

    def _check_key(self, authorization: str, key_hash: bytes) -> None:
        """Takes the key as OpenAI's clients give it, or as the password that a browser asks for."""
        scheme, _, given = authorization.partition(" ")
        key = given.strip().encode("latin-1")
        if scheme.lower() == "basic":
            try:
                key = base64.b64decode(key, validate=True).partition(b":")[2]
            except binascii.Error:
                key = b""
        if scheme.lower() not in ("bearer", "basic") or not hmac.compare_digest(
            _hash(key), key_hash
        ):
            raise ApiError(
                401,
                "The API key is missing or wrong.",
                code="invalid_api_key",
                headers={"www-authenticate": 'Basic realm="kiem: the API key is the password"'},
            )


def _hash(key: bytes) -> bytes:
    """Returns a key at a length of which the time of a comparison tells nothing."""
    return hashlib.sha256(key).digest()


def _without_port(host: str) -> str:
    if host.startswith("["):  # [::1]:8000
        return host[1:].partition("]")[0]
    return host.partition(":")[0].lower()
