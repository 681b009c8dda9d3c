"""Stage 3: train a student on a teacher's trajectories (or, with the SFT objective, a model on given answers).

The file reads downward. After the set-up every optimizer step draws its sequences' states, accumulates their gradients
in micro-batches, steps, logs, refreshes the reference and saves. An optimizer step always has batch_size_lm x
gradient_accumulation_steps x processes sequences. The sequences and their noise are a pure function of the seed and the
step, so a resumed run repeats nothing and skips nothing.
"""

import logging
import math
import time
from collections.abc import Callable
from functools import cached_property, partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from torch import Tensor
from tqdm.auto import tqdm

from t3d.blocks.special_ids import SpecialIds
from t3d.common import options, paths
from t3d.common.errors import UserError, fault
from t3d.common.processes import choose_threads
from t3d.data.dataset import hub_rows, load_examples, load_trajectories
from t3d.data.prompts import answer_ids, render
from t3d.decode.model_facts import full_attention, logit_shift, position_count
from t3d.models.loading import export_model, load_model, load_tokenizer, provenance, special_ids, training_attention
from t3d.objectives.base import Context, FrozenSettings, Objective, find
from t3d.states.base import State, collate, generator_for
from t3d.states.packing import micro_batches
from t3d.states.whole import WholeSequence
from t3d.tasks import find_task
from t3d.training import adapters, checkpoint, planning
from t3d.training.averaging import WeightAverage
from t3d.training.distribution import (
    accumulation,
    all_names,
    declare_head,
    make_accelerator,
    unwrapped,
    zero_stage,
)
from t3d.training.interruption import StopRequest
from t3d.training.onpolicy import Rounds
from t3d.training.order import SampleOrder
from t3d.training.reference import FrozenAdapters, FrozenModel, compile_layers, refuse_other_tokens
from t3d.training.runs import fingerprint, prune_exports, refuse_other_data, refuse_other_settings, run_folder
from t3d.training.settings import TrainConfig, objective_settings
from t3d.training.tally import Tally
from t3d.training.tracking import Tracker

log = logging.getLogger(__name__)


def train(config: TrainConfig, dry_run: bool = False) -> Path | None:
    """Run a training. Returns the run's folder, with the trained model in ``ckpt/<optimized_name>``.

    ``dry_run``: print the plan and the time of three steps instead, and write only the data cache.
    """
    source = paths.model_source(config.model.pretrained_model, "model.pretrained_model")
    accelerator = make_accelerator(config)
    with accelerator.main_process_first():
        data_path = data_file(config)
    if not data_path.exists():
        raise UserError(
            f"dataset.optimization_data: {data_path} does not exist; run rollouts and data/rename_key.py",
            "dataset.optimization_data",
        )
    torch.manual_seed(config.training.seed)
    run, resumed = run_folder(config, accelerator, look=not dry_run)
    if resumed:
        checkpoint.prepare(accelerator, resumed)

    tokenizer = load_tokenizer(source, key="model.pretrained_model")
    student = load_student(config, source, accelerator)
    ids = special_ids(student.config, tokenizer, student.generation_config)
    with accelerator.main_process_first():
        samples, rollout_block = load_samples(config, data_path, tokenizer, ids, student.config.block_size)
    settle_block_size(config, rollout_block)
    objective = make_objective(config, ids)
    if warning := objective.warning(samples[0]):
        log.warning("%s: %s", data_path, warning)
    objective.check_start(source, provenance(source), logit_shift(student.config))
    if objective.teacher:
        refuse_other_tokens(objective.teacher.source, tokenizer)
    trainer = Trainer(config, accelerator, student, objective, samples, ids, source)
    if dry_run:
        planning.dry_run(trainer)
        return accelerator.end_training()
    if resumed:
        refuse_other_settings(config, run / "config.yaml")
        trainer.go_on_from(checkpoint.load(accelerator, resumed))
    if accelerator.is_main_process:
        with checkpoint.writing(run / "config.yaml"):
            options.save(config, run / "config.yaml")
    with checkpoint.writing(run):
        tracker = Tracker(
            run,
            kind=config.experiment.tracker,
            config=options.to_dict(config),
            wandb_config=config.wandb,
            name=config.experiment.project,
            resume_step=trainer.step,
            main=accelerator.is_main_process,
        )
    with StopRequest() as stop:
        try:
            finished = trainer.run(run, tracker, stop)
        finally:
            tracker.close()
        if not finished:
            accelerator.end_training()
            done = f"after step {trainer.step} of {trainer.total_steps}, with a checkpoint"
            raise stop.interrupted(f"{done}; to continue: experiment.resume={run}")
    final = trainer.export(run / "ckpt" / config.model.optimized_name)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        print(f"trained model: {final}")
    accelerator.end_training()
    return run


