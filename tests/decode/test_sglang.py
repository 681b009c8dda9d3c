"""The client against servers that delay, die, repeat themselves and mix answers up: every row once, nothing lost."""

import json
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from t3d.blocks.decoding import stream_key
from t3d.blocks.settings import DecodeSettings
from t3d.common.errors import UserError
from t3d.common.options import load
from t3d.common.paths import ROOT
from t3d.data.shards import read_shards
from t3d.data.trajectory import Trajectory
from t3d.decode.local import LocalEngine
from t3d.decode.sglang import HttpServer, SGLangEngine, Weights, push_weights
from t3d.evaluation.run import evaluate
from t3d.evaluation.settings import EvalConfig
from t3d.integrations.sglang_plugin import KEY
from t3d.models.fingerprint import weights_fingerprint
from t3d.rollout.run import roll_out
from t3d.rollout.settings import SampleConfig
from tests.conftest import MASK, PAD, STOP, VOCAB, raises_key, tiny_model
from tests.decode.test_local import requests

SETTINGS = DecodeSettings(temperature=0.0, max_token=12)


class Dies(Exception):
    """Raised by a server's ``trouble``: the connection breaks without an answer."""


class FakeServer:
    """SGLang's HTTP interface in front of known answers (key of the random stream -> trajectory).

    ``trouble(server, number, reply)`` sees every answer before it leaves, by its number from 0: it may wait, change it
    (a tuple is (status, body)) or raise ``Dies``.
    """

    def __init__(self, known: dict[int, Trajectory], trouble: Callable | None = None, port: int = 0, model="models/m"):
        self.known, self.trouble = known, trouble
        self.info = {"model_path": model, "weight_version": "default"}
        self.asked: list[dict] = []
        self.pushed: list[dict] = []
        self.in_flight = self.most_in_flight = 0
        self.lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                self._send(200, outer.info) if self.path == "/model_info" else self._send(404, {"error": "unknown"})

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                try:
                    self._send(*(outer.update(body) if self.path.startswith("/update") else outer.answer(body)))
                except (Dies, BrokenPipeError, ConnectionResetError):
                    self.close_connection = True

            def _send(self, status: int, body) -> None:
                data = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_):
                pass

        ThreadingHTTPServer.daemon_threads = True
        self.http = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.port = self.http.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    def update(self, body: dict) -> tuple[int, dict]:
        self.pushed.append(body)
        if not Path(body["model_path"]).is_dir():
            return 400, {"success": False, "message": "Failed to load the weights"}
        self.info = {"model_path": body["model_path"], "weight_version": body["weight_version"]}
        return 200, {"success": True, "message": ""}

    def answer(self, body: dict) -> tuple[int, dict]:
        with self.lock:
            number = len(self.asked)
            self.asked.append(body)
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            t = self.known[body["sampling_params"]["custom_params"][KEY]["key"]]
            assert body["input_ids"] == t.prompt_ids
            record = {"response_ids": t.response_ids, "unmask_step": t.unmask_step, "steps": t.steps, "forwards": 7}
            meta = {
                "id": body["rid"],
                "finish_reason": {"type": t.finish_reason},
                "weight_version": self.info["weight_version"],
                KEY: [json.loads(json.dumps(record))],
            }
            reply = {"output_ids": t.response_ids[: t.length], "meta_info": meta}
            told = self.trouble(self, number, reply) if self.trouble else None
            return told or (200, reply)
        finally:
            with self.lock:
                self.in_flight -= 1

    def stop(self) -> None:
        self.http.shutdown()
        self.http.server_close()


def essence(trajectories) -> dict[str, dict]:
    """What a trajectory says, by id; every id is there once."""
    rows = [asdict(t) for t in trajectories]
    assert max(Counter(row["id"] for row in rows).values()) == 1, "a row came twice"
    return {row["id"]: {k: v for k, v in row.items() if k not in ("seconds", "forwards")} for row in rows}


