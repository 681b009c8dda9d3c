"""The one place that renders prompts, so that rollouts, training and evaluation see the same ids.

A prompt is a user's turn in the tokenizer's chat template, and the opening of the assistant's turn. The task words the
user's turn (`t3d.tasks`).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from functools import cache
from typing import Any

from t3d.common.errors import UserError

log = logging.getLogger(__name__)


def render(turn: str, tokenizer: Any, opening: str = "", earlier: Sequence[dict[str, str]] = ()) -> list[int]:
    """The prompt's ids for a user's turn, up to and including the opening of the assistant's turn.

    `opening`, such as a code problem's first lines or "<think>", follows the chat template's own opening and its line
    break. (The release leaves out that line break.) The text is tokenised as a whole. So a token may span template and
    opening, as in the model's own text. A special token's name in the turn, such as "<|im_end|>", is text: only the
    template writes special tokens.

    `earlier`: the turns of a conversation before this one, {"role": "user" or "assistant", "content": ...}.

    Raises UserError if the tokenizer has no chat template, or cannot take a special token's name as text.
    """
    turns = [*earlier, {"role": "user", "content": turn}]
    text = _apply_template(tokenizer, turns, add_generation_prompt=True) + opening
    special = _special_tokens(tokenizer)
    if special.search(turn):
        return _encode_pieces(text, turns, [match.span() for match in special.finditer(text)], tokenizer)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _encode_pieces(text: str, turns: list[dict[str, str]], marks: list[tuple[int, int]], tokenizer: Any) -> list[int]:
    """The ids of a prompt. The special tokens at `marks` are control tokens outside the last turn, and text inside it.

    A tokenizer first splits a text at its special tokens. So the pieces between them can be encoded one by one.
    """
    question = "A question without special tokens"
    framed = [*turns[:-1], {"role": "user", "content": question}]
    frame = _apply_template(tokenizer, framed, add_generation_prompt=True)
    start, turn = len(frame.partition(question)[0]), turns[-1]["content"]
    turn = turn if text.startswith(turn, start) else turn.strip()  # some templates strip
    end = start + len(turn)
    control = [(a, b) for a, b in marks if not (a < end and start < b)]
    ids: list[int] = []
    before = 0
    for a, b in [*control, (len(text), len(text))]:
        ids += tokenizer(text[before:a], add_special_tokens=False, split_special_tokens=True)["input_ids"]
        ids += tokenizer(text[a:b], add_special_tokens=False)["input_ids"]
        before = b
    found = sum(token in _special_ids(tokenizer) for token in ids)
    if not text.startswith(turn, start) or found != len(control):
        name = _special_tokens(tokenizer).search(turn)
        raise UserError(
            f"question: it holds {name[0] if name else 'a special token'}, which this tokenizer cannot take as text; "
            "leave the row out, or write the name differently",
            "question",
        )
    return ids


def _special_ids(tokenizer: Any) -> set[int]:
    added = {token for token, entry in tokenizer.added_tokens_decoder.items() if entry.special}
    return (added | set(tokenizer.all_special_ids)) - {tokenizer.unk_token_id}


def _special_tokens(tokenizer: Any) -> re.Pattern[str]:
    """A pattern that finds the names of special tokens in a text. Of two names that begin alike it finds the longer."""
    names = sorted(map(re.escape, tokenizer.convert_ids_to_tokens(sorted(_special_ids(tokenizer)))), key=len)
    return re.compile("|".join(reversed(names)) or "(?!)")


def answer_ids(text: str, tokenizer: Any) -> list[int]:
    """The ids of an assistant's answer and of the token that ends its turn.

    The chat template is not applied to the answer, because templates of thinking models rewrite past assistant turns.
    Some put an empty <think></think> in front.
    """
    return [*tokenizer(text, add_special_tokens=False)["input_ids"], end_of_turn_id(tokenizer)]


def end_of_turn_id(tokenizer: Any) -> int:
    """The id that closes an assistant's turn: the chat template's special token after it, else the tokenizer's eos.

    The two differ in some models: SDAR closes turns with <|im_end|>, while its eos token is <|endoftext|>.
    """
    if (end := _template_end(tokenizer)) is not None:
        return end
    if tokenizer.eos_token_id is None:
        raise UserError("tokenizer: neither its chat template nor an eos token ends a turn; set eos_token")
    return tokenizer.eos_token_id


def stop_ids(tokenizer: Any, generation_config: Any = None) -> tuple[int, ...]:
    """The ids that end an answer: the chat template's token after an assistant's turn, and the eos ids.

    The eos ids come from generation_config.json, else from config.json or the tokenizer. Raises UserError if none.
    """
    stops = getattr(generation_config, "eos_token_id", None)
    stated = stops is not None and not generation_config._from_model_config  # without the file: config.json's ids
    if stops is None:
        stops = tokenizer.eos_token_id
    if stops is None or stops == []:
        raise UserError("stop ids: the model folder names none; set eos_token_id in its generation_config.json")
    stops = (stops,) if isinstance(stops, int) else tuple(stops)
    if not getattr(tokenizer, "chat_template", None):
        return stops
    end = _template_end(tokenizer) if stated else end_of_turn_id(tokenizer)
    if end is None or stated and end in stops:
        return stops
    if stated:
        name = tokenizer.convert_ids_to_tokens(end)
        _say_once(
            f"generation_config.json does not list {name}, which ends a turn in the chat template; it ends answers"
        )
    return tuple(dict.fromkeys((end, *stops)))


def _template_end(tokenizer: Any) -> int | None:
    """The special token that the chat template writes after an assistant's turn; None without one."""
    answer = "An answer to look behind"
    turns = [{"role": "user", "content": "A question"}, {"role": "assistant", "content": answer}]
    _, found, behind = _apply_template(tokenizer, turns, add_generation_prompt=False).rpartition(answer)
    ids = tokenizer(behind, add_special_tokens=False)["input_ids"] if found else []
    special = ids and ids[0] in tokenizer.all_special_ids and ids[0] != tokenizer.unk_token_id
    return ids[0] if special else None


@cache
def _say_once(line: str) -> None:
    log.warning(line)


def _apply_template(tokenizer: Any, turns: list[dict[str, str]], *, add_generation_prompt: bool) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise UserError("tokenizer: it has no chat template; add chat_template.jinja to the model folder")
    return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=add_generation_prompt)
