"""Stage 1: record a model's own decoding trajectories over a set of questions. Evaluation decodes by the same code.

Every process takes its share of the requests and appends finished trajectories to its own shard. So a killed run loses
at most the answers in flight. The next run decodes the missing answers, on any number of processes.
"""

import json
import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from tqdm.auto import tqdm

from t3d.blocks.settings import DecodeSettings
from t3d.common import options, paths
from t3d.common.errors import UserError, disk_faults_as_user_errors, fault
from t3d.common.processes import choose_threads, is_main_process
from t3d.data.release import write_release_json
from t3d.data.shards import ShardWriter, claim_folder, finished_ids, read_shards
from t3d.decode.local import LocalEngine
from t3d.decode.model_facts import position_count, whole_blocks
from t3d.decode.protocol import SERVED_BY_SGLANG, Engine, Request
from t3d.models.decoder import load_decoder
from t3d.models.fingerprint import weights_fingerprint
from t3d.models.loading import (
    folder_config,
    load_config,
    load_generation_config,
    load_tokenizer,
    located,
    special_ids,
)
from t3d.rollout.settings import RolloutConfig, SampleConfig
from t3d.tasks import find_task, prompt_ids
from t3d.tasks.problems import Problem, load_problems

log = logging.getLogger(__name__)


def roll_out(config: SampleConfig) -> Path:
    """Decode the data set and write the release's JSON next to the shards; returns the JSON's path."""
    data, task = config.evaluation, find_task(config.evaluation.data_type)
    everything = load_problems(data.eval_dataset, data.data_type, data.limit)
    problems = fitting(config, node_share(everything, data.num_node, data.node_index))
    stem = paths.rollout_stem(
        config.experiment.project, data.checkpoint_path, data.eval_dataset, data.num_node, data.node_index
    )
    decode(config, problems, stem)
    output = paths.json_file(stem)
    if is_main_process():
        samples = range(config.rollout.num_response_per_task)
        wanted = {f"{problem.id}/{k}" for problem in problems for k in samples}
        # an earlier run of this project may have decoded more; a folder is streamed, a selection is sorted in memory
        exactly = finished_ids(stem) == wanted
        tokenizer = load_tokenizer(data.checkpoint_path, key="evaluation.checkpoint_path")
        count = write_release_json(
            output,
            stem if exactly else (t for t in read_shards(stem) if t.id in wanted),
            rows=[problem.raw for problem in everything],
            extract=lambda text, row: task.extract(text, row) or "",
            prompt_text=tokenizer.decode,
            step_map=data.output_unmasking_history,
        )
        print(f"{output}: {count} questions")
    return output