@pytest.fixture(scope="module")
def asked():
    return requests([1 + i % 9 for i in range(40)])


@pytest.fixture(scope="module")
def known(asked) -> dict[int, Trajectory]:
    local = LocalEngine(tiny_model(), mask_id=MASK, stop_ids=[STOP, PAD], forbidden_ids=[])
    key = {request.id: stream_key(3, request.prompt, request.sample) for request in asked}
    return {key[t.id]: t for t in local.generate(asked, SETTINGS, seed=3)}


@contextmanager
def serving(known, *troubles, **options):
    servers = [FakeServer(known, trouble, **options) for trouble in troubles]
    try:
        yield servers
    finally:
        for server in servers:
            server.stop()


def client(*urls, weights=None, timeout=20.0, max_active=4, patience=3, pause=0.02) -> SGLangEngine:
    return SGLangEngine(
        lambda: [HttpServer(url, timeout) for url in urls],
        weights or Weights("elsewhere/m", "v1"),
        mask_id=MASK,
        stop_ids=[STOP, PAD],
        words=VOCAB,
        max_active=max_active,
        patience=patience,
        pause=pause,
    )


def test_servers_are_filled_in_parallel_and_bounded(asked, known):
    together = threading.Barrier(12)  # three servers, four requests each: all must be there at once to get on

    def meet(server, number, reply):
        if number < 4:
            together.wait(timeout=20)
        time.sleep(0.02)

    with serving(known, meet, meet, meet) as servers:
        result = list(client(*(s.url for s in servers)).generate(asked, SETTINGS, seed=3))
    assert essence(result) == essence(known.values())
    assert [s.most_in_flight for s in servers] == [4, 4, 4]
    assert sum(len(s.asked) for s in servers) == len(asked)
    assert {t.forwards for t in result} == {7} and all(t.seconds > 0.01 for t in result)
    sampling = servers[0].asked[0]["sampling_params"]
    assert sampling["stop_token_ids"] == [PAD, STOP] and sampling["max_new_tokens"] == 12


def delays_and_reorders(server, number, reply):
    time.sleep((number * 7 % 5) * 0.01)


def dies_once(server, number, reply):
    if 5 <= number < 12:
        raise Dies


def overloaded(server, number, reply):
    if number % 3 == 0:
        return 503, {"error": {"message": "busy"}}


def repeats_another(server, number, reply):
    """The answer before this one once more, as a proxy that mixes connections up would."""
    with server.lock:
        before, server.last = getattr(server, "last", reply), reply
    return (200, before) if number % 4 == 1 else None


def talks_nonsense(server, number, reply):
    record = reply["meta_info"][KEY][0]
    faults = [
        lambda: record["unmask_step"].append(9),
        lambda: record["response_ids"].__setitem__(0, MASK),
        lambda: record.pop("unmask_step"),
        lambda: record["unmask_step"].reverse(),
        lambda: reply["output_ids"].__setitem__(0, 0 if reply["output_ids"][0] else 1),
        lambda: reply["meta_info"].update(finish_reason={"type": "abort", "message": "weights"}),
        lambda: reply.pop("meta_info"),
        lambda: record["response_ids"].extend([1, 2, 3, 4]) or record["unmask_step"].extend([90, 91, 92, 93]),
    ]
    if number < 8:
        faults[number]()


def is_no_json(server, number, reply):
    if number == 2:
        return 200, ["a list"]


@pytest.mark.parametrize(
    "trouble", [delays_and_reorders, dies_once, overloaded, repeats_another, talks_nonsense, is_no_json]
)
def test_every_row_once_whatever_a_server_does(asked, known, trouble):
    with serving(known, trouble, delays_and_reorders) as servers:
        result = list(client(*(s.url for s in servers)).generate(asked, SETTINGS, seed=3))
    assert essence(result) == essence(known.values())


def test_one_troubled_server_alone_gets_through(asked, known):
    with serving(known, dies_once) as (server,):
        result = list(client(server.url).generate(asked, SETTINGS, seed=3))
    assert essence(result) == essence(known.values())


