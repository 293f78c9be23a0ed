"""Who may ask the server for what: host and origin of a request, token of its annotator, headers of answers."""

from __future__ import annotations

import ipaddress
import socket
from urllib.parse import unquote

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastrlhf.label.workbench import Workbench

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",  # the address holds the token
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=()",
    "cache-control": "no-store",
}


def is_loopback(host: str) -> bool:
    """Whether a host name or address is this machine's own, which no other machine reaches."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _name(netloc: str) -> str:
    """The host of "host:port" or "[address]:port", lower case."""
    host, _, port = netloc.rpartition(":")
    bare = host if host and port.isdigit() and (host.endswith("]") or ":" not in host) else netloc
    return bare.strip("[]").lower()


class Guard:
    """Refuses what no page of ours sends, before the application sees it; adds HEADERS to every answer.

    A page of a stranger that makes its own name lead to this machine (DNS rebinding) names that name in Host. Served
    on loopback, only loopback may stand there; served elsewhere (bound), addresses and this machine's own names too.
    The port is not compared: a tunnel may have another one. A request that a browser sends for another page says so in
    Origin or Sec-Fetch-Site.
    """

    def __init__(self, app: ASGIApp, bound: str) -> None:
        self.app, self.bound = app, bound.lower()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        problem = self._problem(Request(scope))
        app = self.app if problem is None else PlainTextResponse(f"{problem}\n", 403)
        await app(scope, receive, send_with_headers)

    def _problem(self, request: Request) -> str | None:
        host = request.headers.get("host", "")
        if not self._is_ours(_name(host)):
            return "Host: this server is not reached under that name"
        origin = request.headers.get("origin")
        if origin is not None and origin not in (f"http://{host}", f"https://{host}"):
            return "Origin: another page may not use this server"
        # A link in a mail or a chat opens the page (GET, navigation); nothing else of another site may come.
        opens = request.method == "GET" and request.headers.get("sec-fetch-mode", "navigate") == "navigate"
        if request.headers.get("sec-fetch-site", "none") not in ("none", "same-origin") and not opens:
            return "Sec-Fetch-Site: another page may not use this server"
        return None

    def _is_ours(self, name: str) -> bool:
        if is_loopback(name):
            return True
        if is_loopback(self.bound):
            return False
        try:
            ipaddress.ip_address(name)
            return True  # an address cannot be made to lead elsewhere
        except ValueError:
            return name in (self.bound, socket.gethostname().lower(), socket.getfqdn().lower())


def annotator_of(request: Request, workbench: Workbench) -> str | None:
    """Whose token a request of the page carries; None: nobody's."""
    name = unquote(request.headers.get("x-annotator", ""))
    kind, _, token = request.headers.get("authorization", "").partition(" ")
    return name if kind == "Bearer" and workbench.is_annotator(name, token) else None
