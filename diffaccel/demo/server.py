"""The web server: the page, strips and files of results, and a policy that keeps browsers from asking anybody else."""

import asyncio
import contextlib
import errno
import os
import socket
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ..settings import UsageError
from .asked import as_dict
from .desk import Desk

if TYPE_CHECKING:
    import fastapi

PORT = 7860
POLICY = (
    "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; object-src 'none'; base-uri 'self'; "
    "frame-ancestors 'self'"
)
"""Gradio's page is made of scripts in the page itself; nothing is taken from, or sent to, anywhere else."""


def listen(host: str, port: int | None) -> socket.socket:
    """A socket on that port, or on the first free one from `PORT` on where none was asked for.

    Raises `UsageError` naming a free port, if the one asked for is taken.
    """
    if port is not None and not 0 <= port <= 65535:
        raise UsageError(f"--port lies in [0, 65535], where 0 is any free one, got {port}")
    for number in range(PORT, PORT + 100) if port is None else (port,):
        with contextlib.suppress(_Taken):
            return _bind(host, number)
    if port is None:
        raise UsageError(f"the ports {PORT} to {PORT + 99} of {host} are all in use; choose another with --port")
    with _bind(host, 0) as other:
        free = other.getsockname()[1]
    raise UsageError(f"port {port} of {host} is in use; stop what uses it, or take a free one: --port {free}")


class _Taken(Exception):
    pass


def _bind(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    made = socket.socket(family, socket.SOCK_STREAM)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind((host, port))
        made.listen()
    except OSError as error:
        made.close()
        if error.errno == errno.EADDRINUSE:
            raise _Taken from None
        if error.errno == errno.EACCES:
            raise UsageError(f"port {port} is not for ordinary users; take one from 1024 on with --port") from None
        raise UsageError(f"'{host}' is no address of this machine ({error.strerror or error}); see --host") from None
    return made


def build_server(desk: Desk) -> "fastapi.FastAPI":
    """The application to serve. Raises `UsageError` where the extra is not installed."""
    gradio = load_gradio()
    import fastapi
    from fastapi.responses import FileResponse, JSONResponse, Response

    from .layout import build_page, style, theme

    app = fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    @app.middleware("http")
    async def guard(request: fastapi.Request, call_next: Any) -> Any:
        response = await call_next(request)
        response.headers["Content-Security-Policy"] = POLICY
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.headers["Referrer-Policy"] = "no-referrer"
        return response

    @contextlib.contextmanager
    def found() -> Iterator[None]:
        try:
            yield
        except (KeyError, IndexError, StopIteration):
            raise fastapi.HTTPException(404, "there is no such result, or it is no longer kept") from None

    def clip_of(key: str, name: str) -> Any:
        return next(clip for clip in desk.result(key).clips if clip.name == name)

    @app.get("/results/{key}/{name}/{number}.jpg")
    def strip(key: str, name: str, number: int) -> Response:
        with found():
            coded = clip_of(key, name).strip(number)
        return Response(coded, media_type="image/jpeg", headers={"Cache-Control": "private, max-age=3600, immutable"})

    @app.get("/results/{key}/{name}.mp4")
    def video(key: str, name: str) -> FileResponse:
        with found():
            file = clip_of(key, name).file
            if file is None or not file.is_file():
                raise KeyError(name)
        return FileResponse(file, media_type="video/mp4", filename=file.name)

    @app.get("/results/{key}/report.json")
    def report(key: str) -> JSONResponse:
        with found():
            result = desk.result(key)
        headers = {"Content-Disposition": f'attachment; filename="{result.name}.json"'}
        return JSONResponse({"settings": as_dict(result.asked), "reports": result.reports}, headers=headers)

    async def mount() -> None:  # in a loop, because Gradio starts one where there is none and never closes it
        gradio.mount_gradio_app(
            app,
            build_page(desk),
            path="/",
            theme=theme(),
            css=style(),
            footer_links=[],
            run_history=False,
            show_error=False,
            ssr_mode=False,
            max_file_size="1mb",  # nothing is uploaded
        )

    asyncio.run(mount())
    return app


def load_gradio() -> Any:
    """Gradio, with its reports to its makers off."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    try:
        import gradio
    except ImportError as error:
        raise UsageError(f"the page needs gradio ({error}); pip install 'diffaccel[demo]'") from None
    return gradio


def serve(desk: Desk, sock: socket.socket) -> None:
    """Serves until interrupted."""
    import uvicorn

    config = uvicorn.Config(build_server(desk), log_level="warning", timeout_graceful_shutdown=2)
    try:
        with contextlib.suppress(KeyboardInterrupt):  # the usual end
            uvicorn.Server(config).run(sockets=[sock])
    finally:
        desk.close()
        desk.models.close()