def test_a_server_that_hangs_loses_its_requests_to_the_others(asked, known):
    with serving(known, lambda *_: time.sleep(30), None) as servers:
        engine = client(*(s.url for s in servers), timeout=0.3)
        assert essence(engine.generate(asked, SETTINGS, seed=3)) == essence(known.values())


def test_a_server_that_dies_for_good_and_one_that_was_never_there(asked, known):
    with serving(known, None) as (good,):
        dying = FakeServer(known, lambda server, number, reply: number == 3 and server.stop() or time.sleep(0.01))
        result = list(client(dying.url, "http://127.0.0.1:9", good.url).generate(asked, SETTINGS, seed=3))
    assert essence(result) == essence(known.values())


def test_a_server_comes_back(asked, known):
    """The only one goes and returns on its port: the run waits for it."""
    first = FakeServer(known, lambda *_: time.sleep(0.005))
    engine = client(first.url, patience=8, pause=0.05)
    answers = engine.generate(asked, SETTINGS, seed=3)
    got = [next(answers) for _ in range(5)]
    first.stop()
    started = threading.Timer(0.4, lambda: back.append(FakeServer(known, port=first.port)))
    back: list[FakeServer] = []
    first.trouble = lambda *_: (_ for _ in ()).throw(Dies)  # connections that are still open
    started.start()
    assert essence([*got, *answers]) == essence(known.values())
    back[0].stop()


def test_all_servers_gone_is_an_error_and_what_came_is_kept(asked, known):
    def stops(server, number, reply):
        if number >= 6:
            raise Dies

    with serving(known, stops) as (server,):
        got = []
        with raises_key("rollout.engine_urls", server.url, "127.0.0.1:9"):
            for trajectory in client(server.url, "http://127.0.0.1:9").generate(asked, SETTINGS, seed=3):
                got.append(trajectory)
    assert len(got) == 6 and essence(got).items() <= essence(known.values()).items()


def test_a_row_that_is_never_answered_well_is_told_and_the_rest_comes(asked, known):
    bad = stream_key(3, asked[7].prompt, 0)

    def spoils(server, number, reply):
        if server.asked[number]["sampling_params"]["custom_params"][KEY]["key"] == bad:
            reply["meta_info"][KEY][0]["unmask_step"][0] = 0

    with serving(known, spoils) as (server,):
        got = []
        with raises_key("rollout.engine", "1 of 40 requests", "p/7/0", "unmask step 0"):
            for trajectory in client(server.url).generate(asked, SETTINGS, seed=3):
                got.append(trajectory)
    assert set(essence(got)) == {request.id for request in asked} - {"p/7/0"}


def without_record(server, number, reply):
    reply["meta_info"].pop(KEY)


def refuses(server, number, reply):
    return 400, {"error": {"message": "block_size differs: this server has 8"}}


@pytest.mark.parametrize(
    ("trouble", "key", "named"),
    [
        (without_record, "rollout.engine", "--dllm-algorithm T3D"),
        (refuses, None, "400 block_size differs: this server has 8"),  # the server's address
    ],
)
def test_a_server_that_cannot_ends_the_run_at_once(asked, known, trouble, key, named):
    with serving(known, trouble) as (server,), raises_key(key or server.url, named):
        list(client(server.url).generate(asked, SETTINGS, seed=3))


def test_another_model_is_refused(asked, known):
    with serving(known, None, model="JetLM/SDAR-8B-Chat") as (server,):
        with raises_key("rollout.engine_urls", "JetLM/SDAR-8B-Chat", "elsewhere/m"):
            list(client(server.url).generate(asked, SETTINGS, seed=3))
    assert not server.asked


# ---------------------------------------------------------------------------------------------------------------------
# Self-play


