"""The playground: frames of an answer, the server, and the page in a real browser."""

import asyncio
import json
import re
import signal
import subprocess
import sys
import threading
from dataclasses import replace

import httpx
import pytest

from t3d.blocks.settings import DecodeSettings
from t3d.cli import play
from t3d.cli.playground.answers import CHOSEN, Wish, answer, pieces
from t3d.cli.speaker import STORIES
from t3d.common.errors import UserError
from t3d.common.paths import ROOT
from tests.browser import ENTER, wait

web = pytest.importorskip("aiohttp.web", reason="the extra play is not installed")
from t3d.cli.playground.server import AT_ONCE, LOOPBACK, Playground  # noqa: E402

QUESTION = STORIES[0]


@pytest.fixture(scope="module")
def speaker(story_teacher):
    return play.load("tiny", str(story_teacher), "model", 40)


def asked(**changed) -> dict:
    given = {"model": "tiny", "question": QUESTION, "data_type": "math", "seed": 0, "settings": {}}
    return given | changed


def frames(speaker, **changed) -> list[dict]:
    shown = []
    answer(Wish.of(asked(**changed), {"tiny": speaker}), shown.append, threading.Event())
    return json.loads(json.dumps(shown))


class Gated:
    """An engine that waits for `gate` before each step, and knows whether it works and how its last answer ended."""

    def __init__(self, engine):
        self.engine, self.gate = engine, threading.Event()
        self.working, self.ended = threading.Event(), threading.Event()

    def generate(self, requests, settings, seed, on_step=None):
        def slow(step):
            self.working.set()
            assert self.gate.wait(60)
            on_step(step)

        try:
            yield from self.engine.generate(requests, settings, seed, slow)
        finally:
            self.ended.set()


# ---------------------------------------------------------------------------------------------------------------------
# Frames


def test_pieces_are_the_text_of_the_whole():
    def decode(ids):
        return bytes(ids).decode(errors="replace")

    ids = list("né ℵ_0".encode())
    for begin in range(4):
        found = pieces(ids, begin, 0, decode)
        assert len(found) == len(ids) - begin
    assert "".join(pieces(ids, 0, 0, decode)) == "né ℵ_0" and pieces(ids, 0, 0, decode)[1:3] == ["", "é"]
    assert pieces([97, 0, 98, 99], 1, 0, decode) == [None, "b", "c"]


@pytest.mark.parametrize("given", [{}, {"denoising_steps_per_block": 1}, {"self_verify": True}, {"temperature": 1.0}])
def test_frames_end_in_the_answer(speaker, given):
    first, *steps, last = frames(speaker, settings=given)
    assert first["begin"]["prompt_tokens"] > 10 and first["begin"]["unknown"] == 0
    state, seconds = [], 0.0
    for number, frame in enumerate(steps, 1):
        assert frame["step"] == number and frame["seconds"] >= seconds
        state[frame["from"] :] = frame["tokens"]
        assert all(state[i] is not None for i in frame["fresh"]) and len(frame["p"]) == len(frame["fresh"])
        assert frame["length"] == sum(token is not None for token in state)
        assert not frame["complete"] or None not in state
        seconds = frame["seconds"]
    assert "".join(state) == last["end"]["text"] and steps[-1]["forwards"] == last["end"]["forwards"]
    if "self_verify" not in given:
        assert all(0 < p <= 1 for frame in steps for p in frame["p"])


def test_the_seed_decides(speaker):
    warm = {"temperature": 1.0}
    texts = [frames(speaker, settings=warm, seed=seed)[-1]["end"]["text"] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    "key, changed",
    [
        ("question", {"question": " "}),
        ("question", {"question": 7}),
        ("question", {"question": "\ud800"}),
        ("question", {"question": "apples " * 300}),
        ("model", {"model": "other"}),
        ("data_type", {"data_type": "os:system"}),
        ("seed", {"seed": -1}),
        ("seed", {"seed": True}),
        ("settings", {"settings": {"random_init_ratio": 1.0}}),
        ("temperature", {"settings": {"temperature": "hot"}}),
        ("temperature", {"settings": {"temperature": float("nan")}}),
        ("block_size", {"settings": {"block_size": 4.0}}),
        ("block_size", {"settings": {"block_size": None}}),
        ("remasking_strategy", {"settings": {"remasking_strategy": "os:system"}}),
        ("denoising_steps_per_block", {"settings": {"denoising_steps_per_block": 5}}),
    ],
)
def test_mistakes_name_their_key(speaker, key, changed):
    try:
        (shown,) = frames(speaker, **changed)
        assert shown["key"] == key
    except UserError as error:
        assert error.key == key


