"""One answer of the playground: what a pane asks for, checked, and its decoding as a stream of frames."""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from t3d.blocks.settings import DecodeSettings
from t3d.blocks.strategy import names
from t3d.cli.speaker import Speaker
from t3d.common.errors import UserError, fault
from t3d.decode.protocol import Step
from t3d.models.generation import checked
from t3d.tasks import TASKS, find_task

REQUEST = {"model": str, "question": str, "data_type": str, "seed": int, "settings": dict}
CHOSEN = (  # the decode settings that a pane may choose
    *("block_size", "denoising_steps_per_block", "remasking_strategy", "temperature", "max_token"),
    *("dynamic_threshold", "eb_threshold", "self_verify"),
)
DEFAULTS = {field.name: field.default for field in fields(DecodeSettings) if field.name in CHOSEN}
CONTEXT = 8  # tokens before a piece of text, which may change how it is written

Frame = dict[str, Any]


class Stopped(Exception):
    """Nobody watches the answer any more."""


@dataclass(frozen=True)
class Wish:
    """An answer that a pane asks for. The speaker has the pane's settings and the page's seed."""

    speaker: Speaker
    question: str
    data_type: str

    @classmethod
    def of(cls, asked: Any, speakers: Mapping[str, Speaker]) -> "Wish":
        """The wish of a request's JSON: model, question, data_type, seed, and settings with some of CHOSEN.

        Raises:
            UserError: a missing, unknown or impossible value.
        """
        if not isinstance(asked, dict):
            raise UserError("the request is no JSON object; reload the page", "request")
        for key, kind in REQUEST.items():
            _refuse_other_types(key, asked.get(key), kind)
        if not asked["question"].strip():
            raise UserError("the question is empty; write one", "question")
        if not 0 <= asked["seed"] < 2**32:
            raise fault("seed", asked["seed"], "must be from 0 to 4294967295")
        _refuse_strangers("model", asked["model"], speakers)
        _refuse_strangers("data_type", asked["data_type"], TASKS)
        speaker = speakers[asked["model"]]
        settings = checked(replace(speaker.settings, **_settings(asked["settings"])))
        return cls(replace(speaker, settings=settings, seed=asked["seed"]), asked["question"], asked["data_type"])


def _settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """The decode settings of a request. A strategy of the user's own is code, which no page may name."""
    for key, value in given.items():
        _refuse_strangers("settings", key, CHOSEN)
        _refuse_other_types(key, value, type(DEFAULTS[key]))
    _refuse_strangers("remasking_strategy", given.get("remasking_strategy", names()[0]), names())
    return dict(given)


def _refuse_strangers(key: str, value: str, known: Mapping | Sequence[str]) -> None:
    if value not in known:
        raise fault(key, value, f"must be one of {', '.join(known)}")


def _refuse_other_types(key: str, value: Any, kind: type) -> None:
    fits = isinstance(value, (int, float) if kind is float else kind)
    if not fits or isinstance(value, bool) != (kind is bool):
        raise fault(key, value, f"must be of type {kind.__name__}")


def pieces(ids: Sequence[int], begin: int, mask_id: int, decode: Callable[[list[int]], str]) -> list[str | None]:
    """The text of every token from ``begin`` on, None at masks. Together they are the text of the whole.

    A character whose bytes lie in several tokens stands at the last of them; the others have no text.
    """
    found: list[str | None] = []
    run = [token for token in ids[max(0, begin - CONTEXT) : begin] if token != mask_id]
    before = decode(run).rstrip("\N{REPLACEMENT CHARACTER}")
    for token in ids[begin:]:
        if token == mask_id:
            found.append(None)
            run, before = [], ""
            continue
        run.append(token)
        text = decode(run).rstrip("\N{REPLACEMENT CHARACTER}")
        found.append(text[len(before) :])
        before = max(before, text, key=len)
    return found


class Frames:
    """Turns the steps of one answer into frames. A frame holds the state of the current block, ready for JSON.

    Its keys: ``step``; ``from``, the block's first index in the answer; ``tokens``, the texts, null = a mask;
    ``fresh``, the indices that the step unmasked; ``p``, their probabilities; ``complete``; ``length``, tokens of the
    answer so far; ``forwards``; ``seconds`` since the start.
    """

    def __init__(self, speaker: Speaker, max_token: int):
        self.speaker, self.max_token = speaker, max_token
        self.begin = 0
        self.began = time.perf_counter()

    def __call__(self, step: Step) -> Frame:
        speaker, ids = self.speaker, step.response_ids[: self.max_token]
        end = next((i for i, token in enumerate(ids) if token in speaker.stop_ids), len(ids))
        known: list[float | None] = [round(p, 4) for p in step.confidence]
        probability = known or [None] * len(step.unmasked)
        fresh = [(i, p) for i, p in zip(step.unmasked, probability, strict=True) if i < end]
        frame = {
            "step": step.step,
            "from": self.begin,
            "tokens": pieces(ids[:end], self.begin, speaker.mask_id, speaker.text),
            "fresh": [i for i, _ in fresh],
            "p": [p for _, p in fresh],
            "complete": step.block_complete,
            "length": sum(token != speaker.mask_id for token in ids[:end]),
            "forwards": step.forwards,
            "seconds": time.perf_counter() - self.began,
        }
        if step.block_complete:
            self.begin = len(ids)
        return frame


def answer(wish: Wish, show: Callable[[Frame], None], stop: threading.Event) -> None:
    """Decode one answer and hand its frames to ``show``: {"begin"}, a frame a step, {"end"}; or at last {"error"}.

    When ``stop`` is set, decoding ends with the current step.
    """
    speaker = wish.speaker
    try:
        ids = speaker.prompt(wish.question, wish.data_type)
        settings = speaker.settings_for(ids)
        show({"begin": {"prompt_tokens": len(ids), "unknown": ids.count(speaker.tokenizer.unk_token_id)}})
        frames = Frames(speaker, settings.max_token)

        def watch(step: Step) -> None:
            if stop.is_set():
                raise Stopped
            show(frames(step))

        found = speaker.answer(ids, settings, watch)
    except Stopped:
        return
    except UserError as error:
        show({"error": str(error), "key": error.key})
        return
    task = find_task(wish.data_type)
    said = task.extract(found.text, task.row(wish.question)) if task.graded else None
    counts = {"length": found.length, "steps": found.steps, "forwards": found.forwards, "seconds": found.seconds}
    show({"end": counts | {"cut": found.finish_reason == "length", "text": found.text, "answer": said}})