def test_weights_are_pushed_and_pushed_again_to_a_server_that_lost_them(asked, known, tmp_path):
    def restarts(server, number, reply):
        if number == 10:  # as a restarted server would: the model it was started with
            server.info = {"model_path": "models/teacher", "weight_version": "default"}
            raise Dies
        reply["meta_info"]["weight_version"] = server.info["weight_version"]

    with serving(known, restarts, None) as servers:
        weights = Weights(str(tmp_path), "round-2", push=True)
        result = list(client(*(s.url for s in servers), weights=weights).generate(asked, SETTINGS, seed=3))
        assert essence(result) == essence(known.values())
        assert [len(s.pushed) for s in servers] == [2, 1]
        list(client(*(s.url for s in servers), weights=weights).generate(asked[:4], SETTINGS, seed=3))
        assert [len(s.pushed) for s in servers] == [2, 1], "they have these weights already"
    assert servers[0].pushed[0] == {"model_path": str(tmp_path), "weight_version": "round-2", "flush_cache": True}


def test_an_answer_by_old_weights_is_not_taken(asked, known, tmp_path):
    def old(server, number, reply):
        if number < 6:
            reply["meta_info"]["weight_version"] = "round-1"

    with serving(known, old) as (server,):
        weights = Weights(str(tmp_path), "round-2", push=True)
        result = list(client(server.url, weights=weights).generate(asked, SETTINGS, seed=3))
    assert essence(result) == essence(known.values()) and len(server.asked) >= len(asked) + 6


def test_push_weights(known, tmp_path):
    with serving(known, None, None) as servers:
        urls = [s.url for s in servers]
        push_weights(urls, tmp_path, "v7")
        assert [s.info["weight_version"] for s in servers] == ["v7", "v7"]
        with raises_key(urls[0], "Failed to load the weights"):
            push_weights(urls[:1], tmp_path / "none", "v8")
        with raises_key("http://127.0.0.1:9", "ConnectError"):
            push_weights([*urls, "http://127.0.0.1:9"], tmp_path, "v9")


# ---------------------------------------------------------------------------------------------------------------------
# The workflows


@pytest.fixture
def story(tmp_path, rollout_line) -> dict[str, Trajectory]:
    """The local engine's rollouts of the story questions."""
    folder = roll_out(load(SampleConfig, rollout_line(tmp_path / "local"))).with_suffix("")
    return {t.id: t for t in read_shards(folder)}


def keyed(story: dict[str, Trajectory]) -> dict[int, Trajectory]:
    return {stream_key(10086, id.rpartition("/")[0], 0): t for id, t in story.items()}


def test_a_rollout_and_its_resume_equal_the_local_engines(tmp_path, rollout_line, story, story_teacher):
    def stops(server, number, reply):
        if number >= 9:
            return 400, {"error": {"message": "no more"}}

    with serving(keyed(story), stops, model=story_teacher.name) as (server,):
        line = rollout_line(tmp_path / "served", "rollout.engine=sglang", f"rollout.engine_urls=[{server.url}]")
        line.append("rollout.max_active=2")
        with raises_key(server.url, "no more"):
            roll_out(load(SampleConfig, line))
        (shard,) = (tmp_path / "served").rglob("shard-*.jsonl")
        done = shard.read_bytes().count(b"\n")
        assert 8 <= done <= 9
        server.trouble, asked_before = None, len(server.asked)
        output = roll_out(load(SampleConfig, line))
        assert len(server.asked) - asked_before == len(story) - done, "finished rows were asked for again"
    assert essence(read_shards(output.with_suffix(""))) == essence(story.values())
    kept = ("question", "full_output", "step_map", "response_ids", "unmask_step", "extracted_output")
    local, served = (
        [{key: row[key] for key in kept} for row in json.loads(file.read_text())]
        for file in (next((tmp_path / "local").rglob("outputs-*.json")), output)
    )
    assert served == local


