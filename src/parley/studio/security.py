"""The studio's protection from other people's pages: token, cookie, Host, Origin, CSRF, limits and headers.

The studio can read files and start programs, so that every request must come from the browser that was given the
address with the token. The middleware checks, in this order:

Host     a name of this machine, so that a foreign name that resolves to it (DNS rebinding) is refused
Origin   where a browser sends one, it is this studio
session  the cookie that the token was exchanged for: HttpOnly, SameSite=Strict
CSRF     a header with a token of the page, and an Origin, on every request that may change something
size     of a request's body
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Mapping
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import cookie_parser
from starlette.responses import HTMLResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from parley.serving.address import is_loopback

CSRF_HEADER = "x-csrf-token"
SAFE_METHODS = ("GET", "HEAD")
MAX_FORM_BYTES = 2 * 2**20  # of every body but an upload
UPLOAD_PATH = "/data/uploads"
MAX_UPLOAD_BYTES = 4 * 2**30
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; font-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",  # the first address holds the token
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
# A page rather than a redirect: a browser that came from another site would not send a Strict cookie along with one.
_ENTER = (
    '<!DOCTYPE html><html lang="en"><meta http-equiv="refresh" content="0;url=/">'
    '<link rel="icon" href="/static/icon.svg"><title>Parley</title>'
)


class Keys:
    """The secrets of one studio. `secret` is kept on disk, so that open pages still work after a restart."""

    def __init__(self, secret: bytes, port: int, token: str | None = None) -> None:
        self.token = token or secrets.token_urlsafe(32)
        self.session = hmac.new(secret, b"session", hashlib.sha256).hexdigest()
        self.csrf = hmac.new(secret, b"csrf", hashlib.sha256).hexdigest()
        self.cookie = f"parley_studio_{port}"  # browsers share cookies between the ports of a host


def read_secret(path: Path) -> bytes:
    """The secret in `path`, made where there is none; readable by its owner alone."""
    try:
        secret = path.read_bytes()
        if len(secret) == 32 and path.stat().st_mode & 0o077 == 0:
            return secret
    except FileNotFoundError:
        pass
    path.unlink(missing_ok=True)
    secret = secrets.token_bytes(32)
    path.touch(mode=0o600, exist_ok=False)
    path.write_bytes(secret)
    return secret


class SecurityMiddleware:
    """ASGI middleware with the checks above; everything that passes came from a page of this studio."""

    def __init__(self, app: ASGIApp, *, keys: Keys, host: str = "127.0.0.1") -> None:
        self._app, self._keys, self._host = app, keys, host

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        headers = Headers(scope=scope)
        answer = self._refusal(scope, headers)
        if answer is not None:
            await answer(scope, receive, send_with_headers)
            return
        limit = MAX_UPLOAD_BYTES if scope["path"] == UPLOAD_PATH else MAX_FORM_BYTES
        await self._app(scope, _limited(receive, limit), send_with_headers)

    def _refusal(self, scope: Scope, headers: Headers) -> Response | None:
        """The response to a request that is not passed on; None for one that is."""
        host = headers.get("host", "")
        if not is_own_host(host, self._host):
            return _refuse("this studio is not reached under that name", 421)
        origin = headers.get("origin")
        if origin is not None and origin != f"http://{host}":
            return _refuse("a page of another site may not use this studio", 403)
        if scope["path"] == "/" and scope["method"] == "GET" and b"token=" in scope["query_string"]:
            return self._enter(scope)
        if not self._has_session(headers):
            return _refuse("open the address that `parley studio` printed", 401)
        if scope["method"] not in SAFE_METHODS:
            sent = headers.get(CSRF_HEADER, "")
            if origin is None or not hmac.compare_digest(sent.encode(), self._keys.csrf.encode()):
                return _refuse("this page is too old: reload it", 403)
            if _declared_length(headers) > (MAX_UPLOAD_BYTES if scope["path"] == UPLOAD_PATH else MAX_FORM_BYTES):
                return _refuse("that is too large", 413)
        return None

    def _enter(self, scope: Scope) -> Response:
        """Exchange the token of the address for the session's cookie."""
        sent = parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])[0]
        if not hmac.compare_digest(sent.encode(), self._keys.token.encode()):
            return _refuse("that is not this studio's token: open the address that it printed last", 401)
        response = HTMLResponse(_ENTER)
        response.set_cookie(self._keys.cookie, self._keys.session, httponly=True, samesite="strict", path="/")
        return response

    def _has_session(self, headers: Headers) -> bool:
        cookies: Mapping[str, str] = cookie_parser(headers.get("cookie", ""))
        return hmac.compare_digest(cookies.get(self._keys.cookie, "").encode(), self._keys.session.encode())


def is_own_host(header: str, bound: str) -> bool:
    """Whether a Host header names this machine. Any port will do: a tunnel (ssh -L) may have another one.

    An address is no name, so that nobody can rebind it; a studio that others may reach is found under any of its own.
    """
    try:
        name = urlsplit(f"//{header}").hostname or ""
    except ValueError:
        return False
    if is_loopback(name) or name == bound:
        return True
    if is_loopback(bound):
        return False
    try:
        ip_address(name)
    except ValueError:
        return False
    return True


def _refuse(text: str, status_code: int) -> Response:
    """The rest of the request is not read; htmx shows the text where messages are."""
    headers = {"Connection": "close", "HX-Retarget": "#messages", "HX-Reswap": "textContent"}
    return PlainTextResponse(text, status_code, headers)


def _declared_length(headers: Headers) -> int:
    text = headers.get("content-length", "0")
    return int(text) if text.isdecimal() else 0


class BodyTooLargeError(Exception):
    """A body that is longer than it may be, and than it said."""


def _limited(receive: Receive, limit: int) -> Receive:
    size = 0

    async def limited_receive() -> Message:
        nonlocal size
        message = await receive()
        size += len(message.get("body", b""))
        if size > limit:
            raise BodyTooLargeError
        return message

    return limited_receive