def node_share(problems: list[Problem], num_node: int, node_index: int) -> list[Problem]:
    """This machine's contiguous share of the data set."""
    start, end = (len(problems) * k // num_node for k in (node_index, node_index + 1))
    if start == end:
        raise fault("evaluation.num_node", num_node, f"no question is left for node {node_index}; use fewer nodes")
    return problems[start:end]


def fitting(config: SampleConfig, problems: list[Problem]) -> list[Problem]:
    """The problems to decode. rollout.long_prompts=skip leaves out problems without room for rollout.max_token."""
    if config.rollout.long_prompts == "error":
        return problems
    source = paths.model_source(config.evaluation.checkpoint_path, "evaluation.checkpoint_path")
    tokenizer = load_tokenizer(source, key="evaluation.checkpoint_path")
    positions = position_count(load_config(source, key="evaluation.checkpoint_path"))
    lengths = [len(prompt_of(problem, config, tokenizer)) for problem in problems]
    short = [p for p, length in zip(problems, lengths, strict=True) if has_room(length, config.rollout, positions)]
    if is_main_process() and (lost := len(problems) - len(short)):
        print(
            f"rollout.long_prompts=skip: {lost} of {len(problems)} questions left out, the longest has {max(lengths)} "
            f"tokens; the model has {positions} positions",
            flush=True,
        )
    if not short:
        raise fault("rollout.max_token", config.rollout.max_token, f"no prompt fits {positions} positions; lower it")
    return short


def has_room(prompt_length: int, rollout: RolloutConfig, positions: int) -> bool:
    """Whether a prompt and an answer of rollout.max_token, in whole blocks, fit a model's positions."""
    return -(-(prompt_length + rollout.max_token) // rollout.block_size) * rollout.block_size <= positions


def prompt_of(problem: Problem, config: SampleConfig, tokenizer: Any) -> list[int]:
    """The ids of a problem's prompt. Raises UserError, with the problem's name, if it cannot be rendered."""
    task = find_task(config.evaluation.data_type)
    try:
        return prompt_ids(task, problem.raw, tokenizer, config.rollout.start_with_think)
    except UserError as error:
        raise UserError(f"{problem.id}: {error}", error.key) from error


def refuse_long(requests: Sequence[Request], rollout: RolloutConfig, positions: int) -> None:
    """Raises UserError, with the remedies, if a request has no room for rollout.max_token."""
    longest = max(requests, key=lambda request: len(request.prompt_ids))
    length = len(longest.prompt_ids)
    if has_room(length, rollout, positions):
        return
    said = f"prompt {longest.id} has {length} tokens, and the model has {positions} positions"
    skip = "leave such prompts out by rollout.long_prompts=skip"
    room = whole_blocks(positions, rollout.block_size) - length
    if room < 1:
        raise fault("rollout.long_prompts", rollout.long_prompts, f"{said}, too few for any answer; {skip}")
    raise fault("rollout.max_token", rollout.max_token, f"{said}; lower it to {room}, or {skip}")


# ---------------------------------------------------------------------------------------------------------------------
# Decoding over processes


@dataclass(frozen=True)
class Job:
    """Questions to answer under one configuration, and the folder where the trajectories go."""

    config: SampleConfig
    problems: list[Problem]
    folder: Path


def decode(config: SampleConfig, problems: list[Problem], folder: Path) -> None:
    """Fill ``folder`` with one trajectory per problem and sample, by all processes. Returns when all are complete.

    ``accelerate launch`` starts the processes; otherwise this function starts ``rollout.num_processes``, one per
    visible GPU by default.

    Raises:
        UserError: the folder holds trajectories of other weights or settings.
    """
    for _ in decode_all([Job(config, problems, folder)]):
        pass


def decode_all(jobs: Sequence[Job]) -> Iterator[Job]:
    """``decode`` for several jobs of one model, which every process loads at most once. Yields a job when its
    trajectories are complete. If this function starts the processes, it yields all jobs at the end.
    """
    config = jobs[0].config
    source = paths.model_source(config.evaluation.checkpoint_path, "evaluation.checkpoint_path")
    if is_main_process():
        for job in jobs:
            _claim(job, source)
    world = int(os.environ.get("WORLD_SIZE", 1))
    processes = config.rollout.num_processes or max(1, torch.cuda.device_count())
    if config.rollout.engine == "sglang":
        processes = 1
        _refuse_unserved(jobs, world)
    if world > 1:
        state = PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=7))
        loaded = Loaded(config, source, state.process_index, world)
        for job in jobs:
            state.wait_for_everyone()
            decode_share(job, loaded, state.process_index, world)
            state.wait_for_everyone()
            yield job
    elif processes == 1:
        loaded = Loaded(config, source, 0, 1)
        for job in jobs:
            decode_share(job, loaded, 0, 1)
            yield job
    else:
        try:
            torch.multiprocessing.spawn(_spawned, args=(processes, os.getpid(), jobs, source), nprocs=processes)
        except torch.multiprocessing.ProcessRaisedException as error:  # its text is the process's traceback
            line, key = str(error).strip().splitlines()[-2:]  # the key is the note of _spawned
            kind, _, message = line.partition(": ")
            if kind != f"{UserError.__module__}.{UserError.__qualname__}":
                raise
            raise UserError(message, key) from None
        yield from jobs


def _claim(job: Job, source: str) -> None:
    """Note the job's settings in its folder. Raises UserError where the folder has others."""
    if not finished_ids(job.folder):  # a run that failed before its first answer does not bind later runs
        (job.folder / "settings.json").unlink(missing_ok=True)
    # keys that an older folder lacks had their defaults
    defaults = asdict(DecodeSettings()) | {"engine": "local", "dtype": "auto"}
    claim_folder(job.folder, claimed_settings(job.config, source), defaults)
    options.save(job.config, job.folder / "config.yaml")


