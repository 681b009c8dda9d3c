"""The one place that renders prompts: rollouts, training and evaluation see the same ids.

A prompt is a user's turn, worded by the kind of question, in the tokenizer's chat template, followed by the opening of
the assistant's turn. The wordings are those of the released T3D code, blanks at their ends included, because a model
answers to the letter of its prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from t3d.common.errors import UserError

DATA_TYPES = ("math", "code", "option")

_MATH = "{question}\nPlease reason step by step, and put your final answer within \\boxed{{}}."
_MATH_THINK = "You need to put your final answer in \\boxed{{}}. This is the problem:\n{question}"
_OPTION = (
    "This is the problem:\n{question}\nYou need to think step by step and put the final option "
    "(A, B, C, or D only—no other character) in \\boxed{{}}. "
)
_CODE = {
    "stdio": "This is the problem:\n{question}\nYou should put your code in ```python ```. "
    "Use input() to read input and print() to produce output in your script. ",
    "function": "This is the problem:\n{question}\nPlace your code within a single Python code block ```python ```. "
    "Do not include more than one code block. ",
}


def user_turn(question: str, data_type: str, *, start_with_think: bool = False, test_method: str | None = None) -> str:
    """What the user says. Raises UserError for an unknown `data_type`, or for code without a known `test_method`."""
    if data_type == "math":
        wording = _MATH_THINK if start_with_think else _MATH
    elif data_type == "option":
        wording = _OPTION
    elif data_type == "code":
        if test_method not in _CODE:
            raise UserError(f"test_method: {test_method!r} is not known; code needs one of {', '.join(_CODE)}")
        wording = _CODE[test_method]
    else:
        raise UserError(f"evaluation.data_type: {data_type!r} is not known; use one of {', '.join(DATA_TYPES)}")
    return wording.format(question=question)


def render(
    question: str,
    data_type: str,
    *,
    tokenizer: Any,
    start_with_think: bool = False,
    instruction: bool = True,
    prefix: str | None = None,
    test_method: str | None = None,
    earlier: Sequence[dict[str, str]] = (),
) -> list[int]:
    """The prompt's ids, up to and including the opening of the assistant's turn.

    `prefix` (a code problem's first lines) or, with `start_with_think`, "<think>" opens the assistant's turn; where
    there is a prefix the answer has begun, and thoughts have no place before it (the release does the same). "<think>"
    follows the chat template's own opening, line break included; the release leaves that line break out.
    `instruction=False` leaves the bare question, which is what the released training code used. The text is tokenised
    as a whole, so tokens may span the seam between template and prefix as they would in the model's own writing.
    `earlier`: the turns of a conversation before this one, {"role": "user" or "assistant", "content": ...}.

    Raises UserError where the kind of question is unknown or the tokenizer has no chat template.
    """
    turn = question
    if instruction:
        turn = user_turn(question, data_type, start_with_think=start_with_think, test_method=test_method)
    text = _apply_template(tokenizer, [*earlier, {"role": "user", "content": turn}], add_generation_prompt=True)
    text += prefix or ("<think>\n" if start_with_think else "")
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def answer_ids(text: str, tokenizer: Any) -> list[int]:
    """The ids of an assistant's answer and of the token that ends its turn.

    The chat template is not applied to the answer itself: templates of thinking models rewrite past assistant turns,
    for instance by putting an empty <think></think> in front.
    """
    return [*tokenizer(text, add_special_tokens=False)["input_ids"], end_of_turn_id(tokenizer)]


def end_of_turn_id(tokenizer: Any) -> int:
    """The id that closes an assistant's turn: what the chat template writes after it, else the tokenizer's eos.

    The two differ in some models: SDAR closes turns with <|im_end|>, while its eos token is <|endoftext|>.
    """
    answer = "An answer to look behind"
    turns = [{"role": "user", "content": "A question"}, {"role": "assistant", "content": answer}]
    _, found, behind = _apply_template(tokenizer, turns, add_generation_prompt=False).rpartition(answer)
    ids = tokenizer(behind, add_special_tokens=False)["input_ids"] if found else []
    if ids and ids[0] in tokenizer.all_special_ids and ids[0] != tokenizer.unk_token_id:
        return ids[0]
    if tokenizer.eos_token_id is None:
        raise UserError("tokenizer: neither its chat template nor an eos token says what ends a turn; set eos_token")
    return tokenizer.eos_token_id


def stop_ids(tokenizer: Any, generation_config: Any | None = None) -> tuple[int, ...]:
    """The ids that end an answer: the eos ids that the folder's generation_config.json states, else the id that ends
    the assistant's turn, with the eos that config.json or the tokenizer has. Raises UserError if none.
    """
    stops = getattr(generation_config, "eos_token_id", None)
    stated = stops is not None and not generation_config._from_model_config  # without the file it has config.json's
    if stops is None:
        stops = tokenizer.eos_token_id
    if stops is None or stops == []:
        raise UserError("stop ids: the model folder names none; set eos_token_id in its generation_config.json")
    stops = (stops,) if isinstance(stops, int) else tuple(stops)
    if not stated and getattr(tokenizer, "chat_template", None):
        stops = tuple(dict.fromkeys((end_of_turn_id(tokenizer), *stops)))
    return stops


def _apply_template(tokenizer: Any, turns: list[dict[str, str]], *, add_generation_prompt: bool) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise UserError("tokenizer: it has no chat template; add chat_template.jinja to the model folder")
    return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=add_generation_prompt)
