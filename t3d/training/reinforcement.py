"""On-policy rounds whose answers are rewarded: several answers a question, their log-probabilities, and the figures.

A round draws ``samples_per_question`` answers to each question and rewards them while it decodes. Then one pass in the
training layout records the log-probability of every token, by the weights that drew it. Both are part of the round's
trajectories, so a resumed run has the same numbers.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator

from t3d.blocks.settings import DecodeSettings
from t3d.blocks.special_ids import SpecialIds
from t3d.common.errors import fault
from t3d.data.shards import read_shards
from t3d.data.trajectory import Trajectory
from t3d.decode.model_facts import logit_shift, whole_blocks
from t3d.decode.protocol import Request
from t3d.models.loading import load_tokenizer
from t3d.objectives.rewarded import RewardedObjective
from t3d.states.base import collate
from t3d.states.packing import micro_batches
from t3d.tasks import find_task, prompt_ids
from t3d.tasks.problems import load_problems
from t3d.training import advantages
from t3d.training.rewards import Rewards, graded_by, rewards_of
from t3d.training.settings import TrainConfig

if TYPE_CHECKING:
    from datasets import Dataset

log = logging.getLogger(__name__)

COLLAPSE = {"drawn_entropy": 0.1, "length": 0.5}  # shares of the first round's mean below which a warning is due


class GroupedSamples:
    """The questions of a training set, each ``group`` times: neighbours, with the ids <prompt>/0, <prompt>/1, ..."""

    def __init__(self, samples: "Dataset", group: int):
        self.samples, self.group = samples, group
        first: dict[str, int] = {}
        for index, name in enumerate(samples["id"]):
            first.setdefault(name.rpartition("/")[0], index)
        self.prompts, self.places = list(first), list(first.values())

    def __len__(self) -> int:
        return len(self.places) * self.group

    def __getitem__(self, index: int) -> dict[str, Any]:
        question, number = divmod(index, self.group)
        return self.samples[self.places[question]] | {"id": f"{self.prompts[question]}/{number}"}

    @property
    def data(self) -> Any:
        """The columns as loaded."""
        return self.samples.data

    @property
    def column_names(self) -> list[str]:
        """The names of the columns as loaded."""
        return self.samples.column_names


@dataclass
class Heldout:
    """The questions on which rounds measure the accuracy.

    Attributes:
        requests: this process's share. rewards: grades an answer 1 or 0, whatever the training's reward is.
    """

    requests: list[Request]
    rewards: Rewards

    def right(self, answers: Iterable[Trajectory]) -> list[float]:
        """[right answers, answers] of this process."""
        found = [answer.reward or 0.0 for answer in self.rewards.while_decoding(answers)]
        return [sum(found), float(len(found))]


class Reinforcement:
    """Rewards the answers of rounds, and records what training needs of them. Every process holds one.

    Attributes:
        samples: the questions, each as often as a round answers it.
    """

    def __init__(
        self,
        config: TrainConfig,
        objective: RewardedObjective,
        samples: "Dataset",
        ids: SpecialIds,
        source: str,
        accelerator: Accelerator,
        positions: int,
    ):
        """positions: the model's number. Raises UserError if the rewards or the held-out questions are
        impossible.
        """
        self.training, self.objective, self.accelerator = config.training, objective, accelerator
        self.ids, self.settings = ids, objective.rewarded
        self.samples = GroupedSamples(samples, self.settings.samples_per_question)
        kind = config.dataset.data_type
        task, tokenizer = find_task(kind, "dataset.data_type"), load_tokenizer(source, key="model.pretrained_model")
        self.rewards = rewards_of(self.settings, task, kind, samples, tokenizer, accelerator.num_processes)
        self.heldout = self._heldout(task, kind, tokenizer, positions) if self.settings.heldout_data else None
        self.first: dict[str, float] | None = None
        self.warned: set[str] = set()

    def _heldout(self, task: Any, kind: str, tokenizer: Any, positions: int) -> Heldout:
        settings, rank, world = self.settings, self.accelerator.process_index, self.accelerator.num_processes
        assert settings.heldout_data
        problems = load_problems(settings.heldout_data, kind, settings.heldout_limit)
        rows = {problem.id: problem.raw for problem in problems}
        requests = [Request(name, 0, tuple(prompt_ids(task, row, tokenizer))) for name, row in rows.items()]
        training = self.training
        assert training.block_size  # settled by the data
        room = min(training.max_prompt_len, whole_blocks(positions, training.block_size) - training.max_gen_length)
        fitting = [request for request in requests if len(request.prompt_ids) <= room]
        if not fitting:
            raise fault(
                "training.heldout_data",
                settings.heldout_data,
                f"every prompt is longer than {room} tokens; raise training.max_prompt_len, or lower "
                "training.max_gen_length",
            )
        if missing := len(requests) - len(fitting):
            log.warning("%s: %d prompts are longer than %d tokens and left out", settings.heldout_data, missing, room)
        text = partial(tokenizer.decode, skip_special_tokens=True)
        grade = graded_by(task, settings.reward_unsandboxed, world)
        return Heldout(fitting[rank::world], Rewards(grade, lambda name, _: rows[name], text, cut_is_wrong=False))

    def scored(self, student: Any, answers: Iterator[Trajectory]) -> Iterator[Trajectory]:
        """The answers, in any order, with their rewards and the log-probabilities of their tokens by ``student``."""
        rewarded = list(self.rewards.while_decoding(answers))  # decoding ends before the pass below begins
        training = self.training
        found = log_probs(
            self.objective,
            student,
            rewarded,
            self.ids.pad_id,
            self.accelerator,
            size=training.batch_size_lm,
            budget=training.tokens_per_batch,
        )
        by_id = {answer.id: answer for answer in rewarded}
        for name, values, entropy in found:
            yield replace(by_id[name], log_probs=values, entropy=entropy)

    def advantages(self, answers: Iterable[Trajectory]) -> dict[str, float | None]:
        """Id -> advantage of a round's answers; None where the answers to a question do not vary."""
        return advantages.of_round(answers, self.settings.speed_weight)

    def news(self, answers: Sequence[Trajectory], first_round: Path) -> dict[str, float]:
        """The figures of a new round, for the log. Entropy or length far below the first round's give a warning."""
        found = summary(answers, self.advantages(answers))
        if self.first is None:
            began = list(read_shards(first_round)) if first_round.is_dir() else answers
            self.first = summary(began, self.advantages(began))
        for name, share in COLLAPSE.items():
            if found[name] < share * self.first[name] and name not in self.warned:
                self.warned.add(name)
                log.warning(
                    "%s has fallen from %.3g in the first round to %.3g: the answers collapse; lower "
                    "optimizer.params.learning_rate, or raise training.kl_weight",
                    *(name, self.first[name], found[name]),
                )
        return found

    def heldout_accuracy(
        self, number: int, decode: Callable[[Sequence[Request], DecodeSettings], Iterator[Trajectory]], like: Any
    ) -> dict[str, float]:
        """``heldout_accuracy`` after round ``number``, from 0, if it is due. ``like``: the round's decode settings."""
        if self.heldout is None or number % self.settings.heldout_every:
            return {}
        settings = replace(like, temperature=self.settings.heldout_temperature)
        counts = torch.tensor(self.heldout.right(decode(self.heldout.requests, settings)), dtype=torch.float64)
        right, asked = self.accelerator.reduce(counts.to(self.accelerator.device), "sum").tolist()
        return {"heldout_accuracy": right / asked}