# ---------------------------------------------------------------------------------------------------------------------
# Set-up


def load_student(config: TrainConfig, source: str, accelerator: Accelerator):
    """The model to train, in training mode."""
    model = load_model(
        source,
        dtype=config.model.dtype,
        attn_implementation=training_attention(config.model.attn_implementation, source, accelerator.device),
        device=accelerator.device,
        key="model.pretrained_model",
    )
    choose_threads(model, accelerator.num_processes)
    training = config.training
    if model.dtype == torch.bfloat16 and not zero_stage(accelerator) and not training.lora.rank:
        log.warning(
            "model.dtype=bfloat16: without DeepSpeed or training.lora.rank there is no fp32 copy of the weights. An "
            "update below 1/512 of its weight is lost; at optimizer.params.learning_rate=%g most may be lost",
            config.optimizer.params.learning_rate,
        )
    if training.gradient_checkpointing_enable:
        # newer versions of transformers have another name for it
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
    if training.compile:
        compile_layers(model)
    return model.train()


def data_file(config: TrainConfig) -> Path:
    """The file or folder of the training data. For SFT a set of the hub is downloaded first."""
    data = config.dataset.optimization_data
    if not data.startswith("hub:"):
        return paths.data_file(data)
    if find(config.training.objective).data != "examples":
        raise fault("dataset.optimization_data", data, "only training.objective=sft learns from sets of the hub")
    return hub_rows(data.removeprefix("hub:"))


def settle_block_size(config: TrainConfig, rollout_block: int) -> None:
    """``training.block_size`` defaults to the rollouts' block, and must be a multiple of it.

    A smaller block would have states that the teacher never visited.
    """
    training = config.training
    training.block_size = training.block_size or rollout_block
    if find(training.objective).data == "trajectories" and training.block_size % rollout_block:
        raise fault(
            "training.block_size", training.block_size, f"must be a multiple of the rollouts' block, {rollout_block}"
        )
    config.check()  # the limits that depend on the block


def load_samples(config: TrainConfig, path: Path, tokenizer, ids: SpecialIds, model_block: int):
    """The training set as memory-mapped columns: trajectories, or for SFT questions with their answers.

    Returns the set and the data's block size: the rollouts', or for SFT the model's.
    """
    training, task = config.training, find_task(config.dataset.data_type, "dataset.data_type")
    turn = task.turn if training.instruction else itemgetter("question")
    limits: dict[str, Any] = {
        "max_prompt_len": training.max_prompt_len,
        "max_gen_length": training.max_gen_length,
        "limit": config.dataset.limit,
    }
    if find(training.objective).data == "examples":
        samples, _ = load_examples(
            path,
            prompt_ids=lambda row: render(turn(row), tokenizer),
            answer_ids=partial(answer_ids, tokenizer=tokenizer),
            question_key=config.dataset.question_key,
            answer_key=config.dataset.answer_key,
            block_size=training.block_size or model_block,
            **limits,
        )
        return samples, model_block
    bare = None if training.instruction else partial(render, tokenizer=tokenizer)
    model = None if config.dataset.allow_other_model else config.model.pretrained_model
    samples, report = load_trajectories(
        path, tokenizer=tokenizer, mask_id=ids.mask_id, prompt_ids=bare, model=model, **limits
    )
    return samples, report.block_size


def make_objective(config: TrainConfig, ids: SpecialIds) -> Objective:
    """The objective of ``training.objective``; ``training.block_size`` must be settled."""
    training = config.training
    assert training.block_size
    context = Context(
        training.block_size,
        ids,
        training.head_chunk,
        config.model.random_ratio,
        training.refresh_temperature,
        training.refresh_steps_per_block,
    )
    return find(training.objective).build(objective_settings(training), context)


