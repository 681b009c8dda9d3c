"""T3D's decoding inside SGLang: a dLLM algorithm, and hooks so that requests carry settings and return unmask steps.

SGLang (0.5.23) decodes SDAR greedily by a threshold and returns tokens without their unmask steps. Its plugin interface
(entry points ``sglang.srt.plugins``, ``HookRegistry``) lets ``register`` add the algorithm "T3D":

    sglang serve --model-path ... --dllm-algorithm T3D ...

The algorithm uses ``t3d.blocks.decoding``, and the random stream whose key the request carries. SGLang owns the model,
the cache and its two schedules: first done, first out; and whole batches of blocks with ``--no-dllm-fdfo``. This module
imports nothing of SGLang until SGLang calls ``register``.
"""

import functools
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import astuple, dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from t3d.blocks.decoding import choose, draw, on_grid, stream_key, uniforms
from t3d.blocks.settings import DecodeSettings
from t3d.blocks.strategy import strategy_named
from t3d.common.options import validate
from t3d.decode.protocol import refuse_conflict, refuse_unserved
from t3d.decode.sglang import KEY, NAME

# Other settings of a request belong to SGLang's samplers, which a dLLM algorithm bypasses. name -> value without effect
IGNORED_BY_ALGORITHMS = {
    "min_p": 0.0,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
    "repetition_penalty": 1.0,
    "min_new_tokens": 0,
    "logit_bias": None,
    "json_schema": None,
    "regex": None,
    "ebnf": None,
    "structural_tag": None,
}


# ---------------------------------------------------------------------------------------------------------------------
# One denoising step


