"""What every engine promises: prompts' ids and decode settings in, a stream of trajectories out."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from t3d.decoding import DecodeSettings
from t3d.trajectory import Trajectory


@dataclass(frozen=True)
class Request:
    """One answer to decode.

    Attributes:
        prompt: the prompt's id, "<dataset>/<row>"; with ``sample`` it names the random stream and the trajectory.
        sample: which of the prompt's answers, from 0.
        prompt_ids: token ids of the rendered prompt.
    """

    prompt: str
    sample: int
    prompt_ids: tuple[int, ...]

    @property
    def id(self) -> str:
        return f"{self.prompt}/{self.sample}"


class Engine(Protocol):
    """Decodes requests; yields each one's trajectory exactly once, as it finishes, in any order.

    The trajectory carries ids, unmask steps, length, finish reason and counts; text and task fields are the caller's.
    A result depends on the weights, the request, the settings and the seed alone: not on batch size or order.
    """

    def generate(self, requests: Sequence[Request], settings: DecodeSettings, seed: int) -> Iterator[Trajectory]: ...
