"""SGLang as an engine: running servers, used in parallel, or one engine inside this process.

The servers run T3D's plugin (t3d.integrations.sglang_plugin; docs/ENGINES.md has the command that starts one).
Requests wait in one queue, and every server takes requests while it has room. If the server fails, its requests return
to the queue. So each request is answered once, even if servers die, stall or repeat answers. A failed server is tried
again after a pause that doubles. The run ends when all servers have failed.
"""

import asyncio
import json
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Protocol

import httpx

from t3d.blocks.decoding import stream_key
from t3d.blocks.settings import DecodeSettings
from t3d.common.errors import UserError, fault
from t3d.common.paths import model_name
from t3d.data.trajectory import Trajectory
from t3d.decode.protocol import Request, Step, answer_end, not_finite, refuse_mask_in_prompts, refuse_unserved


class ServerDown(Exception):
    """A server does not answer properly: pause it, and give its requests to the others."""


class BadReply(Exception):
    """An invalid answer: repeat the request, and give it up after a few tries."""


@dataclass(frozen=True)
class Weights:
    """The weights that the servers must use.

    Attributes:
        source: a model folder (a path on the servers) or a hub id.
        version: the name of these weights; servers that loaded them report it with every answer.
        push: load them into servers with other weights; False = such servers are an error.
    """

    source: str
    version: str
    push: bool = False


class Server(Protocol):
    """One server. ``name`` is for messages."""

    name: str

    async def prepare(self, weights: Weights) -> None:
        """Check that it runs and has the weights. Called before its first request and after each failure."""

    async def ask(self, payload: dict) -> dict: ...

    async def close(self) -> None: ...


class HttpServer:
    """A running server (``sglang serve``). Proxy variables are ignored, because it is on the user's own network.

    Args:
        timeout: seconds to wait for one answer; time in the server's own queue counts.
    """

    def __init__(self, url: str, timeout: float):
        self.name = url.rstrip("/")
        # one connection per request in flight; the engine limits their number
        self.client = httpx.AsyncClient(
            base_url=self.name,
            timeout=httpx.Timeout(timeout, connect=10, pool=None),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
            trust_env=False,
        )

    async def prepare(self, weights: Weights) -> None:
        info = await self._send("GET", "/model_info")
        served = str(info.get("model_path"))
        if not weights.push:
            if model_name(served) != model_name(weights.source):
                raise UserError(
                    f"rollout.engine_urls: {self.name} serves {served}, and this run needs {weights.source}; start it "
                    "with that model, or set rollout.engine_push=true to load it into the server",
                    "rollout.engine_urls",
                )
        elif info.get("weight_version") != weights.version:
            await self.push(weights)

    async def push(self, weights: Weights) -> None:
        """Load ``weights`` into the server: it finishes its requests, loads, and clears its prefix cache."""
        body = {"model_path": weights.source, "weight_version": weights.version, "flush_cache": True}
        try:
            await self._send("POST", "/update_weights_from_disk", body)
        except UserError as error:
            raise UserError(
                f"{error}; the server must have the folder at that path, with the shapes of its own model", self.name
            ) from None

    async def ask(self, payload: dict) -> dict:
        return await self._send("POST", "/generate", payload)

    async def close(self) -> None:
        await self.client.aclose()

    async def _send(self, method: str, path: str, body: dict | None = None) -> dict:
        try:
            response = await self.client.request(method, path, json=body)
        except httpx.TransportError as error:
            raise ServerDown(f"{type(error).__name__} {error}".strip()) from error
        if response.status_code in (400, 404, 422):  # the server runs, and every server will repeat this error
            raise UserError(f"{self.name}{path}: {response.status_code} {_reason(response)}", self.name)
        if response.status_code != 200:
            raise ServerDown(f"{path}: {response.status_code} {_reason(response)}")
        try:
            reply = response.json()
        except ValueError:
            raise ServerDown(f"{path}: the answer is not JSON") from None
        if not isinstance(reply, dict):
            raise ServerDown(f"{path}: the answer is not a JSON object")
        return reply


def _reason(response: httpx.Response) -> str:
    try:
        body = response.json()
        told = body.get("error") or body.get("message") or body
        return str(told.get("message", told) if isinstance(told, dict) else told)
    except (ValueError, AttributeError):
        return response.text[:200].strip()