def test_an_evaluation(tmp_path, rollout_line, story, story_teacher):
    with serving(keyed(story), None, model=story_teacher.name) as (server,):
        line = rollout_line(tmp_path / "eval", "rollout.engine=sglang", f"rollout.engine_urls=[{server.url}]")
        line += ["rollout.denoising_steps_per_block=4", "evaluation.method=t3d"]
        (row,) = json.loads(evaluate(load(EvalConfig, line)).read_text())
    assert row["n"] == len(story) == len(server.asked)


def test_a_rollout_pushes_the_student(tmp_path, rollout_line, story, story_teacher):
    with serving(keyed(story), None, model="models/teacher") as (server,):
        line = rollout_line(tmp_path / "played", "rollout.engine=sglang", f"rollout.engine_urls=[{server.url}]")
        roll_out(load(SampleConfig, [*line, "rollout.engine_push=true"]))
    version = weights_fingerprint(str(story_teacher))
    assert server.info == {"model_path": str(story_teacher), "weight_version": version}


def test_ctrl_c_is_one_line_and_keeps_what_came(tmp_path, rollout_line, story, story_teacher):
    def slow(server, number, reply):
        time.sleep(0 if number < 5 else 60)

    with serving(keyed(story), slow, model=story_teacher.name) as (server,):
        line = rollout_line(tmp_path / "stopped", "rollout.engine=sglang", f"rollout.engine_urls=[{server.url}]")
        script = [sys.executable, "sample/sdar_sample.py", *line]
        error = (tmp_path / "stderr").open("w+")
        process = subprocess.Popen(script, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=error, process_group=0)
        deadline = time.monotonic() + 120
        shards = lambda: [p.read_bytes().count(b"\n") for p in (tmp_path / "stopped").rglob("shard-*.jsonl")]  # noqa: E731
        while shards() != [5]:
            assert process.poll() is None and time.monotonic() < deadline, "it never got going"
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 130
        error.seek(0)
        said = error.read()
    assert "interrupted" in said and "Traceback" not in said and "never retrieved" not in said and "pending" not in said
    assert shards() == [5]


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["rollout.self_verify=true"], "rollout.self_verify=true: does not work with rollout.engine=sglang"),
        (["rollout.energy_candidates=2"], "rollout.energy_candidates=2: does not work with rollout.engine=sglang"),
        (["rollout.random_init_ratio=0.1"], "rollout.random_init_ratio=0.1: SGLang's blocks begin as masks"),
        (["rollout.compile=true"], "rollout.compile=true: SGLang compiles by itself"),
        (["rollout.fused_commit=false"], "rollout.fused_commit=false: SGLang writes"),
        (["rollout.num_processes=2"], "rollout.num_processes=2: with rollout.engine=sglang one process"),
        (["rollout.attn_implementation=sdpa"], "rollout.attn_implementation=sdpa: SGLang chooses"),
        (["rollout.engine_urls=[http://a:1]", "rollout.dtype=float16"], "rollout.dtype=float16: the servers have"),
        (["rollout.engine_urls=[a:1]"], "as http://host:port"),
        (["rollout.engine_push=true"], "there is no server"),
        (["rollout.engine=local", "rollout.engine_push=true"], "rollout.engine_push=true: only with"),
        (["rollout.engine=local", "rollout.engine_urls=[http://a:1]"], "only with rollout.engine=sglang"),
    ],
)
def test_settings_that_the_engine_does_not_support(rollout_line, tmp_path, more, told):
    with pytest.raises(UserError) as error:
        load(SampleConfig, rollout_line(tmp_path, "rollout.engine=sglang", *more))
    assert told in str(error.value)


def test_without_sglang_the_offline_engine_says_what_to_install(rollout_line, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sglang", None)
    with raises_key("rollout.engine", "pip install -e '.[sglang]'"):
        roll_out(load(SampleConfig, rollout_line(tmp_path, "rollout.engine=sglang")))


def test_accelerate_launch_is_refused(rollout_line, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with raises_key("rollout.engine", "accelerate launch"):
        roll_out(
            load(SampleConfig, rollout_line(tmp_path, "rollout.engine=sglang", "rollout.engine_urls=[http://a:1]"))
        )
