"""A model that answers questions, as the chat and the playground use it, and sample questions in its words."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from t3d.blocks.settings import DecodeSettings
from t3d.common.errors import UserError
from t3d.data.trajectory import Trajectory
from t3d.decode.model_facts import whole_blocks
from t3d.decode.protocol import Engine, Request, Step
from t3d.tasks import find_task, prompt_ids

if TYPE_CHECKING:
    from t3d.models.decoder import Decoder

EXAMPLES = {
    "math": ("What is the sum of the first 20 odd numbers?", "Solve x^2 - 5x + 6 = 0. What is the larger root?"),
    "code": ("Read two integers and print their greatest common divisor.", "Read a line and print it backwards."),
    "option": ("Which planet is the largest? A) Mars B) Jupiter C) Venus D) Earth",),
    "text": ("Why is the sky blue? Answer in two sentences.", "Name three uses of a paper clip."),
}
STORIES = (  # in the words of the embedded models
    "Tom has 12 apples. Tom buys 7 more. How many apples does Tom have now?",
    "There are 30 coins in the box of Mia. Mia gives away 4. Mia finds 9 more. How many coins are there in the end?",
)


@dataclass
class Speaker:
    """A model with its tokenizer and its decode settings.

    positions: the model's number of positions, for prompt and answer. mask_id, stop_ids: as in SpecialIds.
    """

    name: str
    engine: Engine
    tokenizer: Any
    settings: DecodeSettings
    positions: int
    mask_id: int
    stop_ids: tuple[int, ...]
    seed: int = 0

    @classmethod
    def of(cls, name: str, decoder: "Decoder", settings: DecodeSettings, seed: int = 0) -> "Speaker":
        """The speaker of a loaded model."""
        ids = decoder.ids
        return cls(
            name, decoder.engine, decoder.tokenizer, settings, decoder.positions, ids.mask_id, ids.stop_ids, seed
        )

    def prompt(self, question: str, data_type: str, earlier: Sequence[dict[str, str]] = ()) -> list[int]:
        """The ids of a question, worded as its kind of task words it, after the turns ``earlier``.

        Raises:
            UserError: no such kind of task, or a question that is not text.
        """
        try:
            question.encode()
        except UnicodeEncodeError:  # bytes of another encoding arrive as lone surrogates
            raise UserError("the question is not UTF-8 text; write it in UTF-8", "question") from None
        task = find_task(data_type, "--data-type")
        return prompt_ids(task, task.row(question), self.tokenizer, earlier=earlier)

    def answer(
        self, prompt_ids: list[int], settings: DecodeSettings, on_step: Callable[[Step], None] | None = None
    ) -> Trajectory:
        """Decode an answer, with its text. An error that ``on_step`` raises ends the decoding."""
        request = Request("chat", 0, tuple(prompt_ids))
        (trajectory,) = self.engine.generate([request], settings, self.seed, on_step)
        trajectory.text = self.text(trajectory.response_ids[: trajectory.length])
        return trajectory

    def text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def settings_for(self, prompt_ids: list[int]) -> DecodeSettings:
        """The settings, with the answer's length limited to the free positions; UserError if there are none."""
        room = whole_blocks(self.positions, self.settings.block_size) - len(prompt_ids)
        if room < 1:
            raise UserError(
                f"the question has {len(prompt_ids)} tokens, the model {self.positions} positions; shorten it",
                "question",
            )
        return replace(self.settings, max_token=min(self.settings.max_token, room))


def warmed(speaker: Speaker, decoder: "Decoder") -> Speaker:
    """The speaker, after a few tokens: the time of its first answer does not include the start-up."""
    settings = speaker.settings
    speaker.answer([decoder.ids.pad_id] * settings.block_size, replace(settings, max_token=1))
    return speaker


def samples(speaker: Speaker, data_type: str) -> list[str]:
    """Sample questions whose words the model's tokenizer knows."""
    unknown = speaker.tokenizer.unk_token_id
    every = (*EXAMPLES[data_type], *STORIES)
    return [q for q in every if unknown is None or unknown not in speaker.tokenizer(q)["input_ids"]][:3]