class OfflineServer:
    """SGLang's own ``Engine`` in this process."""

    name = "sglang"

    def __init__(self, engine: Any):
        self.engine = engine

    async def prepare(self, weights: Weights) -> None:
        pass  # it was built with the weights

    async def ask(self, payload: dict) -> dict:
        return await self.engine.async_generate(**payload)

    async def close(self) -> None:
        pass


def offline_engine(
    source: str, *, block_size: int, mask_id: int, max_active: int, tensor_parallel_size: int, gpus: int, dtype: str
) -> Any:
    """Start SGLang's ``Engine`` on this machine's GPUs: one replica per ``tensor_parallel_size`` GPUs.

    Raises:
        UserError: SGLang or the plugin's entry point is not installed, or there is no GPU.
    """
    try:
        import sglang
    except ImportError:
        raise fault(
            "rollout.engine",
            "sglang",
            "SGLang is not installed; pip install -e '.[sglang]', or give rollout.engine_urls",
        ) from None
    if not any(point.name == KEY for point in entry_points(group="sglang.srt.plugins")):
        raise fault("rollout.engine", "sglang", "SGLang does not find T3D's plugin; install T3D: pip install -e .")
    if gpus < tensor_parallel_size:
        raise fault(
            "rollout.tensor_parallel_size",
            tensor_parallel_size,
            f"only {gpus} GPUs are visible; lower it, or give rollout.engine_urls",
        )
    with tempfile.NamedTemporaryFile("w", suffix=".yaml", prefix="t3d-", delete=False) as file:
        file.write(
            json.dumps({"block_size": block_size, "mask_id": mask_id})
        )  # JSON is YAML; SGLang's processes read it
    return sglang.Engine(
        model_path=source,
        dllm_algorithm=NAME,
        dllm_algorithm_config=file.name,
        max_running_requests=max_active,
        tp_size=tensor_parallel_size,
        dp_size=gpus // tensor_parallel_size,
        dtype=dtype,
        log_level="warning",
    )


# ---------------------------------------------------------------------------------------------------------------------
# The engine


class SGLangEngine:
    """Decodes on servers with SGLang (see ``t3d.decode.protocol.Engine``).

    Args:
        servers: makes the servers; called inside the event loop.
        weights: the weights that they must use. mask_id, stop_ids: as for the local engine.
        words: size of the tokenizer; larger ids may not be drawn.
        max_active: most requests in flight to one server.
        patience: failures in a row after which a server counts as lost; the run ends when all are lost.
        pause: seconds before the first new try; it doubles each time, up to a minute.
        loop: the event loop to run in; None = a new one per call.
    """

    def __init__(
        self,
        servers: Callable[[], list[Server]],
        weights: Weights,
        *,
        mask_id: int,
        stop_ids: Sequence[int],
        words: int,
        max_active: int = 256,
        patience: int = 6,
        pause: float = 1.0,
        loop: asyncio.AbstractEventLoop | None = None,
    ):
        self.servers, self.weights = servers, weights
        self.mask_id, self.stop_ids, self.words = mask_id, frozenset(stop_ids), words
        self.max_active, self.patience, self.pause = max_active, patience, pause
        self.loop = loop

    def generate(
        self,
        requests: Sequence[Request],
        settings: DecodeSettings,
        seed: int,
        on_step: Callable[[Step], None] | None = None,
    ) -> Iterator[Trajectory]:
        """Yield one trajectory per request when it is finished.

        Raises:
            UserError: the servers do not support the settings or prompts, have another model or no plugin, or are all
                lost. At the end: some requests got no valid answer. The yielded trajectories are valid.
        """
        if on_step is not None:
            raise fault("rollout.engine", "sglang", "SGLang does not show its steps; use the local engine")
        refuse_unserved(settings, "rollout.")
        refuse_mask_in_prompts(requests, self.mask_id)
        if not requests:
            return
        loop = self.loop or asyncio.new_event_loop()
        # The loop runs only while this generator waits for the next answer. So nothing piles up: at most max_active
        # requests per server are outside the queue.
        run = _Run(self, requests, settings, seed)
        try:
            loop.run_until_complete(run.start())
            for _ in requests:
                answer = loop.run_until_complete(run.next())
                if isinstance(answer, BaseException):
                    raise answer
                if answer is not None:
                    yield answer
        finally:  # also after Ctrl-C
            loop.run_until_complete(run.stop())
            if self.loop is None:
                loop.close()
        if run.given_up:
            name, reason = next(iter(run.given_up.items()))
            raise fault(
                "rollout.engine",
                "sglang",
                f"{len(run.given_up)} of {len(requests)} requests got no valid answer in "
                f"{TRIES} tries (first: {name}: {reason}); the others are kept; run again for these",
            )