def noise_for(
    config: TrainConfig, objective: Objective, ids: SpecialIds, model_config: Any
) -> Callable[[dict, torch.Generator], State]:
    """How training states are drawn: the objective's noise, under full attention at one block of a whole sequence.

    Raises:
        UserError: something needs the block-causal layout, which full attention does not have.
    """
    if not full_attention(model_config):
        return objective.noise
    training = config.training
    remedy = "needs block-causal attention, which this model does not have"
    if objective.block_causal:
        raise fault("training.objective", training.objective, f"{remedy}; take sft, naive_td, t3d or dparallel")
    if objective.copies > 1:
        raise fault("training.path_states", "own", f"{remedy}; set it to shared")
    assert training.block_size
    return WholeSequence(objective.noise, training.block_size, ids.mask_id, training.max_gen_length)


# ---------------------------------------------------------------------------------------------------------------------
# The loop


class Trainer:
    """The student, its reference, its optimizer, and the loop over optimizer steps.

    Attributes:
        step: optimizer steps done. total_steps: optimizer steps of the whole run.
        order: the sequences of each step.
    """

    def __init__(self, config: TrainConfig, accelerator: Accelerator, student, objective, samples, ids, source):
        self.config, self.accelerator, self.objective = config, accelerator, objective
        self.ids, self.source = ids, source
        training, params = config.training, config.optimizer.params
        self.rounds = None
        if training.refresh_rollouts:
            self.rounds = Rounds(config, objective, samples, ids, source, accelerator, position_count(student.config))
        self.samples = self.rounds.samples if self.rounds else samples
        batch = training.batch_size_lm * training.gradient_accumulation_steps * accelerator.num_processes
        if batch > len(self.samples) and accelerator.is_main_process:
            log.warning(
                "an optimizer step has %d sequences and the data set %d: a step sees some of them several times. Lower "
                "training.gradient_accumulation_steps or training.batch_size_lm for steps without repetition",
                *(batch, len(self.samples)),
            )
        self.step = 0
        self.order = SampleOrder(len(self.samples), batch, training.seed, group=self.group(batch))
        self.total_steps = training.max_steps or self.order.steps(training.num_train_epochs)
        self.warm = 0  # sequences drawn when the warm-up ended
        self.flex = student.config._attn_implementation == "flex_attention"
        self.shift = logit_shift(student.config)
        self.noise = noise_for(config, objective, ids, student.config)
        kept = objective.reference
        frozen = kept is not None and not kept.is_student
        shared = training.lora.rank > 0 and not objective.teacher  # student and reference have one base
        if training.lora.rank:
            adapters.add(student, training.lora, with_reference=frozen and shared)
        optimizer = torch.optim.AdamW(
            [parameter for parameter in student.parameters() if parameter.requires_grad],
            lr=params.learning_rate,
            betas=(params.beta1, params.beta2),
            weight_decay=params.weight_decay,
            eps=params.epsilon,
        )
        self.reference: FrozenAdapters | FrozenModel | None = None
        self.teacher_shift = self.shift
        if frozen and shared:
            self.reference = FrozenAdapters(student, accelerator)
        elif frozen:
            self.hold_second_model(kept)
        if zero_stage(accelerator) == 3:
            declare_head(student)
        self.student, self.optimizer = accelerator.prepare(student, optimizer)
        if self.rounds:
            self.rounds.export = lambda folder: self.export_weights(unwrapped(accelerator, self.student), folder)
        self.average = None
        if training.ema_decay is not None:
            self.average = WeightAverage(student, training.ema_decay)
            accelerator.register_for_checkpointing(self.average)

    def group(self, batch: int) -> int:
        """The answers to one question, which an optimizer step of ``batch`` sequences sees together."""
        if self.rounds is None or self.rounds.reinforcement is None:
            return 1
        group = self.rounds.reinforcement.samples.group
        if batch % group:
            raise fault(
                "training.samples_per_question",
                group,
                f"does not divide the {batch} sequences of a step, and a step sees whole questions; change one of them",
            )
        return group

    def hold_second_model(self, kept: FrozenSettings) -> None:
        """The frozen reference as a model of its own. One that is refreshed goes with the checkpoints."""
        offload, teacher = kept.reference_offload, self.objective.teacher
        model = FrozenModel(self.config, self.source, self.accelerator, offload, teacher)
        self.reference, self.teacher_shift = model, logit_shift(model.model.config)
        if kept.refreshed:
            self.accelerator.register_for_checkpointing(model)

    @cached_property
    def data(self) -> dict:
        """The fingerprint of the training set, so that a resumed run uses the same set."""
        return fingerprint(self.samples)

    def go_on_from(self, state: dict) -> None:
        """Continue from a checkpoint's position, for any size of its batches.

        Raises:
            UserError: it was trained on other data.
        """
        refuse_other_data(self.config.dataset.optimization_data, state.get("data"), self.data)
        self.step, self.warm = state["step"], state["warm"]
        self.order = self.order.resumed(self.step, state["sequences"])
        training = self.config.training
        self.total_steps = max(self.step, training.max_steps or self.order.steps(training.num_train_epochs))

    def run(self, run: Path, tracker: Tracker, stop: StopRequest) -> bool:
        """Optimizer steps to the end, with a checkpoint every ``save_every_steps``; False after a request to stop."""
        config, accelerator = self.config, self.accelerator
        bar = tqdm(
            total=self.total_steps,
            initial=self.step,
            desc="train",
            unit="step",
            dynamic_ncols=True,
            disable=not accelerator.is_local_main_process,
        )
        first = self.step
        if self.rounds:
            self.rounds.restore(self.student, self.ahead(first, self.rounds.every), run / "rollouts", first)
        for step in range(first + 1, self.total_steps + 1):
            began = time.perf_counter()
            if step <= config.lr_scheduler.params.warmup_steps:
                self.warm = self.order.consumed(step)
            rate = learning_rate(config, step, self.progress(step))
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            metrics = self.optimizer_step(step, stop.received is not None)
            self.step = step
            stopping = metrics.pop("stopping") > 0 and step < self.total_steps
            metrics["tokens_per_second"] = metrics["tokens"] / (time.perf_counter() - began)
            news = self.rounds.pop_news(step) if self.rounds else {}
            with checkpoint.writing(run):
                tracker.log({"epoch": self.order.indices(step - 1)[0][0], **metrics, **news, "lr": rate}, step)
            bar.update()
            bar.set_postfix(loss=f"{metrics['loss']:.4f}", lr=f"{rate:.1e}", refresh=False)
            self.refresh_reference(step)
            if stopping or step == self.total_steps:
                self.save(run)
            elif step % config.experiment.save_every_steps == 0:
                self.save(run)
                self.export_under_way(run)
            if stopping:
                break
            self.refresh_rollouts(run, step)
        bar.close()
        return self.step == self.total_steps

    def progress(self, step: int) -> float:
        """The part of the schedule after the warm-up that is over at ``step``, 0 to 1.

        It is counted in steps if ``max_steps`` sets the end, else in sequences. So a run that is resumed with another
        global batch continues at its learning rate.
        """
        warmup = self.config.lr_scheduler.params.warmup_steps
        if step <= warmup:
            return 0.0
        if self.config.training.max_steps:
            return (step - warmup) / (self.total_steps - warmup)
        return (self.order.consumed(step) - self.warm) / (self.order.consumed(self.total_steps) - self.warm)

    def optimizer_step(self, step: int, stop: bool = False) -> dict[str, float]:
        """Accumulate this step's sequences and update the student; returns the metrics of the global batch.

        The loss of a step is the mean over its sequences on all processes. Sequences without targets do not count,
        unless the objective counts them. Every micro-batch contributes the sum over its own sequences, divided by the
        global count. So neither micro-batches nor processes change the loss. Nothing waits for the device between the
        count at the start and the metrics at the end.
        """
        accelerator, training = self.accelerator, self.config.training
        self.objective.progress = (step - 1) / self.total_steps
        states = self.draw_states(step)
        learning = [state for state in states if state.masked.any()]
        batches = micro_batches(
            learning, size=training.batch_size_lm, budget=training.tokens_per_batch, packed=self.flex
        )
        sequences, drawn, rounds = self.exchange_counts(len(learning), len(states), len(batches))
        divisor = max(drawn if self.objective.counts_empty else sequences, 1)
        tally = Tally(accelerator.device)
        for number in range(rounds):
            # ZeRO-2 and 3 communicate in every round, so all processes take part. A process without a batch computes
            # its shortest state and adds nothing.
            counted = number < len(batches)
            rows = batches[number] if counted else [[min(states, key=len)]]
            layout = {"flex": self.flex, "shift": self.shift, "teacher_shift": self.teacher_shift}
            batch = collate(rows, self.ids.pad_id, **layout, device=accelerator.device)
            with accumulation(accelerator, self.student, last=number == rounds - 1):
                loss, metrics = self.objective(self.student, self.reference, batch)
                # DDP and DeepSpeed average gradients over processes; the loss needs their sum
                self.backward(loss.sum() * (counted * accelerator.num_processes / divisor))
            if counted:
                tally.add(loss, metrics, batch.tokens, [state.sample_id for row in rows for state in row])
            else:
                tally.add(loss[:0], {name: value[:0] for name, value in metrics.items()}, 0, [])
        totals, norm = self.update(step, tally, stop)
        tokens, stopping = totals.pop("tokens"), totals.pop("stopping")
        means = {name: value / divisor for name, value in totals.items()}
        means = {"loss": means.pop("loss", 0.0), **means, "grad_norm": norm, "tokens": tokens, "stopping": stopping}
        if (kept := self.objective.reference) and kept.refreshed:
            means["round"] = kept.round_at(step)
        return {**means, "sequences": sequences, "skipped": drawn - sequences}

    def draw_states(self, step: int) -> list[State]:
        """This process's states of one optimizer step: fresh masks each epoch, seeded by (seed, epoch, sample id)."""
        states = []
        for epoch, index in self.local_indices(step):
            sample = self.samples[index]
            state = self.noise(sample, generator_for(self.config.training.seed, epoch, sample["id"]))
            state.sample_id = sample["id"]
            states.append(state)
        return states

    def local_indices(self, step: int) -> list[tuple[int, int]]:
        return self.order.share(step - 1, self.accelerator.process_index, self.accelerator.num_processes)

    def exchange_counts(self, learning: int, drawn: int, batches: int) -> tuple[int, int, int]:
        """(sequences with targets, sequences drawn, most micro-batches of a process) over all processes."""
        mine = torch.tensor([[learning, drawn, batches]], device=self.accelerator.device)
        counts = self.accelerator.gather(mine).cpu()
        return int(counts[:, 0].sum()), int(counts[:, 1].sum()), max(1, int(counts[:, 2].max()))

    def backward(self, loss: Tensor) -> None:
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            self.student.backward(loss)  # accelerate's backward would step at once, before the loss is checked
        else:
            self.accelerator.backward(loss)

    def update(self, step: int, tally: "Tally", stop: bool) -> tuple[dict[str, float], float]:
        """Check the losses, clip, step, clear. Returns the sums over all processes and the norm before clipping.

        Raises:
            UserError: a loss or a gradient that is not finite; nothing is written after that.
        """
        accelerator, clip_norm = self.accelerator, self.config.clip_norm
        deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
        found = None
        if not deepspeed:
            found = accelerator.clip_grad_norm_(self.student.parameters(), clip_norm or math.inf)
        totals, losses, norm = tally.read(accelerator, found, stop)
        if totals.pop("faults"):
            guilty = all_names(
                [name for name, loss in zip(tally.names, losses, strict=True) if not math.isfinite(loss)]
            )
            raise UserError(
                f"loss is nan or infinite at step {step}, in sequences {', '.join(guilty)}; nothing was overwritten; "
                "start again with a lower optimizer.params.learning_rate, or remove the sequences",
                "loss",
            )
        if deepspeed:  # DeepSpeed clips in its own step
            self.student.step()
            norm = float(self.student.get_global_grad_norm())
        assert norm is not None
        if not math.isfinite(norm) and accelerator.mixed_precision != "fp16":  # fp16's scaler skips such steps
            raise UserError(
                f"gradient norm is {norm} at step {step}; nothing was overwritten; start again with a lower "
                "optimizer.params.learning_rate",
                "grad_norm",
            )
        if not deepspeed:
            self.optimizer.step()
            self.optimizer.zero_grad()
        if self.average:
            self.average.update()
        return totals, norm

    def refresh_reference(self, step: int) -> None:
        """ref <- stopgrad(theta) every ``round_interval`` optimizer steps."""
        if self.reference and self.objective.reference.ends_round(step):
            self.reference.refresh(unwrapped(self.accelerator, self.student))

    def refresh_rollouts(self, run: Path, step: int) -> None:
        """Every ``refresh_rollouts`` steps, decode again the samples of the steps up to the next refresh.

        It follows the step's checkpoint. A run that resumes from there begins with it, with the same weights.
        """
        if self.rounds and step % self.rounds.every == 0 and step < self.total_steps:
            self.rounds.refresh(self.student, self.ahead(step, self.rounds.every), run / "rollouts", step)

    def ahead(self, step: int, interval: int) -> list[int]:
        """The samples that the steps after ``step`` will see, up to the next multiple of ``interval`` or the end."""
        end = min((step // interval + 1) * interval, self.total_steps)
        return sorted({index for later in range(step, end) for _, index in self.order.indices(later)})

    def save(self, run: Path) -> None:
        """A checkpoint to resume from."""
        state = {"step": self.step, "sequences": self.order.consumed(self.step), "warm": self.warm, "data": self.data}
        limit = self.config.experiment.checkpoints_total_limit
        checkpoint.save(self.accelerator, run / "checkpoints", self.step, state, limit)

    def export_under_way(self, run: Path) -> None:
        """Write a model folder for evaluation during training."""
        name, limit = self.config.model.optimized_name, self.config.experiment.checkpoints_total_limit
        epoch = self.order.indices(self.step - 1)[0][0]
        self.export(run / "ckpt" / name, f"-{epoch}-{self.step}")
        if self.accelerator.is_main_process:
            for kind in (name, name + AVERAGED):
                prune_exports(run / "ckpt", kind, limit)

    def export(self, folder: Path, suffix: str = "") -> Path:
        """Write the student, and its moving average if there is one, as Hugging Face folders like the teacher's."""
        student = unwrapped(self.accelerator, self.student)
        target = folder.with_name(folder.name + suffix)
        self.export_weights(student, target)
        if self.average:
            with self.average.in_place():
                self.export_weights(student, folder.with_name(folder.name + AVERAGED + suffix))
        return target

    def export_weights(self, student, folder: Path) -> None:
        main = self.accelerator.is_main_process
        # Under ZeRO-3 all processes take part. Otherwise only the main process needs a copy.
        if main or zero_stage(self.accelerator) == 3:
            state_dict = self.accelerator.get_state_dict(self.student)
        if main:
            if self.config.training.lora.rank:
                state_dict = adapters.merged(student, state_dict)
            training = self.config.training
            made_by = {
                "objective": training.objective.rpartition(":")[2],
                "project": self.config.experiment.project,
                "run": folder.parents[1].name,
                "step": self.step,
                "teacher": self.config.model.pretrained_model,
            }
            with checkpoint.writing(folder):
                export_model(
                    student,
                    self.source,
                    folder,
                    state_dict=state_dict,
                    block_size=training.block_size,
                    made_by=made_by,
                )
        self.accelerator.wait_for_everyone()


AVERAGED = "-ema"  # the ending of the name of a folder with averaged weights


def learning_rate(config: TrainConfig, step: int, progress: float) -> float:
    """The rate of optimizer step 1, 2, ...: linear warm-up, then cosine (or linear) down to the floor.

    Args:
        progress: the part of the schedule after the warm-up that is over, 0 to 1.
    """
    peak, schedule = config.optimizer.params.learning_rate, config.lr_scheduler
    warmup, floor = schedule.params.warmup_steps, schedule.params.min_lr_scale
    if step <= warmup:
        return peak * step / warmup
    if schedule.scheduler == "constant":
        return peak
    fall = 1 - progress if schedule.scheduler == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return peak * (floor + (1 - floor) * fall)


if __name__ == "__main__":
    raise SystemExit("this module is no command: use `t3d train` or `python -m t3d.training`")
