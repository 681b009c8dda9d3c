"""The playground's server: the page, its choices, and answers as streams of JSON lines."""

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from aiohttp import web

from t3d.blocks.strategy import names, strategy_named
from t3d.cli.playground.answers import DEFAULTS, Frame, Wish, answer
from t3d.cli.speaker import Speaker, samples
from t3d.common.errors import UserError
from t3d.tasks import TASKS

HERE = Path(__file__).parent
FILES = {
    "/": ("page.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
LOOPBACK = ("127.0.0.1", "localhost", "::1")
AT_ONCE = 16  # answers that are decoded at the same time
LONGEST = 2**18  # bytes of a request
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


class Playground:
    """Serves some models; the first is the teacher.

    Args:
        hosts: names of this server in a browser's request; empty = any. Any other name is refused: a foreign page can
            make its own name point to this machine, and so read from it.
    """

    def __init__(self, speakers: Sequence[Speaker], hosts: Collection[str] = LOOPBACK):
        self.speakers = {speaker.name: speaker for speaker in speakers}
        self.hosts = hosts
        self.running: set[threading.Event] = set()  # of each answer; setting it stops the answer
        self.pool = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="answer")

    def app(self) -> web.Application:
        """The web application: `/`, `/setup`, `/answer`."""
        app = web.Application(client_max_size=LONGEST, middlewares=[self._guard])
        for path in FILES:
            app.router.add_get(path, _file)
        app.router.add_get("/setup", self._setup)
        app.router.add_post("/answer", self._answer)
        app.on_shutdown.append(self.stop)
        return app

    async def stop(self, _: web.Application | None = None) -> None:
        """Stop every answer."""
        for event in self.running:
            event.set()

    def setup(self) -> dict[str, Any]:
        """The choices that the page offers, and its panes at the start."""
        teacher, *students = self.speakers.values()
        full = teacher.settings.block_size
        panes = [(teacher, full), (teacher, 1), *((student, 1) for student in students)]
        return {
            "models": [{"name": s.name, "block": s.settings.block_size} for s in self.speakers.values()],
            "strategies": {name: strategy_named(name).threshold for name in names()},
            "defaults": DEFAULTS | {"max_token": teacher.settings.max_token, "temperature": 0.0},
            "tasks": list(TASKS),
            "examples": {name: samples(teacher, name) for name in TASKS},
            "panes": [
                {"model": speaker.name, "block": speaker.settings.block_size, "steps": steps}
                for speaker, steps in panes
            ],
        }

    @web.middleware
    async def _guard(self, request: web.Request, handler) -> web.StreamResponse:
        name = request.url.host or ""
        if self.hosts and name not in self.hosts:
            raise web.HTTPForbidden(text="this page answers under its own address only\n")
        response = await handler(request)
        if not response.prepared:
            response.headers.update(HEADERS)
        return response

    async def _setup(self, request: web.Request) -> web.Response:
        return web.json_response(self.setup())

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        try:
            wish = Wish.of(await _json(request), self.speakers)
        except UserError as error:
            return web.json_response({"error": str(error), "key": error.key}, status=400)
        if len(self.running) >= AT_ONCE:
            return web.json_response({"error": f"{AT_ONCE} answers are being decoded; ask again later"}, status=503)
        response = web.StreamResponse(headers=HEADERS | {"Content-Type": "application/x-ndjson"})
        await response.prepare(request)
        async for frame in self._frames(wish):
            await response.write(json.dumps(frame).encode() + b"\n")
        return response

    async def _frames(self, wish: Wish) -> AsyncIterator[Frame]:
        """The frames of an answer, which another thread decodes. Decoding stops when nobody takes them any more."""
        loop, queue, stop = asyncio.get_running_loop(), asyncio.Queue[Frame](), threading.Event()

        def put(frame: Frame) -> None:
            loop.call_soon_threadsafe(queue.put_nowait, frame)

        def finish(_: asyncio.Future) -> None:
            self.running.discard(stop)
            queue.put_nowait({})

        self.running.add(stop)
        decoding = loop.run_in_executor(self.pool, answer, wish, put, stop)
        decoding.add_done_callback(finish)
        try:
            while frame := await queue.get():
                yield frame
            await decoding  # raises an error of ours
        finally:
            stop.set()


async def _file(request: web.Request) -> web.Response:
    name, kind = FILES[request.path]
    return web.Response(text=(HERE / name).read_text(encoding="utf-8"), content_type=kind, charset="utf-8")


async def _json(request: web.Request) -> Any:
    if request.content_type != "application/json":  # a form of a foreign page cannot send this type
        raise UserError("the request is no JSON; reload the page", "request")
    try:
        return await request.json()
    except ValueError as error:
        raise UserError("the request is no JSON; reload the page", "request") from error
