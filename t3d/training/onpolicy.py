"""On-policy refresh: training continues with answers that the student itself has just decoded.

A refresh happens every ``training.refresh_rollouts`` optimizer steps. It decodes again the questions of the steps up to
the next refresh, with the decoder of stage 1 and the student's present weights. The new answers replace the earlier
ones; the order of the questions and everything else stays. With ReDi a refresh is the next rectification.

The student learns from its own answers; ``opdlm`` learns a teacher's distributions on them. Source of the idea: DAgger
(arXiv 1011.0686), on-policy distillation (GKD, arXiv 2306.13649).

An objective that learns from rewards gets several answers to each question, with their rewards, advantages and
log-probabilities (t3d.training.reinforcement).

A round's trajectories go to <run>/rollouts/<step>/ as shards, so that a resumed run uses the same data. If a run
resumes at the first step of a round, the round is drawn again: the same weights and seed give the same answers.
"""

import logging
import math
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator

from t3d.blocks.settings import DecodeSettings
from t3d.blocks.special_ids import SpecialIds
from t3d.common.errors import UserError, fault
from t3d.data.dataset import blocks_within
from t3d.data.shards import ShardWriter, read_shards
from t3d.data.trajectory import Trajectory, split_id, stream_of
from t3d.decode.local import LocalEngine
from t3d.decode.model_facts import whole_blocks
from t3d.decode.protocol import Engine, Request, refuse_conflict, refuse_unserved
from t3d.objectives.base import Objective
from t3d.objectives.rewarded import RewardedObjective
from t3d.states.base import generator_for
from t3d.training import checkpoint
from t3d.training.distribution import unwrapped, zero_stage
from t3d.training.reinforcement import GroupedSamples, Reinforcement
from t3d.training.serving import serve
from t3d.training.settings import TrainConfig, TrainingConfig

if TYPE_CHECKING:
    from datasets import Dataset

log = logging.getLogger(__name__)

SERVED = "student"  # the folder beside the rounds from which servers load the student


class RefreshedSamples:
    """A training set whose answers are replaced in each round; ids, prompts and order stay.

    ``advantages``: a round's answers -> the advantage of each id; None = answers are not rewarded.
    """

    def __init__(
        self,
        samples: "Dataset | GroupedSamples",
        advantages: Callable[[Iterable[Trajectory]], dict[str, float | None]] | None = None,
    ):
        self.samples, self.advantages = samples, advantages
        self.newer: dict[str, dict[str, Any]] = {}

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = self.samples[index]
        return sample | self.newer.get(sample["id"], {})

    @property
    def data(self) -> Any:
        """The columns as loaded."""
        return self.samples.data

    def read(self, folder: Path) -> list[Trajectory]:
        """Take the answers of a round; drop the answers of earlier rounds. Returns the round."""
        self.newer = {}
        answers = list(read_shards(folder))
        advantages = self.advantages(answers) if self.advantages else {}
        for t in answers:
            kept = len(t.response_ids)
            if "unmask_step" not in self.samples.column_names:
                # SFT adds pads, which teach an end. So a cut answer keeps only whole blocks, as at loading.
                cut = blocks_within(len(t.prompt_ids), kept, t.block_size, t.length)
                kept = t.length if t.finish_reason == "stop" else cut
            self.newer[t.id] = {
                "response_ids": t.response_ids[:kept],
                "unmask_step": t.unmask_step[:kept],
                "length": min(t.length, kept),
                "initial_ids": t.initial_ids,
                "max_token": t.decode.get("max_token", 0),
            }
            if self.advantages:
                self.newer[t.id] |= {"old_log_prob": t.log_probs, "advantage": advantages[t.id]}
        return answers