def summary(answers: Sequence[Trajectory], credited: dict[str, float | None]) -> dict[str, float]:
    """Means over a round's answers: reward, drawn_entropy (nats a token), length (tokens), cut_share and
    tokens_per_forward; dropped_groups is the share of questions whose answers do not vary.
    """
    return {
        "reward": fmean(answer.reward or 0.0 for answer in answers),
        "dropped_groups": fmean(value is None for value in credited.values()),  # every question has as many answers
        "drawn_entropy": fmean(answer.entropy or 0.0 for answer in answers),
        "length": fmean(answer.length for answer in answers),
        "cut_share": fmean(answer.finish_reason == "length" for answer in answers),
        "tokens_per_forward": sum(a.length for a in answers) / max(1, sum(a.forwards for a in answers)),
    }


@torch.no_grad()
def log_probs(
    objective: RewardedObjective,
    model: Any,
    answers: Sequence[Trajectory],
    pad_id: int,
    accelerator: Accelerator,
    *,
    size: int,
    budget: int | None,
) -> Iterator[tuple[str, list[float], float]]:
    """(id, log-probability of every response token, mean entropy of their distributions) of each answer, in any order.

    It is the forward pass of training, in the same layout, without dropout.

    Args:
        size, budget: see t3d.states.packing.micro_batches.
    """
    states = []
    for answer in answers:
        states.append(objective.whole(vars(answer)))
        states[-1].sample_id = answer.id
    prompts = {answer.id: len(answer.prompt_ids) for answer in answers}
    flex, shift = model.config._attn_implementation == "flex_attention", logit_shift(model.config)
    training = model.training
    model.eval()
    try:
        for rows in micro_batches(states, size=size, budget=budget, packed=flex):
            batch = collate(rows, pad_id, flex=flex, shift=shift, device=accelerator.device)
            with accelerator.autocast():
                found = objective.policy(model, batch)
            packed = [state for row in rows for state in row]
            parts = (values.cpu().split([len(state.position) for state in packed]) for values in found)
            for state, log_prob, entropy in zip(packed, *parts, strict=True):
                ordered = torch.empty_like(log_prob)
                ordered[state.position - prompts[state.sample_id]] = log_prob
                yield state.sample_id, ordered.tolist(), float(entropy.mean())
    finally:
        model.train(training)
