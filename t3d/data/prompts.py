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
    opening, as in the model's own text. A special token's name in a turn or in the opening, such as "<|im_end|>", is
    text: only the template writes special tokens.

    `earlier`: the turns of a conversation before this one, {"role": "user" or "assistant", "content": ...}.

    Raises UserError if the tokenizer has no chat template, or cannot take a special token's name as text.
    """
    turns = [*earlier, {"role": "user", "content": turn}]
    special = _special_tokens(tokenizer)
    control = special.fullmatch(opening.strip())  # an opening that is a special token, such as "<think>", is meant so
    written = [one["content"] for one in turns] + [opening] * (not control)
    if not any(map(special.search, written)):
        text = _apply_template(tokenizer, turns, add_generation_prompt=True) + opening
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    # The names stay out of the template's sight: all that are left in its text are control. A tokenizer splits a text
    # at its special tokens first, so the pieces between two of them can be encoded one by one.
    hidden = [one | {"content": _hide(one["content"], special)} for one in turns]
    text = _apply_template(tokenizer, hidden, add_generation_prompt=True) + (
        opening if control else _hide(opening, special)
    )
    ids: list[int] = []
    before = 0
    for match in special.finditer(text):
        ids += _text_ids(_show(text[before : match.start()]), tokenizer, "question")
        ids += tokenizer(match[0], add_special_tokens=False)["input_ids"]
        before = match.end()
    return ids + _text_ids(_show(text[before:]), tokenizer, "question")


SHIFT = 0x100000  # to plane 16 of Unicode, private use: no text has its characters


def _hide(text: str, special: re.Pattern[str]) -> str:
    """The text with the names of special tokens in characters that no tokenizer's special token has."""
    return special.sub(lambda match: "".join(chr(ord(c) + SHIFT) for c in match[0]), text)


def _show(text: str) -> str:
    return "".join(chr(ord(c) - SHIFT) if ord(c) >= SHIFT else c for c in text)


def _text_ids(text: str, tokenizer: Any, field: str) -> list[int]:
    """The ids of a text in which the names of special tokens are text. Raises UserError where they cannot be."""
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    if found := _special_ids(tokenizer) & set(ids):
        name = tokenizer.convert_ids_to_tokens(min(found))
        told = f"it holds {name}, which this tokenizer cannot take as text"
        raise UserError(f"{field}: {told}; leave the row out, or write the name differently", field)
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
    Some put an empty <think></think> in front. A special token's name in the answer is text, as in a question.
    """
    return [*_text_ids(text, tokenizer, "answer"), end_of_turn_id(tokenizer)]


def end_of_turn_id(tokenizer: Any) -> int:
    """The id that closes an assistant's turn: the chat template's special token after it, else the tokenizer's eos.

    The two differ in some models: SDAR closes turns with <|im_end|>, while its eos token is <|endoftext|>.
    """
    if (end := _template_end(tokenizer)) is not None:
        return end
    if tokenizer.eos_token_id is None:
        raise UserError("tokenizer: neither its chat template nor an eos token ends a turn; set eos_token", "eos_token")
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
        raise UserError(
            "stop ids: the model folder names none; set eos_token_id in its generation_config.json", "eos_token_id"
        )
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
        raise UserError(
            "tokenizer: it has no chat template; add chat_template.jinja to the model folder", "chat_template"
        )
    return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=add_generation_prompt)
