"""Objectives that learn from rewards: their common keys, and the policy's log-probabilities that a round records."""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from t3d.common.errors import fault
from t3d.common.options import option
from t3d.objectives.base import Objective, ObjectiveSettings
from t3d.states.base import Batch, State


@dataclass
class RewardedRounds(ObjectiveSettings):
    """How the answers of on-policy rounds are drawn, rewarded and compared."""

    samples_per_question: int = option(8, "rl: answers of each question in a round, which are compared", ge=2)
    reward: str = option(
        "task",
        "rl: task = the grader of dataset.data_type; agreement = the result of the data's answer, a teacher's own, is "
        "the ground truth; or module:function of your own, Answer -> float",
        choices=("task", "agreement"),
        own=True,
    )
    reward_data: str | None = option(
        None, "rl: the questions with their ground truth, as in stage 1; null = the set that the trajectories' ids name"
    )
    reward_unsandboxed: bool = option(False, "rl: run programs on a machine that cannot block network and files")
    cut_is_wrong: bool = option(True, "rl: an answer that was cut at max_gen_length has the reward 0")
    speed_weight: float = option(
        0.0, "rl: weight of the z-score of tokens per forward among a question's right answers", ge=0
    )
    max_stale_steps: int | None = option(
        None, "rl: most optimizer steps between drawing an answer and learning from it; null = no limit", ge=0
    )
    heldout_data: str | None = option(None, "rl: questions on which rounds measure the accuracy; null = none")
    heldout_limit: int | None = option(200, "rl: use only the first N of them; null = all", ge=1)
    heldout_every: int = option(1, "rl: rounds between these measurements", ge=1)
    heldout_temperature: float = option(0.1, "rl: their decoding temperature; 0 = greedy", ge=0)

    def check(self, training: Any) -> None:
        super().check(training)
        every = training.refresh_rollouts
        if not every:
            raise fault("training.refresh_rollouts", every, "answers are drawn in rounds; set it, for example to 4")
        if not training.refresh_at_start:
            raise fault("training.refresh_at_start", False, "no answer of the data has a reward; set it to true")
        if self.max_stale_steps is not None and every - 1 > self.max_stale_steps:
            raise fault(
                "training.max_stale_steps",
                self.max_stale_steps,
                f"a round's last step learns from answers {every - 1} steps old; lower refresh_rollouts={every}",
            )
        if not training.refresh_temperature:
            raise fault("training.refresh_temperature", 0.0, "all answers would be equal; set it to 1.0")
        for name, remedy in (
            ("refresh_data_share", "no answer of the data has a reward; leave it at 0"),
            ("refresh_random_init_ratio", "states begin as masks; leave it at 0"),
        ):
            if value := getattr(training, name):
                raise fault(f"training.{name}", value, remedy)


class RewardedObjective(Objective):
    """An objective whose rounds are rewarded. A subclass also defines ``rewarded``, ``whole`` and ``policy``.

    A round records the log-probabilities of its answers' tokens once, by the weights that drew them. ``noise`` finds
    them in a sample as ``old_log_prob``, one per response token, beside ``advantage``.
    """

    @property
    @abstractmethod
    def rewarded(self) -> RewardedRounds:
        """The settings of its rounds."""

    @abstractmethod
    def whole(self, sample: dict[str, Any]) -> State:
        """The state in which ``policy`` gives the log-probability of every token of the response."""

    @abstractmethod
    def policy(self, model: Callable, batch: Batch) -> tuple[Tensor, Tensor]:
        """(N,) log-probability of each target under the distribution that draws it, and that distribution's entropy."""
