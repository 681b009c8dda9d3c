"""The record of one rollout.

A `Trajectory` is (prompt, x0, unmask_step): the teacher's answer together with the denoising step at which each of its
tokens was unmasked. Rollouts append to JSONL shards as they finish (`shards`); the published release's JSON is read and
written too (`release`).
"""

import logging
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

log = logging.getLogger(__name__)


FINISH_REASONS = ("stop", "length")
RETIRED = ("target_ids", "target_step")  # keys of earlier versions' records, nearly always empty


@dataclass
class Trajectory:
    """One finished rollout. Token ids are the truth, `text` is for people.

    Block b covers the positions [b * block_size, (b + 1) * block_size) of prompt + response. So the first response
    tokens share the block in which the prompt ends. Building a record checks all fields, but not for the mask id
    (`ValueError`).
    """

    id: str  # "<dataset>/<row>/<sample>"
    prompt_ids: list[int]
    response_ids: list[int]  # to the end of the last block decoded
    unmask_step: list[int]  # one per response token; 1-based, growing over blocks; a step may unmask none
    length: int  # where the answer ends, first stop id included
    block_size: int
    finish_reason: str  # "stop" | "length"
    initial_ids: list[int] = field(default_factory=list)  # x_T of the response; empty if it was all masks
    edits: list[list[int]] = field(default_factory=list)  # [index, step, token] of each token that was replaced later
    log_probs: list[float] = field(default_factory=list)  # nats, one per response token, of the step that unmasked it
    reward: float | None = None  # of the answer; None = it was not rewarded
    entropy: float | None = None  # nats, the mean over the answer's tokens of the distributions that drew them
    steps: int = 0  # denoising forwards; 0 = take max(unmask_step)
    forwards: int = 0  # all forwards, prefill and cache writes included
    seconds: float = 0.0
    decode: dict[str, Any] = field(default_factory=dict)
    model: str = ""
    question: str = ""
    ground_truth: str = ""
    text: str = ""

    def __post_init__(self):
        if not self.steps and self.unmask_step:
            self.steps = max(self.unmask_step)
        self.validate()

    def validate(self, mask_id: int | None = None) -> "Trajectory":
        """Check the record; with `mask_id`, also that no mask is left. Returns it. `ValueError` names the record."""
        if problem := self._problem(mask_id):
            raise ValueError(f"trajectory {self.id}: {problem}")
        return self

    def _problem(self, mask_id: int | None) -> str | None:
        return self._length_problem() or self._step_problem() or self._mask_problem(mask_id)

    def _length_problem(self) -> str | None:
        size, response, step = self.block_size, self.response_ids, self.unmask_step
        if size < 1:
            return f"block_size {size} is not positive"
        if not response:
            return "the response is empty"
        if len(step) != len(response):
            return f"{len(response)} response ids but {len(step)} unmask steps"
        if self.initial_ids and len(self.initial_ids) != len(response):
            return f"{len(response)} response ids but {len(self.initial_ids)} initial ids"
        if self.log_probs and len(self.log_probs) != len(response):
            return f"{len(response)} response ids but {len(self.log_probs)} log_probs"
        if (len(self.prompt_ids) + len(response)) % size:
            return f"prompt ({len(self.prompt_ids)}) + response ({len(response)}) do not end on a block of {size}"
        if not 1 <= self.length <= len(response):
            return f"length {self.length} is not in 1..{len(response)}"
        if self.finish_reason not in FINISH_REASONS:
            return f"finish_reason {self.finish_reason!r} is not one of {', '.join(FINISH_REASONS)}"
        return None

    def _step_problem(self) -> str | None:
        size, step = self.block_size, self.unmask_step
        if min(step) < 1:
            return f"unmask step {min(step)} is below 1"
        edited = self.decode.get("edit_threshold", 1) < 1  # its last steps may find nothing to change
        if self.steps < max(step) or (self.steps > max(step) and not edited):
            return f"steps {self.steps} is not the last unmask step {max(step)}"
        if any(not (0 <= i < len(step) and 1 <= written < step[i]) for i, written, _ in self.edits):
            return "an edit is not before the step that wrote the final token"
        if not grows_over_blocks(step, len(self.prompt_ids), size):
            return "the unmask steps do not grow from block to block"
        return None

    def _mask_problem(self, mask_id: int | None) -> str | None:
        for part, ids in (
            ("prompt", self.prompt_ids),
            ("response", self.response_ids),
            ("edits", [token for _, _, token in self.edits]),
        ):
            if mask_id is not None and mask_id in ids:
                return f"mask id {mask_id} in the {part}"
        return None

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> "Trajectory":
        """Build from a JSON object; metadata may be missing. `ValueError` names an unknown key or a missing one."""
        name = record.get("id", "without id")
        record = {key: value for key, value in record.items() if value or key not in RETIRED}
        known = {f.name for f in fields(cls)}
        needed = {f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING}
        if unknown := sorted(record.keys() - known):
            raise ValueError(f"trajectory {name}: unknown key {unknown[0]!r}")
        if missing := sorted(needed - record.keys()):
            raise ValueError(f"trajectory {name}: key {missing[0]!r} is missing")
        return cls(**record)


def shown_after(trajectory: Trajectory, step: int) -> list[int | None]:
    """The response's tokens after a denoising step, edits replayed; None = still masked."""
    shown: list[int | None] = [None] * len(trajectory.response_ids)
    for index, written, token in sorted(trajectory.edits, key=lambda edit: edit[1]):
        if written <= step:
            shown[index] = token
    for index, (token, written) in enumerate(zip(trajectory.response_ids, trajectory.unmask_step, strict=True)):
        if written <= step:
            shown[index] = token
    return shown


def response_blocks(prompt_len: int, response_len: int, block_size: int) -> list[tuple[int, int]]:
    """[start, end) of each block's part of the response, on the grid of prompt + response."""
    first = block_size - prompt_len % block_size
    borders = [0, *range(first, response_len, block_size), response_len]
    return list(zip(borders, borders[1:], strict=False))


def grows_over_blocks(unmask_step: Sequence[int], prompt_len: int, block_size: int) -> bool:
    """Whether every step of a block comes before every step of the next block."""
    last = 0
    for start, end in response_blocks(prompt_len, len(unmask_step), block_size):
        block = unmask_step[start:end]
        if min(block) <= last:
            return False
        last = max(block)
    return True


def split_id(trajectory_id: str) -> tuple[str, int, int]:
    """("<dataset>", row, sample) of a trajectory id; `ValueError` when it has another form."""
    parts = trajectory_id.rsplit("/", 2)
    if len(parts) != 3 or not (parts[1].isdecimal() and parts[2].isdecimal()):
        raise ValueError(f"trajectory id {trajectory_id!r} is not <dataset>/<row>/<sample>")
    return parts[0], int(parts[1]), int(parts[2])


def stream_of(trajectory_id: str) -> tuple[str, int]:
    """The (prompt, sample) that name an answer's random stream."""
    prompt, _, sample = trajectory_id.rpartition("/")
    return prompt, int(sample)
