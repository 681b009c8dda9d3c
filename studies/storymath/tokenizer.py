"""The embedded benchmark's tokenizers: one token per word and per digit, with a ChatML template like SDAR's."""

import random
import re
from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from studies.storymath.problems import generate

END_OF_TEXT, START, END, MASK = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|MASK|>"
PIECE = r" ?\\boxed\{| ?[A-Za-z]+| ?\d|\n| ?[^\sA-Za-z\d]"
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
INSTRUCTIONS = (
    "user\nassistant\n\nPlease reason step by step, and put your final answer within \\boxed{}.",
    "\nThink step by step and put the letter of the right option in \\boxed{}. A B C D",
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """StoryMath's."""
    rng = random.Random(0)
    texts = list(INSTRUCTIONS)
    for _ in range(5000):
        problem = generate(rng, 2)
        texts += [problem.question, problem.solution]
    return word_tokenizer(PIECE, texts)


def word_tokenizer(piece: str, texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A word-level tokenizer over all words of the texts. piece: the expression of a word with its leading space."""
    pieces = {found for text in texts for found in re.findall(piece, text)}
    pieces |= {f"{space}{digit}" for digit in range(10) for space in ("", " ")}
    vocabulary = {token: i for i, token in enumerate([*sorted(pieces), "<|unk|>", END_OF_TEXT, START, END, MASK])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<|unk|>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(piece), behavior="isolated")
    core.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<|unk|>",
        eos_token=END,
        pad_token=END_OF_TEXT,
        mask_token=MASK,
        additional_special_tokens=[START],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer
