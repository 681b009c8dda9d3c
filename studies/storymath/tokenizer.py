"""The embedded benchmark's tokenizer: one token per word and per digit, with a ChatML template like SDAR's."""

import random
import re

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
    """A word-level tokenizer over all words of the generator (a leading space belongs to its word)."""
    rng = random.Random(0)
    texts = list(INSTRUCTIONS)
    for _ in range(5000):
        problem = generate(rng, 2)
        texts += [problem.question, problem.solution]
    pieces = {piece for text in texts for piece in re.findall(PIECE, text)}
    pieces |= {f"{space}{digit}" for digit in range(10) for space in ("", " ")}
    vocabulary = {token: i for i, token in enumerate([*sorted(pieces), "<|unk|>", END_OF_TEXT, START, END, MASK])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<|unk|>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(PIECE), behavior="isolated")
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
