"""As much of SGLang as T3D's algorithm and client meet: the two run loops, a scheduler, a model behind its interface.

Written down from SGLang 0.5.23 (sglang/srt/dllm/algorithm/base.py, sglang/srt/dllm/mixin/scheduler.py and req.py):
what is called when, with what, and what comes of the result. Where the package is installed, its own loops and its own
processing of results take the place of ``Loops`` and ``FakeSGLang.process``.
"""

import asyncio
from array import array
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock, patch

import torch

from t3d.integrations.sglang_plugin import KEY, Rules

NEUTRAL = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 1 << 30,
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
    "sampling_seed": None,
    "custom_params": None,
}


class Loops:
    """DllmAlgorithm: the loop of a whole block (sync), and the one of a single forward (first done, first out)."""

    def __init__(self, config):
        self.block_size, self.mask_id, self.fdfo = config.block_size, config.mask_id, config.first_done_first_out_mode

    def run(self, model_runner, forward_batch, algo_states=None):
        return (self._fdfo if self.fdfo else self._sync)(model_runner, forward_batch, algo_states)

    def _sync(self, model_runner, forward_batch, _):
        rows = forward_batch.input_ids.view(forward_batch.batch_size, self.block_size)
        start = (rows != self.mask_id).sum(1).tolist()
        states = self.init_step_state(forward_batch)
        self.prepare_inputs(model_runner, forward_batch, states)
        out = model_runner.forward(forward_batch, pp_proxy_tensors=None)
        if all(first == self.block_size for first in start):
            return out.logits_output, [], None, None, False
        for _ in range(self.block_size + 1):
            if all(self.step(forward_batch, out.logits_output.full_logits, states)):
                break
            self.prepare_inputs(model_runner, forward_batch, states)
            out = model_runner.forward(forward_batch, pp_proxy_tensors=None)
        rows = forward_batch.input_ids.view(forward_batch.batch_size, self.block_size)
        return out.logits_output, [row[first:] for row, first in zip(rows, start, strict=True)], None, None, False

    def _fdfo(self, model_runner, forward_batch, carried):
        fresh = self.init_step_state(forward_batch)
        states = [new if old is None else old for old, new in zip(carried, fresh, strict=True)]
        self.prepare_inputs(model_runner, forward_batch, states)
        out = model_runner.forward(forward_batch, pp_proxy_tensors=None)
        done = self.step(forward_batch, out.logits_output.full_logits, states)
        rows = forward_batch.input_ids.view(forward_batch.batch_size, self.block_size).tolist()
        accepted = [self.block_size if d else 0 for d in done]
        return out.logits_output, rows, accepted, [None if d else s for d, s in zip(done, states, strict=True)], False


@dataclass(eq=False)
class Req:
    """A request in the scheduler, as far as SGLang's result processing and the algorithm look at it."""

    rid: str
    origin_input_ids: list[int]
    sampling_params: Any
    dllm_config: Any
    customized_info: dict | None = None
    dllm_algo_state: Any = None
    dllm_incomplete_ids: Any = ()  # first done, first out: the open block
    output_ids: list[int] = field(default_factory=list)
    offset: int = 0  # of the current block
    cached: list[int] | None = None  # what the last forward has put into the cache for it
    finished_reason: Any = None
    finished_len: int | None = None
    time_stats: Any = field(default_factory=Mock)

    def prepare(self) -> list[int]:
        """The block that goes into the coming forward."""
        size, mask = self.dllm_config.block_size, self.dllm_config.mask_id
        ids = self.origin_input_ids + self.output_ids + [mask] * size
        self.full_untruncated_fill_ids, self.extend_end = array("q", ids), self.offset + size
        return list(self.dllm_incomplete_ids) or ids[self.offset : self.extend_end]

    def in_prefill(self) -> bool:
        return self.offset + self.dllm_config.block_size <= self.seqlen

    @property
    def seqlen(self) -> int:
        return len(self.origin_input_ids) + len(self.output_ids)

    def finished(self) -> bool:
        return self.finished_reason is not None

    def update_finish_state(self, new_accepted_len: int) -> None:
        sampling, before = self.sampling_params, len(self.output_ids) - new_accepted_len
        for i, token in enumerate(self.output_ids[before:], before + 1):
            if token in sampling.stop_token_ids:
                self.finished_reason, self.finished_len = "stop", min(i, sampling.max_new_tokens)
                return
        if len(self.output_ids) >= sampling.max_new_tokens:
            self.finished_reason, self.finished_len = "length", sampling.max_new_tokens


class Runner:
    """``model_runner``: whole forwards of a real model, without a cache, on the block grid."""

    def __init__(self, model):
        self.model, self.forwards = model, 0

    @torch.inference_mode()
    def forward(self, forward_batch, pp_proxy_tensors=None):
        self.forwards += 1
        blocks, reqs = forward_batch.input_ids.view(forward_batch.batch_size, -1).tolist(), forward_batch.reqs
        for req, block in zip(reqs, blocks, strict=True):
            req.cached = block
        rows = [(r.origin_input_ids + r.output_ids)[: r.offset] + r.cached for r in reqs]
        width = max(map(len, rows))  # later blocks are invisible, so it does not matter what fills them up
        logits = self.model(torch.tensor([row + [0] * (width - len(row)) for row in rows])).logits
        own = [logits[i, r.offset : r.offset + len(r.cached)] for i, r in enumerate(reqs)]
        output = SimpleNamespace(full_logits=torch.cat(own))
        return SimpleNamespace(logits_output=output, can_run_graph=False)


