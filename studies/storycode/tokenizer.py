"""StoryCode's tokenizer: one token per word, digit and operator. A line's indentation belongs to the end of line."""

import random

from transformers import PreTrainedTokenizerFast

from studies.storycode.problems import generate
from studies.storymath.tokenizer import word_tokenizer
from t3d.tasks.code import Code

PIECE = (
    r"```python|```|\n *| ?[A-Za-z]+|_[A-Za-z]+| ?\d|\[::-1\]|\):| ?(?:\*\*=|//=|\*\*|//|[-+*%<>=!]=)"
    r"| ?[^\sA-Za-z\d]| +"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer over all words of the generator and of the prompt."""
    rng = random.Random(0)
    texts = ["user\nassistant\n", Code().turn({"question": "", "test_method": "function"})]
    for number in range(12000):
        problem = generate(rng, number % 3 + 1)
        texts += [problem.question, problem.solution]
    return word_tokenizer(PIECE, texts)