def _refuse_unserved(jobs: Sequence[Job], world: int) -> None:
    """Raises UserError for jobs that SGLang's servers do not support."""
    if world > 1:
        raise fault("rollout.engine", "sglang", "one process uses all servers; start it without accelerate launch")
    blocks = sorted({job.config.rollout.block_size for job in jobs})
    if len(blocks) > 1:
        raise UserError(
            f"rollout.engine=sglang: a server has one block size, and this run needs {blocks}; choose one by "
            "evaluation.protocol_blocks",
            "evaluation.protocol_blocks",
        )


def _spawned(rank: int, processes: int, parent: int, jobs: Sequence[Job], source: str) -> None:
    # torch ends this process by SIGINT when the parent dies; a shell's background process ignores SIGINT by default
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if os.getppid() != parent:  # the parent died before the handler was set
        return
    loaded = Loaded(jobs[0].config, source, rank, processes)
    try:
        with disk_faults_as_user_errors():
            for job in jobs:
                decode_share(job, loaded, rank, processes)
    except UserError as error:  # the parent gets the traceback's text
        error.add_note(str(error.key))
        raise


@dataclass
class Loaded:
    """One process's tokenizer and engine. They are loaded at the first missing answer and kept for the next jobs."""

    config: SampleConfig
    source: str
    rank: int
    processes: int

    @cached_property
    def tokenizer(self):
        return load_tokenizer(self.source, key="evaluation.checkpoint_path")

    @cached_property
    def positions(self) -> int:
        return position_count(load_config(self.source, key="evaluation.checkpoint_path"))

    @cached_property
    def engine(self) -> Engine:
        engine = make_engine(self.config, self.source, self.tokenizer, self.rank)
        if isinstance(engine, LocalEngine):
            choose_threads(engine.model, self.processes)
        return engine


def claimed_settings(config: SampleConfig, source: str) -> dict:
    """The settings on which the tokens depend. They must not change while a folder is filled."""
    data, rollout = config.evaluation, config.rollout
    return {
        **asdict(rollout.decode_settings()),
        "seed": rollout.seed,
        "start_with_think": rollout.start_with_think,
        "engine": rollout.engine,
        "dtype": rollout.dtype,
        "data_type": data.data_type,
        "eval_dataset": paths.data_name(data.eval_dataset),
        "model": paths.model_name(data.checkpoint_path),
        "weights": weights_fingerprint(source),
    }


def decode_share(job: Job, loaded: Loaded, rank: int, world: int) -> None:
    """One process's part of a job: every world-th request that no shard holds yet."""
    config, problems, folder = job.config, job.problems, job.folder
    rollout = config.rollout
    samples = rollout.num_response_per_task
    wanted = [(problem, sample) for problem in problems for sample in range(samples)][rank::world]
    done = finished_ids(folder)
    missing = [(problem, sample) for problem, sample in wanted if f"{problem.id}/{sample}" not in done]
    if not missing:
        return
    tokenizer = loaded.tokenizer
    requests, problem_of = [], {}
    for problem, sample in missing:
        requests.append(Request(problem.id, sample, tuple(prompt_of(problem, config, tokenizer))))
        problem_of[requests[-1].id] = problem
    refuse_long(requests, rollout, loaded.positions)
    engine = loaded.engine

    label = f"decode {rank + 1}/{world}" if world > 1 else "decode"
    bar = tqdm(
        total=len(wanted),
        initial=len(wanted) - len(missing),
        desc=label,
        unit="answer",
        dynamic_ncols=True,
        disable=rank != 0,
    )
    tokens, steps, began = 0, 0, time.perf_counter()
    with bar, ShardWriter(folder, rank) as writer:
        for trajectory in engine.generate(requests, rollout.decode_settings(), rollout.seed):
            problem = problem_of[trajectory.id]
            trajectory.model = config.evaluation.checkpoint_path
            trajectory.question, trajectory.ground_truth = problem.question, problem.ground_truth
            trajectory.text = tokenizer.decode(trajectory.response_ids[: trajectory.length], skip_special_tokens=True)
            writer.write(trajectory)
            tokens, steps = tokens + trajectory.length, steps + trajectory.steps
            rate = tokens / (time.perf_counter() - began)
            bar.set_postfix_str(f"{rate:.0f} tokens/s, {tokens / steps:.2f} tokens/step", refresh=False)
            bar.update()
    session = Session(rank, len(missing), tokens, time.perf_counter() - began)
    with (folder / "sessions.jsonl").open("a") as file:
        file.write(json.dumps({**asdict(session), "host": socket.gethostname()}) + "\n")