def denoise(
    ids: Tensor,
    logits: Tensor,
    position: Tensor,
    key: Tensor,
    step: Tensor,
    stage: Tensor,
    settings: DecodeSettings,
    *,
    mask_id: int,
    words: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """One denoising step of blocks that share their settings.

    Args:
        ids: (rows, block) int64, the blocks with their masks.
        position: (rows, block) int64, the positions in the sequences.
        logits: (rows, block, vocab).
        key: (rows,) the random stream.
        step: (rows,) the number of this step, counted from 1 over the whole answer.
        stage: (rows,) the steps already done in the block.
        words: number of the tokenizer's ids; larger ids cannot be drawn.

    Returns:
        (ids with the step's tokens, bool of the positions it unmasked), both (rows, block), and bool (rows,) of the
        blocks with NaN or infinite logits.
    """
    masked = ids == mask_id
    rows = logits[masked]  # a copy: the server's own logits stay unchanged
    rows[:, mask_id] = -torch.inf
    rows[:, words:] = -torch.inf
    u = uniforms(key.unsqueeze(-1), position, step.unsqueeze(-1))[masked]
    need_entropy = strategy_named(settings.remasking_strategy).needs_entropy
    drawn = draw(rows, u, settings, need_entropy=need_entropy)
    token, confidence, entropy = on_grid(masked, drawn)
    unmask = choose(masked, confidence, entropy, settings, key=key, position=position, step=step, stage=stage)
    return torch.where(unmask, token, ids), unmask, confidence.isnan().any(-1)


# ---------------------------------------------------------------------------------------------------------------------
# A request's settings and its record


@dataclass(frozen=True)
class Asked:
    """A request's decode settings, the key of its random stream, and the number of the tokenizer's ids."""

    settings: DecodeSettings
    key: int
    words: int | None


def asked(req: Any) -> Asked:
    """Read a request of SGLang; ``ValueError`` for a setting that this server does not support.

    Our client sends all settings in ``custom_params[KEY]``. Other clients send SGLang's usual temperature, top_p and
    top_k. Their other settings come from the file ``--dllm-algorithm-config``, or are the defaults.
    """
    sampling, served = req.sampling_params, req.dllm_config
    for name, neutral in IGNORED_BY_ALGORITHMS.items():
        if getattr(sampling, name) != neutral:
            raise ValueError(f"{name}={getattr(sampling, name)}: {NAME} does not support it; leave it out")
    if served.mask_id in req.origin_input_ids:
        raise ValueError(f"the prompt contains the mask token {served.mask_id}; remove it")
    names = {f.name for f in fields(DecodeSettings)}
    custom = dict((sampling.custom_params or {}).get(KEY) or {})
    key, words = custom.pop("key", None), custom.pop("words", None)
    for name, here in (("block_size", served.block_size), ("mask_id", served.mask_id)):
        if custom.pop(name, here) != here:
            raise ValueError(f"{name} differs: this server has {here}; set it in the --dllm-algorithm-config file")
    if unknown := sorted(custom.keys() - names):
        raise ValueError(f"{KEY}.{unknown[0]}: unknown setting")
    given: Mapping[str, Any] = {
        "denoising_steps_per_block": served.block_size,
        **{name: value for name, value in served.algorithm_config.items() if name in names},
        # SGLang turns temperature 0 into top_k=1, and "all" into a top_k of 2^30
        "temperature": 0.0 if sampling.top_k == 1 else sampling.temperature,
        "top_k": 0 if sampling.top_k >= 2**30 else sampling.top_k,
        "top_p": sampling.top_p,
        **custom,
        "block_size": served.block_size,
    }
    settings = DecodeSettings(**given)
    validate(settings)
    refuse_conflict(settings)
    refuse_unserved(settings)
    if key is None:
        key = stream_key(sampling.sampling_seed or 0, str(req.rid), 0)
    return Asked(settings, key, words)


def record_of(req: Any) -> dict:
    """Our part of a request's reply. SGLang returns it in ``meta_info[KEY]`` (a list of one)."""
    if req.customized_info is None:
        req.customized_info = {}
    empty = {"response_ids": [], "unmask_step": [], "steps": 0, "forwards": 0}
    return req.customized_info.setdefault(KEY, [empty])[0]


@dataclass
class Block:
    """One block of one request while it is denoised.

    Attributes:
        open: the positions that were masked at its start; the others hold the prompt's end.
        unmask_step: the step that unmasked each position; 0 = not unmasked by a step.
        stage: denoising steps done in this block.
        done: its final tokens are in the cache and its record is written.
    """

    asked: Asked
    record: dict
    open: list[bool]
    unmask_step: list[int] = field(init=False)
    stage: int = 0
    done: bool = False

    def __post_init__(self):
        self.unmask_step = [0] * len(self.open)

    @property
    def next_step(self) -> int:
        return self.record["steps"] + self.stage + 1

    def finish(self, ids: list[int]) -> None:
        answer = [i for i, was_open in enumerate(self.open) if was_open]
        self.record["response_ids"] += [ids[i] for i in answer]
        self.record["unmask_step"] += [self.unmask_step[i] for i in answer]
        self.record["steps"] += self.stage
        self.done = True


# ---------------------------------------------------------------------------------------------------------------------
# The algorithm


class Rules:
    """The methods that SGLang's ``DllmAlgorithm`` expects; its loops call them in both schedules.

    ``reqs`` are the requests of the next forward, one per row; the hook on the worker sets them. A state is a
    ``Block``.
    """

    block_size: int  # SGLang sets these two
    mask_id: int
    reqs: list[Any] | None = None

    @classmethod
    def validate_request(cls, req: Any) -> str | None:
        try:
            asked(req)
        except (ValueError, TypeError) as error:
            return str(error)
        return None

    def init_step_state(self, forward_batch: Any) -> list[Block]:
        masked = forward_batch.input_ids.view(-1, self.block_size) == self.mask_id
        if self.reqs is None or len(self.reqs) != len(masked):
            raise RuntimeError(f"{NAME}: the batch came without its requests; is this the pinned SGLang?")
        pairs = zip(self.reqs, masked.tolist(), strict=True)
        return [Block(asked(req), record_of(req), open) for req, open in pairs]

    def prepare_inputs(self, model_runner: Any, forward_batch: Any, states: list[Block]) -> None:
        """Count the forwards; SGLang calls this before each."""
        for block in states:
            block.record["forwards"] += not block.done

    def step(self, forward_batch: Any, full_logits: Tensor, states: list[Block]) -> list[bool]:
        """Advance every block that has masks. A block without masks is done: a forward has just seen its tokens."""
        ids = forward_batch.input_ids.view(-1, self.block_size).long()
        position = forward_batch.positions.view(ids.shape).long()
        logits = full_logits.view(*ids.shape, -1)
        alike = defaultdict(list)  # rows with the same settings are drawn together
        for row, open in enumerate((ids == self.mask_id).any(-1).tolist()):
            block = states[row]
            if open:
                alike[astuple(block.asked.settings), block.asked.words].append(row)
            elif not block.done:
                block.finish(ids[row].tolist())
        for rows in alike.values():
            blocks = [states[row] for row in rows]
            at = torch.tensor(rows, device=ids.device)
            key, step, stage = torch.tensor(
                [[b.asked.key for b in blocks], [b.next_step for b in blocks], [b.stage for b in blocks]],
                device=ids.device,
            )
            first = blocks[0].asked
            words = logits.shape[-1] if first.words is None else first.words
            ids[at], unmasked, broken = denoise(
                ids[at], logits[at], position[at], key, step, stage, first.settings, mask_id=self.mask_id, words=words
            )
            read = torch.cat([unmasked, broken.unsqueeze(-1)], -1).tolist()  # together, as a read waits for the device
            for block, (*now, is_broken) in zip(blocks, read, strict=True):
                block.stage += 1
                number = block.record["steps"] + block.stage
                if is_broken:
                    block.record.setdefault("broken", number)
                block.unmask_step = [number if new else old for new, old in zip(now, block.unmask_step, strict=True)]
        forward_batch.input_ids.copy_(ids.view(-1))  # in place, because a CUDA graph reads this tensor
        return [block.done for block in states]


@functools.cache
def algorithm() -> type:
    """The class that SGLang instantiates."""
    from sglang.srt.dllm.algorithm.base import DllmAlgorithm

    return type(NAME, (Rules, DllmAlgorithm), {"__doc__": Rules.__doc__})


# ---------------------------------------------------------------------------------------------------------------------
# Hooks


def _choose_algorithm(original, name: str) -> type:
    return algorithm() if name == NAME else original(name)


def _hand_over_requests(worker: Any, forward_batch: Any, batch: Any = None) -> None:
    if isinstance(worker.dllm_algorithm, Rules):
        worker.dllm_algorithm.reqs = None if batch is None else batch.reqs


def _whole_record(result: bool, streamer: Any, key: str) -> bool:
    """Send our record once and whole. It covers the whole last block, so it is longer than the sent tokens."""
    return result or key == KEY


def _own_mask(config: Any, *args: Any, **kwargs: Any) -> None:
    """SGLang derives the mask id from the architecture's name; ``mask_id`` in the algorithm's file overrides it."""
    if config is not None and config.algorithm == NAME:
        config.mask_id = config.algorithm_config.get("mask_id", config.mask_id)


def _keep_rope_theta(model: Any, config: Any, *args: Any, **kwargs: Any) -> None:
    """SGLang's SDAR reads config.rope_theta, or takes 10000. transformers 5 may keep it only in rope_parameters."""
    if not hasattr(config, "rope_theta"):
        config.rope_theta = config.rope_parameters["rope_theta"]


# (target, hook, kind); tests/integrations/test_sglang_interface.py checks the targets' signatures
HOOKS = (
    ("sglang.srt.dllm.algorithm.get_algorithm_cls", _choose_algorithm, "AROUND"),
    ("sglang.srt.dllm.config.DllmConfig.from_server_args", _own_mask, "AFTER"),
    ("sglang.srt.managers.tp_worker.TpModelWorker._forward_batch_generation_dllm", _hand_over_requests, "BEFORE"),
    (
        "sglang.srt.managers.scheduler_components.output_streamer.SchedulerOutputStreamer"
        ".is_request_level_customized_info_key",
        _whole_record,
        "AFTER",
    ),
    ("sglang.srt.models.sdar.SDARForCausalLM.__init__", _keep_rope_theta, "BEFORE"),
    ("sglang.srt.models.sdar_moe.SDARMoeForCausalLM.__init__", _keep_rope_theta, "BEFORE"),
)


def register() -> None:
    """The entry point: SGLang calls it in each of its processes, then applies the hooks."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    import t3d.models  # noqa: F401  model_type sdar without remote code

    for target, hook, kind in HOOKS:
        HookRegistry.register(target, hook, HookType[kind])