NAME = "T3D"  # the algorithm's name: --dllm-algorithm T3D
KEY = "t3d"  # the key of our part in a request's custom_params and a reply's meta_info
TRIES = 3  # bad replies to one request until it is given up


@dataclass
class _Seat:
    """A server in a run. ``ready``: it takes requests. ``failures``: number in a row. ``error``: the last failure."""

    server: Server
    ready: asyncio.Event = field(default_factory=asyncio.Event)
    failures: int = 0
    error: Exception | None = None


class _Run:
    """One call of ``generate``. Everything happens in one event loop; between awaits nothing else runs."""

    def __init__(self, engine: SGLangEngine, requests: Sequence[Request], settings: DecodeSettings, seed: int):
        self.engine, self.settings, self.seed = engine, settings, seed
        self.waiting: asyncio.Queue[Request] = asyncio.Queue()
        for request in requests:
            self.waiting.put_nowait(request)
        # items: a trajectory; None for a request that is given up; an exception that ends the run
        self.answers: asyncio.Queue[Trajectory | BaseException | None] = asyncio.Queue()
        self.tries: Counter[str] = Counter()
        self.given_up: dict[str, str] = {}
        self.name = uuid.uuid4().hex[:8]  # two runs may send the same rows to the same servers
        self.asked = 0
        self.tasks: set[asyncio.Task] = set()
        self.seats: list[_Seat] = []

    async def start(self) -> None:
        self.seats = [_Seat(server) for server in self.engine.servers()]
        fair = -(-self.waiting.qsize() // len(self.seats))  # the first ready server must not take all
        for seat in self.seats:
            self._spawn(self._revive(seat))
            for _ in range(min(self.engine.max_active, fair)):
                self._spawn(self._serve(seat))

    async def next(self) -> Trajectory | BaseException | None:
        task = asyncio.current_task()
        assert task is not None
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return await self.answers.get()

    async def stop(self) -> None:
        tasks = list(self.tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for seat in self.seats:
            await seat.server.close()

    def _spawn(self, work: Coroutine) -> None:
        task = asyncio.ensure_future(work)
        self.tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task) -> None:
        self.tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            self.answers.put_nowait(error)

    async def _serve(self, seat: _Seat) -> None:
        """One place in a server's queue: send a request, pass on the answer, repeat."""
        while True:
            await seat.ready.wait()
            request = await self.waiting.get()
            if not seat.ready.is_set():  # the server failed while this place waited for a request
                self.waiting.put_nowait(request)
                continue
            try:
                answer = await self._ask(seat.server, request)
            except ServerDown as error:
                self.waiting.put_nowait(request)
                self._pause(seat, error)
            except BadReply as error:
                self.tries[request.id] += 1
                if self.tries[request.id] < TRIES:
                    self.waiting.put_nowait(request)
                else:
                    self.given_up[request.id] = f"{error} ({seat.server.name})"
                    self.answers.put_nowait(None)
            else:
                seat.failures = 0
                self.answers.put_nowait(answer)

    def _pause(self, seat: _Seat, error: ServerDown) -> None:
        """Pause a failed server. All its requests fail at once; only the first report counts."""
        if seat.ready.is_set():
            seat.ready.clear()
            seat.failures, seat.error = seat.failures + 1, error
            self._spawn(self._revive(seat))

    async def _revive(self, seat: _Seat) -> None:
        """Wait, check that the server runs with the right weights, and let it take requests again."""
        engine = self.engine
        while not seat.ready.is_set():
            if all(not other.ready.is_set() and other.failures > engine.patience for other in self.seats):
                told = "; ".join(f"{other.server.name}: {other.error}" for other in self.seats)
                raise UserError(
                    f"rollout.engine=sglang: no server answers ({told}); decoded answers are kept; start the servers "
                    "and run the same command again",
                    "rollout.engine_urls",
                )
            if seat.failures:
                await asyncio.sleep(min(60, engine.pause * 2 ** min(seat.failures - 1, 16)))
            try:
                await seat.server.prepare(engine.weights)
                seat.ready.set()
            except ServerDown as error:
                seat.failures, seat.error = seat.failures + 1, error

    # -- requests and replies -----------------------------------------------------------------------------------------

    async def _ask(self, server: Server, request: Request) -> Trajectory:
        self.asked += 1
        payload = self._payload(request, rid=f"{self.name}-{self.asked}")
        began = time.perf_counter()
        reply = await server.ask(payload)
        seconds = time.perf_counter() - began
        try:
            return self._read(server, request, payload["rid"], reply, seconds)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            if isinstance(error, UserError):
                raise
            raise BadReply(f"{type(error).__name__}: {error}") from error

    def _payload(self, request: Request, rid: str) -> dict:
        engine, settings = self.engine, asdict(self.settings)
        key = stream_key(self.seed, request.prompt, request.sample)
        return {
            "rid": rid,
            "input_ids": list(request.prompt_ids),
            "sampling_params": {
                "max_new_tokens": settings.pop("max_token"),
                "stop_token_ids": sorted(engine.stop_ids),
                "skip_special_tokens": False,
                "custom_params": {KEY: {**settings, "key": key, "words": engine.words, "mask_id": engine.mask_id}},
            },
        }

    def _read(self, server: Server, request: Request, rid: str, reply: dict, seconds: float) -> Trajectory:
        """The trajectory of a reply, after all checks. The plugin documents the record in it."""
        engine, settings, meta = self.engine, self.settings, reply["meta_info"]
        if meta["id"] != rid:
            raise BadReply(f"an answer to {meta['id']!r}, the request was {rid!r}")
        if (finish := meta["finish_reason"])["type"] == "abort":
            raise BadReply(f"aborted: {finish.get('message')}")
        if engine.weights.push and meta["weight_version"] != engine.weights.version:
            raise ServerDown(f"it answers with weights {meta['weight_version']!r}, not {engine.weights.version!r}")
        if not meta.get(KEY):
            raise fault(
                "rollout.engine",
                "sglang",
                f"{server.name} answers without a trajectory; start it with "
                f"--dllm-algorithm {NAME}, where T3D is installed",
            )
        record = meta[KEY][0]
        if "broken" in record:
            raise not_finite(f"{engine.weights.source} on {server.name}", record["broken"])
        response, prompt = record["response_ids"], len(request.prompt_ids)
        if response[: len(reply["output_ids"])] != reply["output_ids"]:
            raise BadReply("the tokens and their trajectory differ")
        if not all(0 <= token < engine.words for token in response):
            raise BadReply("an id that is not in the tokenizer")
        length, finish_reason = answer_end(response, settings.max_token, engine.stop_ids)
        if finish_reason == "length" and length < settings.max_token:
            raise BadReply(
                f"it ends after {length} tokens without a stop token; check that the server's context holds prompt + "
                f"rollout.max_token={settings.max_token}, and that it stops at the same tokens"
            )
        if prompt + len(response) != -(-(prompt + length) // settings.block_size) * settings.block_size:
            raise BadReply("it does not end with the block that ends the answer")
        return Trajectory(
            id=request.id,
            prompt_ids=list(request.prompt_ids),
            response_ids=response,
            unmask_step=record["unmask_step"],
            length=length,
            block_size=settings.block_size,
            finish_reason=finish_reason,
            steps=record["steps"],
            forwards=record["forwards"],
            seconds=seconds,
            decode=asdict(settings),
        ).validate(engine.mask_id)


# ---------------------------------------------------------------------------------------------------------------------
# Self-play


def push_weights(urls: Sequence[str], folder: str | Path, version: str, timeout: float = 600.0) -> None:
    """Load a student's exported folder into running servers, in parallel. Returns when all servers have it.

    ``rollout.engine_push`` does the same at the start of a rollout, and again for a server that restarts during it.

    Raises:
        UserError: a server does not answer or cannot load the folder. Other servers may have loaded it; their
            ``weight_version`` shows it.
    """

    async def push(server: HttpServer) -> None:
        try:
            await server.push(weights)
        except ServerDown as error:
            raise UserError(f"{server.name}: {error}; start it and push again", server.name) from None
        finally:
            await server.close()

    async def push_all() -> None:
        await asyncio.gather(*(push(HttpServer(url, timeout)) for url in urls))

    weights = Weights(str(folder), version, push=True)
    asyncio.run(push_all())
