"""StoryCode's tokenizer: one token per word, digit and operator.

Operators, commas and keywords take the spaces around them, and an end of line its indentation. So a name or a digit is
the same token wherever it stands, and a model can copy it.
"""

import random

from transformers import PreTrainedTokenizerFast

from studies.storycode.problems import generate
from studies.storymath.tokenizer import word_tokenizer
from t3d.tasks.code import Code

PIECE = (
    r"```python|```|\n *|\[::-1\]|\):| (?:\*\*|//|[-+*%<>=!])=? |, "
    r"| ?\b(?:return|if|else|for|in|not|def)\b ?|\d| ?[A-Za-z]+|_[A-Za-z]+|[^\sA-Za-z\d]| +"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer over all words of the generator and of the prompt."""
    rng = random.Random(0)
    texts = ["user\nassistant\n", Code().turn({"question": "", "test_method": "function"})]
    for number in range(12000):
        problem = generate(rng, number % 3 + 1)
        texts += [problem.question, problem.solution]
    return word_tokenizer(PIECE, texts)