class FakeSGLang:
    """A server (t3d.decode.sglang.Server) around the algorithm: continuous batching with either schedule."""

    name = "fake"

    def __init__(self, model, config, *, base=Loops, running: int = 3, context: int = 10**6):
        self.config, self.running, self.context = config, running, context
        self.runner = Runner(model)
        self.algorithm = type("T3D", (Rules, base), {})(config)
        self.waiting: list[tuple[Req, asyncio.Future]] = []
        self.active: list[tuple[Req, asyncio.Future]] = []
        self.pump: asyncio.Task | None = None
        self.batches: list[int] = []

    async def prepare(self, weights) -> None:
        pass

    async def close(self) -> None:
        pass

    async def ask(self, payload: dict) -> dict:
        sampling = SimpleNamespace(**{**NEUTRAL, **payload["sampling_params"]})
        req = Req(payload["rid"], payload["input_ids"], sampling, self.config)
        if refusal := self.algorithm.validate_request(req):
            raise ValueError(refusal)
        future = asyncio.get_running_loop().create_future()
        self.waiting.append((req, future))
        if self.pump is None or self.pump.done():
            self.pump = asyncio.ensure_future(self._rounds())
        return await future

    async def _rounds(self) -> None:
        while self.waiting or self.active:
            if self.waiting and len(self.active) < self.running:  # they join one by one, so blocks are out of step
                self.active.append(self.waiting.pop(0))
            try:
                self._round()
            except Exception as error:  # whoever waits must hear of it
                for _, future in self.active + self.waiting:
                    future.set_exception(error)
                raise
            for req, future in [pair for pair in self.active if pair[0].finished()]:
                self.active.remove((req, future))
                future.set_result(self._reply(req))
            await asyncio.sleep(0)

    def _round(self) -> None:
        reqs = [req for req, _ in self.active]
        reqs = [req for req in reqs if req.in_prefill()] or reqs
        size, fdfo = self.config.block_size, self.config.first_done_first_out_mode
        self.batches.append(len(reqs))
        forward_batch = SimpleNamespace(
            batch_size=len(reqs),
            reqs=reqs,
            input_ids=torch.tensor([token for req in reqs for token in req.prepare()]),
            positions=torch.tensor([req.offset + i for req in reqs for i in range(size)], dtype=torch.int32),
            dllm_prompt_mask=None,
            mark_forward_metadata_ready=lambda **_: None,
        )
        given = forward_batch.input_ids
        self.algorithm.reqs = reqs  # as the hook on the worker does
        _, ids, accepted, states, _ = self.algorithm.run(
            self.runner, forward_batch, [req.dllm_algo_state for req in reqs] if fdfo else None
        )
        assert forward_batch.input_ids is given, "a CUDA graph would go on reading the old tensor"
        self.process(reqs, ids, accepted, states)
        for req, block in zip(reqs, given.view(-1, size).tolist(), strict=True):
            if not req.dllm_incomplete_ids:
                assert req.cached == block, "a block was handed out before its final tokens were in the cache"
                req.offset += size

    def process(self, reqs: list[Req], ids: list, accepted: list[int] | None, states: list | None) -> None:
        """process_batch_result_dllm: commit finished blocks, keep what FDFO has open."""
        size = self.config.block_size
        for row, req in enumerate(reqs):
            if accepted is not None and not accepted[row]:
                req.dllm_incomplete_ids, req.dllm_algo_state = ids[row], states[row]
                continue
            req.dllm_incomplete_ids, req.dllm_algo_state = (), None
            if accepted is not None:
                new = ids[row][max(0, len(req.origin_input_ids) - req.offset) :]
            else:
                new = ids[row].tolist() if ids else []
            if new:
                req.output_ids += new
                req.update_finish_state(len(new))
                if not req.finished() and req.seqlen + size > self.context:
                    req.finished_reason = "length"

    @staticmethod
    def _reply(req: Req) -> dict:
        meta = {"id": req.rid, "finish_reason": {"type": str(req.finished_reason)}, "weight_version": "default"}
        return {"output_ids": req.output_ids[: req.finished_len], "meta_info": meta | {KEY: req.customized_info[KEY]}}


class TheirScheduler(FakeSGLang):
    """The same with SGLang's own processing of results; needs the package."""

    def process(self, reqs: list[Req], ids: list, accepted: list[int] | None, states: list | None) -> None:
        from sglang.srt.dllm.mixin import scheduler as theirs

        mixin = theirs.SchedulerDllmMixin
        me = SimpleNamespace(
            dllm_config=self.config,
            model_config=SimpleNamespace(context_len=self.context),
            tree_cache=None,
            token_to_kv_pool_allocator=Mock(),
            metrics_reporter=Mock(num_generated_tokens=0),
            output_streamer=Mock(),
        )
        me._finish_dllm_request_if_needed = partial(mixin._finish_dllm_request_if_needed, me)
        batch = Mock(reqs=reqs, batch_size=lambda: len(reqs))
        result = SimpleNamespace(
            copy_done=None,
            next_token_ids=ids,
            accept_length_per_req_cpu=accepted,
            dllm_algo_state=states,
            can_run_cuda_graph=False,
        )
        with patch.object(theirs, "release_kv_cache"):
            mixin.process_batch_result_dllm(me, batch, result)


def dllm_config(block_size: int, mask_id: int, /, *, fdfo: bool, **algorithm_config) -> SimpleNamespace:
    return SimpleNamespace(
        block_size=block_size,
        mask_id=mask_id,
        first_done_first_out_mode=fdfo,
        requires_separate_context_encoding=False,
        algorithm_config=algorithm_config,
        algorithm="T3D",
    )