def test_a_pane_may_set_settings_of_the_decoder():
    assert set(CHOSEN) <= set(vars(DecodeSettings()))


# ---------------------------------------------------------------------------------------------------------------------
# The server


@pytest.fixture(scope="module")
def served(speaker):
    """A server of two models, "tiny" and "gated": the address, and the gated one's engine."""
    gated = Gated(speaker.engine)
    gated.gate.set()
    loop, ground = asyncio.new_event_loop(), Playground([speaker, replace(speaker, name="gated", engine=gated)])
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    async def start():
        runner = web.AppRunner(ground.app(), handler_cancellation=True, shutdown_timeout=1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        return runner

    runner = asyncio.run_coroutine_threadsafe(start(), loop).result(30)
    yield f"http://127.0.0.1:{runner.addresses[0][1]}", gated, ground
    gated.gate.set()
    asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(30)
    loop.call_soon_threadsafe(loop.stop)
    thread.join()


@pytest.fixture
def gated(served):
    """The gated engine, closed."""
    engine = served[1]
    engine.gate.clear(), engine.working.clear(), engine.ended.clear()
    yield engine
    engine.gate.set()
    wait(lambda: not served[2].running, 60, "no answer is being decoded")


@pytest.fixture
def client(served):
    with httpx.Client(base_url=served[0], timeout=60, trust_env=False) as client:
        yield client


def test_the_page_brings_everything_itself(client):
    for path in ("/", "/page.css", "/page.js"):
        got = client.get(path)
        assert got.status_code == 200 and "default-src 'none'" in got.headers["Content-Security-Policy"]
        assert not re.search(r"https?://|//[a-z]+\.[a-z]", got.text), path


def test_an_answer_is_a_stream_of_lines(client):
    lines = client.post("/answer", json=asked()).text.splitlines()
    assert "begin" in json.loads(lines[0]) and json.loads(lines[-1])["end"]["text"]


def test_a_bad_request_is_told(client):
    got = client.post("/answer", json=asked(model="other"))
    assert got.status_code == 400 and got.json()["key"] == "model"
    for content, kind in ((b"{", "application/json"), (json.dumps(asked()), "text/plain"), (b"[]", "application/json")):
        got = client.post("/answer", content=content, headers={"Content-Type": kind})
        assert got.status_code == 400 and got.json()["key"] == "request"


def test_a_foreign_name_of_the_server_is_refused(client):
    assert client.get("/setup", headers={"Host": "attacker.example"}).status_code == 403
    for name in LOOPBACK:
        host = f"[{name}]:1" if ":" in name else name
        assert client.get("/setup", headers={"Host": host}).status_code == 200


def test_a_slow_answer_blocks_no_other(client, gated):
    with client.stream("POST", "/answer", json=asked(model="gated")) as slow:
        assert gated.working.wait(60)
        assert '"end"' in client.post("/answer", json=asked()).text and not gated.ended.is_set()
        gated.gate.set()
        assert '"end"' in slow.read().decode()


def test_decoding_stops_when_nobody_watches(client, gated, served):
    with client.stream("POST", "/answer", json=asked(model="gated")):
        assert gated.working.wait(60)
    wait(lambda: all(event.is_set() for event in served[2].running), 60, "the server knows that the reader has gone")
    gated.gate.set()
    assert gated.ended.wait(60)


def test_too_many_answers_at_once_are_refused(client, gated, served):
    extra = {threading.Event() for _ in range(AT_ONCE)}
    served[2].running |= extra
    try:
        assert client.post("/answer", json=asked()).status_code == 503
    finally:
        served[2].running -= extra


# ---------------------------------------------------------------------------------------------------------------------
# The command


def test_models_have_short_names_that_differ():
    assert play.labels(["models/a", "owner/b"]) == ["a", "b"]
    assert play.labels(["runs/1/optimized", "runs/2/optimized"]) == ["runs/1/optimized", "runs/2/optimized"]
    with pytest.raises(UserError) as error:
        play.labels(["a", "a"])
    assert error.value.key == "--student"


def test_mistakes_of_the_command_are_one_line(served, story_teacher):
    port = served[0].rpartition(":")[2]
    for key, argv in [
        ("model", ["nowhere", "--port", "0"]),
        ("--student", [str(story_teacher), "--student", "nowhere", "--port", "0"]),
        ("--port", [str(story_teacher), "--port", port]),
    ]:
        with pytest.raises(UserError) as error:
            play.main(argv)
        assert error.value.key == key


def test_the_command_serves_until_ctrl_c(story_teacher):
    line = [sys.executable, "-m", "t3d", "play", str(story_teacher), "--port", "0", "--max-token", "8"]
    with subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        address = process.stdout.readline().split()[0]
        assert address.startswith("http://127.0.0.1:")
        body = asked(model="tiny-teacher")
        assert '"end"' in httpx.post(f"{address}/answer", json=body, timeout=60, trust_env=False).text
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0


def test_without_arguments_it_opens_on_the_embedded_models():
    sources = play.sources_of(play.parse([]))
    assert [play.labels([source])[0] for source in sources] in (
        ["embedded-teacher", "embedded-student"],
        ["embedded-teacher"],
    )
    given = play.sources_of(play.parse(["--student", "mine"]))
    assert given == [*sources, "mine"] and play.sources_of(play.parse(["mine"])) == ["mine"]


@pytest.mark.skipif(not (ROOT / play.STUDENT).is_dir(), reason="no models/embedded-student yet; make student")
def test_the_embedded_student_repairs_what_four_tokens_a_step_break():
    sources = {"teacher": play.TEACHER, "student": play.STUDENT}
    speakers = [play.load(name, source, "model", 96) for name, source in sources.items()]
    panes = Playground(speakers).setup()["panes"]
    assert [(pane["model"], pane["steps"]) for pane in panes] == [("teacher", 4), ("teacher", 1), ("student", 1)]
    said = []
    for pane in panes:
        shown = []
        settings = {"denoising_steps_per_block": pane["steps"]}
        wish = Wish.of(asked(model=pane["model"], settings=settings), {s.name: s for s in speakers})
        answer(wish, shown.append, threading.Event())
        said.append(shown[-1]["end"]["answer"])
    assert said[0] == said[2] == "19" != said[1]


# ---------------------------------------------------------------------------------------------------------------------
# The page, in a browser


@pytest.fixture(scope="module")
def browser(new_browser):
    return new_browser()


@pytest.fixture
def page(browser, served):
    browser.size(1280, 900)
    browser.open(served[0])
    browser.until("return document.body.dataset.ready")
    yield browser
    assert browser.errors() == []


ASKED = "return document.querySelector('#stop').disabled && !document.querySelector('#replay').hidden"
FORWARDS = ".pane .forwards"


def test_ask_watch_and_slide(page):
    assert page.run("return document.querySelector('#question').value") == QUESTION
    page.run("document.querySelector('#slow').value = '250'")
    page.click("#go")
    page.until("return document.querySelector('.tok.mask') && Number(document.querySelector('.forwards').textContent)")
    page.run("document.querySelector('#slow').value = '0'")
    page.until(ASKED)
    texts = page.texts(".pane .answer")
    assert len(texts) == 3 and all(texts) and not page.texts(".tok.mask")
    full, one, _ = map(int, page.texts(FORWARDS))
    assert full > 2 * one, "one token a step takes more forwards than four"
    assert re.fullmatch(
        r"step \d+, [1-4]\. in its block, probability 0\.\d+|.* 1\.000",
        page.run("return document.querySelector('.tok').title"),
    )
    page.click(".tok")
    assert "probability" in page.text(".info")

    slide = "const s = document.querySelector('#step'); s.value = arguments[0]; s.dispatchEvent(new Event('input'))"
    page.run(slide, 2)
    assert page.text("#at") == "2" and page.text(".pane .answer") != texts[0]
    assert int(page.text(FORWARDS)) < full
    page.run(slide, 0)
    assert page.texts(".pane .answer") == ["", "", ""]
    page.run(slide, 10_000)
    assert page.texts(".pane .answer") == texts

    differing = page.texts(".pane:nth-child(2) .differs")
    assert texts[0] == texts[1] or differing
    assert page.run("return document.body.classList.contains('differ')")
    page.click("#differ")
    assert not page.run("return document.body.classList.contains('differ')")
    sources = page.run("return performance.getEntriesByType('resource').map(entry => new URL(entry.name).host)")
    assert set(sources) == {page.run("return location.host")}


def test_a_changed_setting_and_a_wrong_one(page):
    for name, value in {"steps": "2", "temperature": "1"}.items():
        page.type(f".pane [name={name}]", value)
    page.type(".pane:nth-child(2) [name=steps]", "9")
    page.type("#seed", "3")
    page.type("#question", QUESTION.replace("12", "14") + ENTER)
    page.until(ASKED)
    assert "denoising_steps_per_block=9" in page.text(".pane:nth-child(2) .error")
    assert page.text(".pane .answer") and not page.text(".pane .error")
    assert page.text(".pane:nth-child(3) .answer"), "the other panes are answered"

    link, said = page.run("return location.href"), page.text(".pane .answer")
    page.open("about:blank")
    page.open(link)
    page.until("return document.body.dataset.ready")
    value = "return document.querySelector(arguments[0]).value"
    found = [page.run(value, f) for f in ("#question", "#seed", ".pane [name=steps]", ".pane [name=temperature]")]
    assert found == [QUESTION.replace("12", "14"), "3", "2", "1"]
    page.click("#go")
    page.until(ASKED)
    assert page.text(".pane .answer") == said, "the link gives the same answer"


def test_text_is_escaped(page, served):
    evil = "<img src=x onerror=document.title='taken'>"
    page.type("#question", evil)
    page.click("#go")
    page.until("return document.querySelector('#stop').disabled || !document.querySelector('.pane .error').hidden")
    page.open(f"{served[0]}/#question={evil}&kind=none&slow=7&pane={evil},4&pane=%25E0%25A4%25A")
    page.until("return document.body.dataset.ready")
    page.run("document.querySelector('#question').value = '<b>'")
    assert page.run("return document.title") == "T3D playground" and not page.run("return document.images.length")
    assert page.text("#note").startswith("The link is damaged")
    assert page.run("return document.querySelector('#kind').value") == "math"


def test_two_users_and_stop(page, new_browser, served, gated):
    page.run("document.querySelector('.pane [name=model]').value = 'gated'")
    page.click("#go")
    assert gated.working.wait(60)
    other = new_browser()
    other.open(served[0])
    other.until("return document.body.dataset.ready")
    other.run("[...document.querySelectorAll('.pane [name=model]')].forEach(field => field.value = 'tiny')")
    other.click("#go")
    other.until(ASKED)
    assert not gated.ended.is_set(), "the first user still waits"
    page.click("#stop")
    page.until("return document.querySelector('.pane .error').textContent == 'stopped'")
    wait(lambda: all(event.is_set() for event in served[2].running), 60, "the server knows that the answer was stopped")
    gated.gate.set()
    assert gated.ended.wait(60)


def test_a_phone_needs_no_sideways_scrolling(page, served):
    page.size(360, 700)
    page.open(served[0])
    page.until("return document.body.dataset.ready")
    page.click("#go")
    page.until(ASKED)
    assert page.run("return document.documentElement.scrollWidth") <= 360
    assert not page.run("return document.querySelector('.pane details').open")
