"""The page's server: a few routes, accepted host names, and limits on all input.

Gradio provides the form and its static files; its own routes for files, requests and uploads are not reachable. The
routes here have the same form, so that Gradio's page and clients can use them.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import re
import time
import traceback
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import httpx
from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders, UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vlabs.errors import UserError
from vlabs.page.hosts import Hosts
from vlabs.page.line import Line
from vlabs.page.uploads import LOOK, Uploads

_API = "/gradio_api"
_JSON = 2**16  # largest bytes of a request that is not an upload; parsed, they take many times the memory
_AROUND = 2**16  # largest bytes of a form besides its file
_PAUSE, _SLOWEST = 30.0, 300.0  # longest seconds between parts of a body, and for a whole body
_DRAINED = 2**26  # largest bytes of a refused body that are read, so that the client reads the error
_SESSION = re.compile(r"[\w-]{1,64}")
_ASSET = re.compile(r"/(assets|static)(/[\w@-][\w@.-]*)+")
_PICTURES = ((b"\xff\xd8\xff", "jpeg"), (b"\x89PNG", "png"), (b"GIF8", "gif"), (b"RIFF", "webp"), (b"BM", "bmp"))
_HEADERS = {
    "X-Frame-Options": "DENY",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=(), payment=(), usb=()",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-eval'{scripts}; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; object-src 'none'; base-uri 'self'; "
    "form-action 'none'; frame-ancestors 'none'"
)

Function = Callable[..., Any]


class Gate:
    """Checks each request: its host name, that it comes from the page itself, and the token if there is one.

    Args:
        app: answers the accepted requests.
        hosts: the accepted host names.
        token: required in the first address as `?token=`, and then in a cookie; None if no token is needed.
    """

    def __init__(self, app: ASGIApp, hosts: Hosts, token: str | None) -> None:
        self.app = app
        self.hosts = hosts
        self.token = token
        self.cookie = f"vlabs-page-{hosts.port}"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it in one sentence."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
        else:
            try:
                self._check(Request(scope))
                app: ASGIApp = self.app
            except HTTPException as refused:
                app = _sentence(refused)
            await app(scope, receive, partial(self._send, send))

    def _check(self, request: Request) -> None:
        given = request.headers.get("host", "")
        if given not in self.hosts:
            raise HTTPException(421, "the page does not accept this host name: start it with --allow-host NAME")
        origins = request.headers.getlist("origin")
        if any(origin.partition("://")[2] not in self.hosts for origin in origins):
            raise HTTPException(403, "the page only accepts requests from its own address")
        elsewhere = request.headers.get("sec-fetch-site", "none") not in ("none", "same-origin")
        if elsewhere and not (request.url.path == "/" and request.headers.get("sec-fetch-mode") == "navigate"):
            raise HTTPException(403, "the page only accepts requests from its own address")
        if self.token is None:
            return
        named = request.query_params.get("token", "")
        if not _same(named, self.token) and not _same(request.cookies.get(self.cookie, ""), self.token):
            raise HTTPException(401, "the page needs its token: open the complete address that it printed at its start")
        request.scope["vlabs.named"] = bool(named)

    async def _send(self, send: Send, message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name in [name for name in headers if name.startswith("access-control-")]:
                del headers[name]
            for name, value in _HEADERS.items():
                headers.setdefault(name, value)
            headers.setdefault("Content-Security-Policy", _POLICY.format(scripts=""))
        await send(message)


def make_app(
    form: ASGIApp, functions: dict[int, tuple[Function, int]], line: Line, uploads: Uploads, hosts: Hosts,
    token: str | None,
) -> ASGIApp:  # fmt: skip
    """Build the page's server.

    Args:
        form: serves the form and its files.
        functions: by their numbers in the form, the functions and their numbers of inputs.
        line: the queue of requests.
        uploads: the images.
        hosts, token: see `Gate`.
    """

    async def show(request: Request) -> Response:
        path = request.url.path
        if path.startswith(("/assets", "/static")) and not _ASSET.fullmatch(path):
            raise HTTPException(404)
        given = {name: request.headers.get(name, "") for name in ("host", "if-none-match")}
        given = {name: value for name, value in given.items() if value.isascii()}
        transport = httpx.ASGITransport(form, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url=str(request.base_url)) as client:
            answer = await client.get(path, headers=given | {"accept-encoding": "identity"})
        names = ("content-type", "etag", "last-modified") + (("cache-control",) if path != "/" else ())
        headers = {name: answer.headers[name] for name in names if name in answer.headers}
        if path == "/":
            headers["Content-Security-Policy"] = _POLICY.format(scripts=_inline_scripts(answer.text))
        return Response(answer.content if request.method == "GET" else b"", answer.status_code, headers)

    async def first(request: Request) -> Response:
        if not request.scope.get("vlabs.named"):
            return await show(request)
        # Remove the token from the address bar. A redirect by the page itself, because a browser does not send a strict
        # cookie with a redirect that follows a link from elsewhere.
        answer = HTMLResponse("<!doctype html><meta http-equiv='refresh' content='0;url=./'><title>vlabs</title>")
        secure = request.url.scheme == "https"
        answer.set_cookie(gate.cookie, token or "", httponly=True, samesite="strict", secure=secure)
        return answer

    async def upload(request: Request) -> Response:
        bounded = Request(request.scope, _bounded(request, uploads.limits.bytes, _AROUND))
        try:
            form = await bounded.form(max_files=4, max_fields=4, max_part_size=2**12)
        except (HTTPException, ClientDisconnect):
            raise
        except Exception:  # the parser raises many kinds of errors
            raise HTTPException(400, "an upload must be a form with a file") from None
        try:
            files = [file for file in form.getlist("files") if isinstance(file, UploadFile)]
            if not files:
                raise HTTPException(400, "an upload must be a form with a file in the field 'files'")
            if any((file.size or 0) > uploads.limits.bytes for file in files):
                raise HTTPException(413, _too_large(uploads.limits.bytes))
            return JSONResponse([uploads.take(await file.read()) for file in files])
        except UserError as error:
            raise HTTPException(503, str(error)) from None
        finally:
            await form.close()

    def give(request: Request) -> Response:
        try:
            content = uploads.read(request.path_params["name"])
        except UserError as error:
            raise HTTPException(404, str(error)) from None
        kind = next((kind for start, kind in _PICTURES if content.startswith(start)), None)
        if kind is None:
            return Response(
                content, media_type="application/octet-stream", headers={"Content-Disposition": "attachment"}
            )
        return Response(content, media_type=f"image/{kind}")

    async def join(request: Request) -> Response:
        asked = await _json(request)
        number, values, session = (asked.get(name) for name in ("fn_index", "data", "session_hash"))
        function, count = functions.get(number, (None, 0)) if type(number) is int else (None, 0)
        if function is None:
            raise HTTPException(422, "there is no function with this fn_index")
        if not isinstance(values, list) or len(values) != count:
            raise HTTPException(422, f"data must be a list of {count} values")
        try:
            return JSONResponse({"event_id": line.join(_session(session), partial(_work, function, values))})
        except UserError as error:
            raise HTTPException(503, str(error)) from None

    def data(request: Request) -> Response:
        session = _session(request.query_params.get("session_hash"))
        if not line.knows(session):
            raise HTTPException(404, "this session has no request in the queue")
        return StreamingResponse(_events(line, session), media_type="text/event-stream")

    async def cancel(request: Request) -> Response:
        asked = await _json(request)
        line.leave(_session(asked.get("session_hash")), str(asked.get("event_id")))
        return JSONResponse({"success": True})

    @asynccontextmanager
    async def look(app: Starlette) -> AsyncIterator[None]:
        looking = asyncio.create_task(_look(uploads))
        yield
        looking.cancel()

    shown = ("/config", f"{_API}/info", "/theme.css", "/favicon.ico", "/assets/{path:path}", "/static/{path:path}")
    routes = [
        Route("/", first),
        *(Route(path, show) for path in shown),
        Route(f"{_API}/upload", upload, methods=["POST"]),
        Route(f"{_API}/file={{name:path}}", give),
        Route(f"{_API}/queue/join", join, methods=["POST"]),
        Route(f"{_API}/queue/data", data),
        Route(f"{_API}/cancel", cancel, methods=["POST"]),
    ]
    handlers: dict[Any, Any] = {HTTPException: _refuse, ClientDisconnect: _gone}
    app = Starlette(routes=routes, exception_handlers=handlers, lifespan=look)
    app.router.redirect_slashes = False
    gate = Gate(app, hosts, token)
    return gate


def _same(given: str, token: str) -> bool:
    return hmac.compare_digest(given.encode(errors="surrogateescape"), token.encode())


def _session(given: object) -> str:
    if not isinstance(given, str) or not _SESSION.fullmatch(given):
        raise HTTPException(422, "session_hash must be 1 to 64 letters and digits")
    return given


def _sentence(refused: HTTPException) -> Response:
    return JSONResponse({"detail": refused.detail}, refused.status_code)


async def _refuse(request: Request, refused: HTTPException) -> Response:
    """An error as one sentence. Unknown paths and methods have the same answer."""
    if refused.status_code in (404, 405) and refused.detail in ("Not Found", "Method Not Allowed"):
        refused = HTTPException(404, "the page has nothing with this name")
    return _sentence(refused)


async def _gone(request: Request, error: Exception) -> Response:
    return Response(status_code=400)  # nobody will read it


def _work(function: Function, values: list[Any]) -> list[Any]:
    found = function(*values)
    return list(found) if isinstance(found, tuple) else [found]


async def _events(line: Line, session: str) -> AsyncIterator[str]:
    async for message in line.listen(session):
        yield f"data: {json.dumps(message)}\n\n"


async def _look(uploads: Uploads) -> None:
    while True:
        await asyncio.sleep(LOOK)
        try:
            uploads.remove_old()
        except OSError:
            traceback.print_exc()


async def _json(request: Request) -> dict[str, Any]:
    """The body of a request, which must be a JSON object."""
    try:
        asked = json.loads(await Request(request.scope, _bounded(request, _JSON)).body())
    except (ValueError, RecursionError):
        asked = None
    if not isinstance(asked, dict):
        raise HTTPException(400, "the request must be a JSON object")
    return asked


def _bounded(request: Request, most: int, around: int = 0) -> Receive:
    """Receive the body of a request unless it is too large or too slow; `around` bytes are allowed besides a file."""
    received, ends = 0, time.monotonic() + _SLOWEST

    async def receive() -> Message:
        nonlocal received
        try:
            message = await asyncio.wait_for(request.receive(), min(_PAUSE, ends - time.monotonic()))
        except TimeoutError:
            raise HTTPException(408, "the request took too long to arrive", {"Connection": "close"}) from None
        received += len(message.get("body", b""))
        if max(received, _announced(request.headers)) > most + around:
            if message.get("more_body", False):
                await _drain(request)
            raise HTTPException(413, _too_large(most))
        return message

    return receive


async def _drain(request: Request) -> None:
    """Read on for a while, because a client that is still sending does not read the error."""
    drained, ends = 0, time.monotonic() + _PAUSE
    while drained < _DRAINED and time.monotonic() < ends:
        try:
            message = await asyncio.wait_for(request.receive(), _PAUSE)
        except TimeoutError:
            return
        drained += len(message.get("body", b""))
        if not message.get("more_body", False):
            return


def _announced(headers: Headers) -> int:
    length = headers.get("content-length", "0")
    return int(length) if length.isdecimal() and len(length) < 19 else 0


def _too_large(most: int) -> str:
    return f"the request is too large: at most {most / 2**20:.3g} MB are allowed"


def _inline_scripts(html: str) -> str:
    """Hashes for the content security policy, which allow only the inline scripts of a page."""
    found = re.findall(r"<script(?![^>]*\ssrc=)[^>]*>(.*?)</script>", html, re.DOTALL)
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in found]
    return "".join(f" 'sha256-{one}'" for one in hashes)