class Rounds:
    """Draws a training set's answers again in every round. Every process holds one, and all call it together.

    Attributes:
        every: optimizer steps from one round to the next.
        samples: the training set with the answers of the current round.
        reinforcement: rewards the answers; None = they are not rewarded.
        news: the figures of a round that are not logged yet.
        export: writes the student as a model folder; SGLang servers load it from there.
        served: the engine on these servers, with the student of the last round; None = rounds decode in this process.
    """

    def __init__(
        self,
        config: TrainConfig,
        objective: Objective,
        samples: "Dataset",
        ids: SpecialIds,
        source: str,
        accelerator: Accelerator,
        positions: int,
    ):
        """``positions``: the model's number of positions. Raises UserError if no process holds the whole student, or if
        a round would be impossible.
        """
        if zero_stage(accelerator) == 3:
            raise UserError(
                "training.refresh_rollouts: the student's weights are split over processes, so that none can decode; "
                "use ZeRO-1 or ZeRO-2, or leave it null",
                "training.refresh_rollouts",
            )
        refuse_impossible(config, objective, samples, positions)
        assert config.training.refresh_rollouts
        self.every = config.training.refresh_rollouts
        self.training, self.ids, self.accelerator = config.training, ids, accelerator
        self.samples, self.reinforcement = RefreshedSamples(samples), None
        if isinstance(objective, RewardedObjective):
            self.reinforcement = Reinforcement(config, objective, samples, ids, source, accelerator, positions)
            self.samples = RefreshedSamples(self.reinforcement.samples, self.reinforcement.advantages)
        self.news: dict[str, float] = {}
        self.export: Callable[[Path], object] | None = None
        self.served: Engine | None = None

    def refresh(self, student, indices: Sequence[int], folder: Path, step: int) -> None:
        """Decode the samples ``indices`` with the student after ``step``. Training then uses these answers.

        Every process decodes its share. The order of ``indices`` and the number of processes change no answer.
        """
        target = round_folder(folder, step)
        if self.accelerator.is_main_process:  # a killed run's answers may come from lost weights
            shutil.rmtree(target, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        answers = self._add(student, self._decoded(indices, step), target, step)
        if self.reinforcement:
            number = step // self.every
            self.news = self.reinforcement.news(answers, round_folder(folder, 0))
            model, seed = unwrapped(self.accelerator, student), self.training.seed
            decode = partial(self._answers, model, seed=seed)
            self.news |= self.reinforcement.heldout_accuracy(number, decode, decode_settings(self.training, number))

    def pop_news(self, step: int) -> dict[str, float]:
        """The figures to log with optimizer ``step``: a new round's, and the age of its weights in steps."""
        news, self.news = self.news, {}
        return news | {"stale_steps": (step - 1) % self.every} if self.reinforcement else news

    def restore(self, student, indices: Sequence[int], folder: Path, step: int) -> None:
        """Continue after ``step`` with that step's round, for the samples ``indices``.

        After a change of the batch size or the end some of them have no answer yet; they are decoded now.

        Raises:
            UserError: the round's trajectories are gone.
        """
        begun = step // self.every * self.every
        if not indices or not (begun or self.training.refresh_at_start):
            return
        if begun == step:
            return self.refresh(student, indices, folder, step)
        target = round_folder(folder, begun)
        if not target.is_dir():
            raise UserError(
                f"training.refresh_rollouts: {target} is missing, step {step} needs it; start a new run",
                "training.refresh_rollouts",
            )
        self.samples.read(target)
        due = self._decoded(indices, begun)
        missing = [index for index in due if self.samples.samples[index]["id"] not in self.samples.newer]
        self.accelerator.wait_for_everyone()  # no process writes before all have read
        if missing:
            log.warning("%s lacks %d of the %d questions up to the next refresh", target, len(missing), len(indices))
            self._add(student, missing, target, begun)

    def _decoded(self, indices: Sequence[int], begun: int) -> list[int]:
        """The samples that the round after step ``begun`` decodes. The others keep the answers of the data."""
        share = data_share(self.training, begun // self.every)
        named = ((index, self.samples.samples[index]["id"]) for index in indices)
        return [i for i, name in named if not share or uniform(self.training.seed, begun, name) >= share]

    def _add(self, student, indices: Sequence[int], target: Path, begun: int) -> list[Trajectory]:
        """Add the samples ``indices`` to the round in ``target``, which began after step ``begun``; read all of it."""
        clock, accelerator, seed = time.perf_counter(), self.accelerator, self.training.seed + begun
        asked = [self.samples.samples[index] for index in indices]
        requests = [Request(*stream_of(sample["id"]), tuple(sample["prompt_ids"])) for sample in asked]
        mine = requests[accelerator.process_index :: accelerator.num_processes]
        with checkpoint.writing(target), ShardWriter(target, accelerator.process_index) as writer:
            settings = decode_settings(self.training, begun // self.every)
            model = unwrapped(accelerator, student)
            if urls := self.training.refresh_engine_urls:
                self.served = self._serve(urls, target.parent / SERVED)
            answers = self._answers(model, mine, settings, seed)
            if self.reinforcement:
                answers = self.reinforcement.scored(model, answers)
            for trajectory in answers:
                writer.write(trajectory)
        accelerator.wait_for_everyone()
        read = self.samples.read(target)
        lost = [sample["id"] for sample in asked if sample["id"] not in self.samples.newer]
        assert not lost, f"{target}: {len(lost)} answers cannot be seen, {lost[0]} first"  # a shared disk that lags
        log.info("%s: %d new answers decoded in %.0f s", target, len(requests), time.perf_counter() - clock)
        return read

    def _answers(
        self, student, requests: Sequence[Request], settings: DecodeSettings, seed: int
    ) -> Iterator[Trajectory]:
        with decoding(student):
            local = partial(LocalEngine.of, student, self.ids, max_active=self.training.refresh_max_active)
            yield from (self.served or local()).generate(requests, settings, seed)

    def _serve(self, urls: Sequence[str], folder: Path) -> Engine:
        assert self.export
        self.export(folder)
        return serve(urls, folder, self.ids, self.accelerator, self.training.refresh_max_active)


def refuse_impossible(config: TrainConfig, objective: Objective, samples: "Dataset", positions: int) -> None:
    """Raise at the start the UserErrors that otherwise only the first refresh would raise."""
    training = config.training
    assert training.block_size  # settled by the data
    import pyarrow.compute as pc

    longest = pc.max(pc.list_value_length(samples.data.column("prompt_ids"))).as_py()
    if longest + training.max_gen_length > whole_blocks(positions, training.block_size):
        raise fault(
            "training.max_gen_length",
            training.max_gen_length,
            f"a refreshed answer and its prompt share the model's {positions} positions, and the longest prompt has "
            f"{longest} tokens; lower this, or training.max_prompt_len",
        )
    refuse_conflict(decode_settings(training, 0), "training.refresh_")
    if training.refresh_engine_urls:
        refuse_unserved(decode_settings(training, 0), "training.refresh_")
    objective.check_refresh(samples[0], training)
    for name in samples["id"]:
        try:
            split_id(name)
        except ValueError as error:
            raise fault(
                "dataset.optimization_data",
                config.dataset.optimization_data,
                f"{error}, and refreshed trajectories take their random numbers from it; roll out again, or leave "
                "training.refresh_rollouts null",
            ) from None


def round_folder(folder: Path, step: int) -> Path:
    """The folder of the trajectories of the round after ``step``."""
    return folder / f"{step:08d}"


def decode_settings(training: TrainingConfig, number: int) -> DecodeSettings:
    """The decode settings of round ``number``, from 0."""
    assert training.block_size  # settled by the data
    return DecodeSettings(
        block_size=training.block_size,
        denoising_steps_per_block=training.refresh_steps_per_block or training.block_size,
        remasking_strategy=training.refresh_remasking_strategy,
        dynamic_threshold=training.refresh_dynamic_threshold,
        temperature=training.refresh_temperature,
        random_init_ratio=training.refresh_random_init_ratio,
        max_token=longest_answer(training, number),
    )


def longest_answer(training: TrainingConfig, number: int) -> int:
    """Tokens of the longest answer in round ``number``, from 0; it grows by 1 - cos, as OPDLM's does."""
    first, last = training.refresh_first_length or training.max_gen_length, training.max_gen_length
    grown = min(1.0, number / training.refresh_length_rounds)
    return round(first + (last - first) * (1 - math.cos(math.pi / 2 * grown)))


def data_share(training: TrainingConfig, number: int) -> float:
    """The share of the questions that keep the data's answers in round ``number``, from 0."""
    over = number / training.refresh_data_rounds
    return training.refresh_data_share * max(0.0, 1 - over)


def uniform(seed: int, begun: int, sample_id: str) -> float:
    """In [0, 1), a pure function of its arguments."""
    return float(torch.rand((), generator=generator_for(seed, begun, sample_id)))


@contextmanager
def decoding(model) -> Iterator[None]:
    """The model ready for decoding: in eval mode, with an attention that takes the decoder's masks."""
    implementation, training = model.config._attn_implementation, model.training
    model.config._attn_implementation = "sdpa" if implementation == "flex_attention" else implementation
    model.eval()
    try:
        yield
    finally:
        model.config._attn_implementation = implementation
        model.train(training)
