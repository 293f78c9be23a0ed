"""The page and the four questions it asks. Everything runs in one thread: no two requests come between each other."""

from __future__ import annotations

import errno
import json
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from fastrlhf.config.errors import UserError
from fastrlhf.label.judgement import Refused
from fastrlhf.label.security import Guard, annotator_of
from fastrlhf.label.summary import summarize
from fastrlhf.label.workbench import Workbench

PAGE = Path(__file__).parent / "page"
FILES = {**dict.fromkeys(("label.js", "text.js", "words.js"), "text/javascript"), "label.css": "text/css"}
MAX_BODY = 1 << 22  # bytes of a judgement: an edited reply may be long, no reply is longer
NO_TOKEN = (
    "Open the address that fastrlhf label printed for you, with its token.\n"
    "请打开 fastrlhf label 为您打印的完整网址（含 token）。\n"
)

Handle = Callable[[str, dict[str, Any]], dict[str, Any]]  # (annotator, what was sent) -> the answer


def make_app(workbench: Workbench, language: str, host: str = "127.0.0.1") -> Starlette:
    """The application. language: of the page, zh or en. host: the address that is served, see Guard."""

    def screen(annotator: str, _: dict[str, Any]) -> dict[str, Any]:
        return workbench.screen(annotator) | {"language": language, "annotator": annotator}

    def judge(annotator: str, body: dict[str, Any]) -> dict[str, Any]:
        workbench.judge(annotator, body)
        return screen(annotator, body)

    def undo(annotator: str, body: dict[str, Any]) -> dict[str, Any]:
        workbench.undo(annotator, body)
        return screen(annotator, body)

    def summary(_: str, body: dict[str, Any]) -> dict[str, Any]:
        return summarize(workbench.log.rows)

    def page(request: Request) -> Response:
        name, token = (request.query_params.get(key, "") for key in ("annotator", "token"))
        if not workbench.is_annotator(name, token):
            return PlainTextResponse(NO_TOKEN, 403)
        return FileResponse(PAGE / "label.html")

    questions = {"next": screen, "judge": judge, "undo": undo, "summary": summary}
    routes = [
        Route("/", page),
        *(Route(f"/{name}", _file(name, kind)) for name, kind in FILES.items()),
        *(Route(f"/api/{name}", _answer(workbench, handle), methods=["POST"]) for name, handle in questions.items()),
    ]
    return Starlette(routes=routes, middleware=[Middleware(Guard, bound=host)])


def _file(name: str, kind: str) -> Callable[[Request], Response]:
    return lambda _: FileResponse(PAGE / name, media_type=kind)


def _answer(workbench: Workbench, handle: Handle) -> Callable[[Request], Awaitable[Response]]:
    """One of the page's questions: who asks, what was sent, and what is wrong with it as {"error": a sentence}."""

    async def endpoint(request: Request) -> Response:
        annotator = annotator_of(request, workbench)
        if annotator is None:
            return _error(NO_TOKEN.splitlines()[0], 403)
        try:
            body = await _body(request)
            return JSONResponse(handle(annotator, body))
        except Refused as refusal:
            return _error(str(refusal), refusal.status)
        except OSError as error:
            return _error(f"not kept: {error.filename or workbench.output}: {error.strerror}", 507)

    return endpoint


async def _body(request: Request) -> dict[str, Any]:
    if request.headers.get("content-type", "").partition(";")[0] != "application/json":
        raise Refused("send application/json", 415)
    data = b""
    async for part in request.stream():
        data += part
        if len(data) > MAX_BODY:
            raise Refused(f"more than {MAX_BODY} bytes", 413)
    try:
        body = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise Refused("what was sent is no JSON", 400) from error
    if not isinstance(body, dict):
        raise Refused("what was sent is no JSON object", 400)
    return body


def _error(sentence: str, status: int) -> JSONResponse:
    return JSONResponse({"error": sentence}, status)


# -------------------------------------------------------------------------------------------------------------- serving


def bind(host: str, port: int) -> socket.socket:
    """A socket at that address, port 0: any free one. UserError where it cannot be had."""
    if not 0 <= port <= 65535:
        raise UserError(f"--port: {port} is no port; use 1 to 65535, or 0 for a free one")
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen()
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise UserError(f"--port: {port} is in use on {host}; name another, or 0 for a free one") from error
        if error.errno == errno.EACCES:
            raise UserError(f"--port: {port} may not be used by this account; name one above 1023") from error
        raise UserError(f"--host: {host!r} is no address of this machine ({error.strerror or error})") from error
    return listener


def addresses(workbench: Workbench, listener: socket.socket, host: str) -> dict[str, str]:
    """The address of each annotator, token included."""
    port = listener.getsockname()[1]
    name = _outward(host) if host in ("0.0.0.0", "::") else host
    netloc = f"[{name}]:{port}" if ":" in name else f"{name}:{port}"
    pairs = workbench.tokens.items()
    return {who: f"http://{netloc}/?{urlencode({'annotator': who, 'token': token})}" for who, token in pairs}


def _outward(host: str) -> str:
    """This machine's address as others see it; nothing is sent to find it."""
    family, other = (socket.AF_INET6, "2001:db8::1") if ":" in host else (socket.AF_INET, "192.0.2.1")
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((other, 9))
            return probe.getsockname()[0]
        except OSError:  # a machine without a network
            return socket.gethostname()


def serve(workbench: Workbench, listener: socket.socket, language: str, host: str) -> None:
    """Answer until Ctrl-C or SIGTERM."""
    config = uvicorn.Config(
        make_app(workbench, language, host),
        access_log=False,  # it would hold the tokens
        log_level="warning",
        server_header=False,
        lifespan="off",
        ws="none",
        timeout_graceful_shutdown=2,
    )
    uvicorn.Server(config).run(sockets=[listener])
