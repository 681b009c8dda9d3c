from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, GenerationConfig, PretrainedConfig, PreTrainedTokenizerFast

from t3d.common.errors import UserError
from t3d.data.prompts import answer_ids, end_of_turn_id, render, stop_ids, user_turn
from t3d.tasks.problems import load_problems

SDAR = Path(__file__).resolve().parents[3] / "shared" / "sdar-4b-chat"
TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }} {{ m.content }}<e> {% endfor %}"
    "{% if add_generation_prompt %}<s>assistant {% endif %}"
)


def word_tokenizer(**special):
    words = ["[UNK]", "user", "assistant", "what", "is", "1", "two"]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = special or {"eos_token": "<end>", "additional_special_tokens": ["<s>", "<e>"]}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]", **special)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture(scope="module")
def sdar():
    if not SDAR.is_dir():
        pytest.skip(f"needs the real SDAR tokenizer at {SDAR}")
    return AutoTokenizer.from_pretrained(SDAR, trust_remote_code=False)


def test_a_prompt_is_the_users_turn_and_the_opening_of_the_answer():
    tokenizer = word_tokenizer()
    ids = render("what is 1", "math", tokenizer=tokenizer, instruction=False)
    assert type(ids) is list
    assert tokenizer.convert_ids_to_tokens(ids) == ["<s>", "user", "what", "is", "1", "<e>", "<s>", "assistant"]
    with_prefix = render("what is 1", "math", tokenizer=tokenizer, instruction=False, prefix="two")
    assert with_prefix == [*ids, *tokenizer("two")["input_ids"]]
    thinking = render("what is 1", "math", tokenizer=tokenizer, instruction=False, prefix="two", start_with_think=True)
    assert thinking == with_prefix, "a prefix has begun the answer: no thoughts before it"


def test_the_end_of_a_turn_is_what_the_template_writes_there():
    tokenizer = word_tokenizer()
    assert tokenizer.convert_ids_to_tokens(answer_ids("1 two", tokenizer)) == ["1", "two", "<e>"]
    plain = word_tokenizer(eos_token="<end>")  # the template's mark is no special token here
    assert end_of_turn_id(plain) == plain.eos_token_id
    with pytest.raises(UserError, match="ends a turn"):
        end_of_turn_id(word_tokenizer(bos_token="<s>"))


def test_stop_ids():
    tokenizer = word_tokenizer()
    assert stop_ids(tokenizer, GenerationConfig(eos_token_id=[5, 6])) == (5, 6)
    assert stop_ids(tokenizer, GenerationConfig(eos_token_id=5)) == (5,)
    turn = tokenizer.convert_tokens_to_ids("<e>")
    assert stop_ids(tokenizer, GenerationConfig()) == stop_ids(tokenizer) == (turn, tokenizer.eos_token_id)
    derived = GenerationConfig.from_model_config(PretrainedConfig(eos_token_id=5))  # what a model without a file has
    assert stop_ids(tokenizer, derived) == (turn, 5)
    tokenizer.chat_template = None
    assert stop_ids(tokenizer) == (tokenizer.eos_token_id,)
    with pytest.raises(UserError, match="generation_config.json"):
        stop_ids(word_tokenizer(bos_token="<s>"), None)


def test_wordings():
    boxed = "Please reason step by step, and put your final answer within \\boxed{}."
    assert user_turn("What is {x}?", "math") == "What is {x}?\n" + boxed
    assert user_turn("q", "math", start_with_think=True) == (
        "You need to put your final answer in \\boxed{}. This is the problem:\nq"
    )
    assert user_turn("q", "code", test_method="stdio").endswith("print() to produce output in your script. ")
    assert user_turn("q", "code", test_method="function").startswith("This is the problem:\nq\nPlace your code within")
    assert user_turn("q", "option").endswith("in \\boxed{}. ")


def test_errors():
    with pytest.raises(UserError, match="'poem'.*math, code, option"):
        user_turn("q", "poem")
    with pytest.raises(UserError, match="test_method: None.*stdio, function"):
        user_turn("q", "code")
    tokenizer = word_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="chat template"):
        render("q", "math", tokenizer=tokenizer)


def test_sdar(sdar):
    ids = render("1+1?", "math", tokenizer=sdar)
    turns = [{"role": "user", "content": user_turn("1+1?", "math")}]
    assert ids == sdar.apply_chat_template(turns, add_generation_prompt=True, tokenize=True, return_dict=False)
    instruction = "Please reason step by step, and put your final answer within \\boxed{}."
    assert sdar.decode(ids) == f"<|im_start|>user\n1+1?\n{instruction}<|im_end|>\n<|im_start|>assistant\n"
    assert sdar.decode(render("q", "math", tokenizer=sdar, start_with_think=True)).endswith("assistant\n<think>\n")
    function = render("q", "code", tokenizer=sdar, test_method="function", prefix="```python\ndef f")
    assert sdar.decode(function).endswith("block. <|im_end|>\n<|im_start|>assistant\n```python\ndef f")
    assert sdar.eos_token == "<|endoftext|>"
    assert sdar.decode(answer_ids("2", sdar)) == "2<|im_end|>"
    assert stop_ids(sdar, GenerationConfig.from_pretrained(SDAR)) == (151645, 151643) == stop_ids(sdar)


@pytest.mark.parametrize("name", ["HumanEval", "MBPP"])
def test_every_real_code_row_renders(sdar, name):
    problems = load_problems(SDAR.parent / "data" / f"{name}.json", "code")
    for problem in problems:
        method = problem.raw["test_method"]
        ids = render(problem.question, "code", tokenizer=sdar, prefix=problem.prefix, test_method=method)
        turn = (
            f"<|im_start|>user\nThis is the problem:\n{problem.question}\nPlace your code within a single Python code "
            "block ```python ```. Do not include more than one code block. <|im_end|>\n<|im_start|>assistant\n"
        )
        assert sdar.decode(ids) == turn + problem.raw["prefix"]