@dataclass
class Session:
    """One process's decoding in one run: answers, tokens, wall-clock seconds (without loading)."""

    rank: int
    answers: int
    tokens: int
    seconds: float


def throughput(folder: Path) -> tuple[float | None, float]:
    """(tokens/s of all processes together, wall-clock seconds) of the finished sessions; (None, 0) without one."""
    tokens: dict[int, int] = {}
    seconds: dict[int, float] = {}
    for session in _sessions(folder):
        tokens[session["rank"]] = tokens.get(session["rank"], 0) + session["tokens"]
        seconds[session["rank"]] = seconds.get(session["rank"], 0.0) + session["seconds"]
    if not seconds:
        return None, 0.0
    return sum(tokens[rank] / seconds[rank] for rank in tokens), max(seconds.values())


def _sessions(folder: Path) -> Iterator[dict]:
    path = folder / "sessions.jsonl"
    if path.exists():
        yield from (json.loads(line) for line in path.read_text().splitlines() if line.endswith("}"))


def make_engine(config: SampleConfig, source: str, tokenizer, rank: int) -> Engine:
    """The engine of ``rollout.engine`` on this process's device, or on its servers."""
    rollout = config.rollout
    if rollout.engine == "sglang":
        return make_sglang_engine(config, source, tokenizer)
    gpus = torch.cuda.device_count()
    return load_decoder(
        source,
        dtype=rollout.dtype,
        attn_implementation=rollout.attn_implementation,
        device=torch.device("cuda", rank % gpus) if gpus else None,
        tokenizer=tokenizer,
        key="evaluation.checkpoint_path",
        max_active=min(rollout.max_active, rollout.batch_size or rollout.max_active),
        fused_commit=rollout.fused_commit,
        compile=rollout.compile,
    ).engine


def make_sglang_engine(config: SampleConfig, source: str, tokenizer) -> Engine:
    """SGLang on ``rollout.engine_urls``, or inside this process. This function does not load the model."""
    from t3d.decode.sglang import HttpServer, OfflineServer, Server, SGLangEngine, Weights, offline_engine

    rollout = config.rollout
    if Path(source).is_dir():  # an adapter is served as the model that it makes
        source = located(source, "evaluation.checkpoint_path")
    kind = folder_config(source, key="evaluation.checkpoint_path")["model_type"]
    if kind not in SERVED_BY_SGLANG:
        served = "SDAR, SDAR-MoE and LLaDA2"
        raise fault("rollout.engine", "sglang", f"serves {served}, not {kind!r} models; leave it at local")
    config_of_model = load_config(source, key="evaluation.checkpoint_path")
    ids = special_ids(config_of_model, tokenizer, load_generation_config(source, "evaluation.checkpoint_path"))
    max_active = min(rollout.max_active, rollout.batch_size or rollout.max_active)
    if rollout.engine_urls:
        loop = None
        servers: list[Callable[[], Server]] = [
            partial(HttpServer, url, rollout.engine_timeout) for url in rollout.engine_urls
        ]
    else:
        engine = offline_engine(
            source,
            block_size=rollout.block_size,
            mask_id=ids.mask_id,
            max_active=max_active,
            tensor_parallel_size=rollout.tensor_parallel_size,
            gpus=torch.cuda.device_count(),
            dtype=rollout.dtype,
        )
        loop = engine.loop
        servers = [partial(OfflineServer, engine)]
    return SGLangEngine(
        lambda: [make() for make in servers],
        Weights(source, weights_fingerprint(source), rollout.engine_push),
        mask_id=ids.mask_id,
        stop_ids=ids.stop_ids,
        words=len(tokenizer),
        max_active=max_active,
        loop=loop,
    )


if __name__ == "__main__":
    raise SystemExit("this module is no command: use `t3d rollout` or `python -m t3d.rollout`")
