"""Block-diffusion models in lm-evaluation-harness: requests in, answers and likelihoods out. See docs/HARNESS.md."""

import dataclasses
import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather
from lm_eval.api.instance import Instance
from lm_eval.api.model import CacheHook, TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm.auto import tqdm

from t3d.blocks.settings import DecodeSettings
from t3d.common.errors import UserError, fault
from t3d.common.options import load, option
from t3d.common.paths import model_source
from t3d.decode.local import LocalEngine
from t3d.decode.model_facts import position_count
from t3d.decode.protocol import Request
from t3d.integrations.lm_eval.bound import bound_states, weighted_log_probs
from t3d.models.decoder import load_decoder
from t3d.models.fingerprint import weights_fingerprint
from t3d.models.generation import checked
from t3d.states.base import State, generator_for

log = logging.getLogger(__name__)

TOKENS_AT_ONCE = 2**14  # tokens of the training layout in one forward of the bound
RESULT_DOES_NOT_DEPEND_ON = ("pretrained", "device", "max_active")
HARNESS_NAMES = {"max_gen_toks": "max_token", "batch_size": "max_active"}
UNSAID = {"batch_size": (1, "1", "auto"), "device": ("cuda:0",)}  # values that the harness adds by default


@dataclass
class ModelArguments(DecodeSettings):
    """The arguments of ``--model_args``. For a sampling setting at null the task decides."""

    # mypy: None stands for the model's or the task's value, until `_decoding` makes DecodeSettings
    pretrained: str = option("", "block-diffusion model: a folder or a hub id")
    block_size: int | None = option(None, "positions of one block; null = the model's", ge=1)  # type: ignore[assignment]
    denoising_steps_per_block: int | None = option(  # type: ignore[assignment]
        None, "steps of a block; null = one per position", ge=1
    )
    temperature: float | None = option(None, "null = the task's, 0 = greedy", ge=0)  # type: ignore[assignment]
    top_k: int | None = option(None, "null = the task's, 0 = all", ge=0)  # type: ignore[assignment]
    top_p: float | None = option(None, "null = the task's, 1 = all", gt=0, le=1)  # type: ignore[assignment]
    max_token: int = option(256, "most tokens of an answer, if the task has no max_gen_toks", ge=1)
    seed: int = option(0, "seed of sampled answers and of the bound's masks")
    mc_num: int = option(16, "most forwards for one log-likelihood; 2^block_size - 1 make the bound exact", ge=1)
    check_greedy: bool = option(False, "decode to find is_greedy of log-likelihoods; otherwise it is always false")
    dtype: str = option("auto", "of the weights", choices=("auto", "float32", "bfloat16", "float16"))
    device: str | None = option(None, "null = the GPU if there is one; with several processes each has its own")
    max_active: int = option(256, "most answers decoded at once", ge=1)

    @classmethod
    def parse(cls, given: dict[str, Any]) -> "ModelArguments":
        """Check ``--model_args`` and the arguments that the harness adds.

        Raises:
            UserError: an unknown name, a wrong type, an impossible value, no model.
        """
        given = {name: value for name, value in given.items() if value not in UNSAID.get(name, ())}
        names = [field.name for field in fields(cls)]
        for theirs, ours in HARNESS_NAMES.items():
            if theirs in given and ours in given:
                raise fault(theirs, given[theirs], f"is another name of {ours}; give only one of the two")
            if theirs in given:
                given[ours] = given.pop(theirs)
        for name, value in given.items():
            if name not in names:
                raise UserError(
                    f"model_args {name}={value}: unknown; known are {', '.join([*names, *HARNESS_NAMES])}", name
                )
        arguments = load(cls, [f"{name}={json.dumps(value)}" for name, value in given.items()])
        if not arguments.pretrained:
            raise fault("pretrained", arguments.pretrained, "give a model folder or a hub id")
        return arguments


class SDARHarness(TemplateLM):
    """The model ``t3d_sdar``. Arguments: the fields of ModelArguments.

    Answers depend only on the weights, the arguments and the request. The batch, the order and the number of processes
    change nothing.
    """

    def __init__(self, **arguments: Any):
        super().__init__()
        self.args = args = ModelArguments.parse(arguments)
        self.source = model_source(args.pretrained, "pretrained")
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            state = PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=7))
            self._rank, self._world_size, self._device = state.process_index, state.num_processes, state.device
        else:
            self._device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
            if self._device.type == "cuda" and not torch.cuda.is_available():
                raise fault("device", args.device, "there is no GPU that PyTorch can use; leave it out")
        decoder = load_decoder(self.source, dtype=args.dtype, device=self._device, key="pretrained")
        self.model, self.tokenizer, self.ids = decoder.model, decoder.tokenizer, decoder.ids
        self.block_size = args.block_size or self.model.config.block_size
        self._decoding({})  # a conflict of settings is an error now, before the tasks are built

    # -- the harness's interface of a model ---------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The context's token if the context is empty."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def max_length(self) -> int:
        """The model's positions, rounded down to whole blocks."""
        return position_count(self.model.config) // self.block_size * self.block_size

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
        """The text's ids, without added tokens. Special tokens that a chat template wrote are kept as such."""
        return list(self.tokenizer(string, add_special_tokens=False)["input_ids"])

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        if not getattr(self.tokenizer, "chat_template", None):
            raise UserError(
                "apply_chat_template: the tokenizer has none; add chat_template.jinja to the model folder",
                "chat_template",
            )
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def get_model_info(self) -> dict[str, Any]:
        """The entries about the model in the results file."""
        return {
            "model_num_parameters": self.model.num_parameters(),
            "model_dtype": str(self.model.dtype),
            "model_weights": weights_fingerprint(self.source),
            "t3d": asdict(self.args) | {"block_size": self.block_size},
        }

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        return gather(tensor) if self.world_size > 1 else tensor

    def gather_object(self, obj: Any, dst: int = 0) -> list | None:
        if self.world_size == 1:
            return [obj]
        gathered = [None] * self.world_size if self.rank == dst else None
        torch.distributed.gather_object(obj, gathered, dst=dst)
        return gathered

    def barrier(self) -> None:
        if self.world_size > 1:
            PartialState().wait_for_everyone()

    def set_cache_hook(self, cache_hook: CacheHook) -> None:
        """Give every decode setting its own table in the file of ``--use_cache``.

        The harness keys an answer by the request alone. Answers of other weights or settings would be taken for ours.
        """
        store = cache_hook.dbdict
        if store is not None:
            table = f"t3d_{self.fingerprint()}"
            type(store)(store.filename, tablename=table).close()  # creates it
            store.tablename = table
        super().set_cache_hook(cache_hook)

    def fingerprint(self) -> str:
        """A digest of everything that answers depend on, besides the request."""
        matters = {name: v for name, v in asdict(self.args).items() if name not in RESULT_DOES_NOT_DEPEND_ON}
        matters |= {"block_size": self.block_size, "weights": weights_fingerprint(self.source)}
        return hashlib.blake2b(json.dumps(matters, sort_keys=True).encode(), digest_size=8).hexdigest()

    # -- answers ------------------------------------------------------------------------------------------------------

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Decode an answer to every request, in their order. Each is cut at its first stop string.

        Raises:
            UserError: a generation argument that block diffusion does not have, or a prompt that does not fit.
        """
        groups: dict[tuple, list[tuple[int, Request]]] = {}
        seen: Counter[str] = Counter()
        for index, request in enumerate(requests):
            context, given = request.args
            settings, until = self._decoding(given)
            prompt = f"{request.task_name}/{request.doc_id}"
            ids = self.tok_encode(context) or [self.prefix_token_id]
            key = dataclasses.astuple(settings), until
            groups.setdefault(key, []).append((index, Request(prompt, seen[prompt], tuple(ids))))
            seen[prompt] += 1

        answers: dict[int, str] = {}
        bar = tqdm(total=len(requests), desc="decode", unit="answer", disable=disable_tqdm or self.rank != 0)
        for (settings, until), group in groups.items():
            index_of = {request.id: index for index, request in group}
            special = dataclasses.replace(self.ids, stop_ids=self._stop_ids(until))
            engine = LocalEngine.of(self.model, special, max_active=self.args.max_active)
            for found in engine.generate([r for _, r in group], DecodeSettings(*settings), self.args.seed):
                index = index_of[found.id]
                text = self.tokenizer.decode(found.response_ids[: found.length], skip_special_tokens=True)
                answers[index] = text[: min([text.find(stop) for stop in until if stop in text], default=len(text))]
                self.cache_hook.add_partial("generate_until", requests[index].args, answers[index])
                bar.update()
        bar.close()
        return [answers[index] for index in range(len(requests))]

    def _decoding(self, given: dict[str, Any]) -> tuple[DecodeSettings, tuple[str, ...]]:
        """The settings and stop strings of a task's generation arguments; model_args override them."""
        given, args = {name: value for name, value in given.items() if value is not None}, self.args
        until = given.pop("until", None) or ()
        until = tuple(stop for stop in ([until] if isinstance(until, str) else until) if stop)
        limits = [given.pop(name, None) for name in ("max_gen_toks", "max_new_tokens")]
        do_sample, temperature = given.pop("do_sample", None), given.pop("temperature", None)
        if do_sample is False:
            temperature = 0.0
        elif temperature is None:
            temperature = 1.0 if do_sample else 0.0
        task = {"temperature": temperature, "top_k": given.pop("top_k", None), "top_p": given.pop("top_p", None)}
        if given.pop("num_beams", 1) != 1 or given:
            name, value = next(iter(given.items()), ("num_beams", "above 1"))
            raise UserError(
                f"generation argument {name}={value}: block diffusion lacks it; --gen_kwargs {name}=None leaves it out",
                name,
            )
        own = {field.name: getattr(args, field.name) for field in fields(DecodeSettings)}
        values = task | {name: value for name, value in own.items() if value is not None}
        values["block_size"] = self.block_size
        values.setdefault("denoising_steps_per_block", self.block_size)
        values["max_token"] = next((int(limit) for limit in limits if limit is not None), args.max_token)
        return checked(DecodeSettings(**{name: value for name, value in values.items() if value is not None})), until

    def _stop_ids(self, until: Sequence[str]) -> tuple[int, ...]:
        """The model's stop ids, and stop strings of one token. They end the decoding; other strings cut the text."""
        stops = set(self.ids.stop_ids)
        for text in until:
            ids = self.tok_encode(text)
            if len(ids) == 1 and self.tokenizer.decode(ids) == text:
                stops.add(ids[0])
        return tuple(sorted(stops))

    # -- likelihoods --------------------------------------------------------------------------------------------------

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(the block-diffusion bound in nats, is_greedy) of every (context, continuation)."""
        if not self.args.check_greedy and self.rank == 0:
            log.warning("t3d_sdar: is_greedy is always false; a task that scores it needs check_greedy=true")
        return super().loglikelihood(requests, disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The bound of whole texts, each after the prefix token.

        A text longer than the model's positions is scored in windows. The last window has as much context as fits, the
        others have one token.
        """
        windows, owner = [], []
        for index, request in enumerate(requests):
            (text,) = request.args
            for pair in get_rolling_token_windows(
                self.tok_encode(text), self.prefix_token_id, max_seq_len=self.max_length - 1, context_len=1
            ):
                windows.append(make_disjoint_window(pair))
                owner.append(index)
        totals = [0.0] * len(requests)
        for index, bound in self._bounds(windows, disable_tqdm):
            totals[owner[index]] += bound
        return totals

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **kwargs
    ) -> list[tuple[float, bool]]:
        """(bound, is_greedy) of every (texts, context ids, continuation ids).

        Raises:
            UserError: a continuation has no tokens, or does not fit after its context.
        """
        for (_, text), context, continuation in requests:
            length = len(context) + len(continuation)
            if not continuation or length > self.max_length:
                problem = f"ends at token {length}, the limit is {self.max_length}" if continuation else "has no tokens"
                raise UserError(
                    f"log-likelihood: the continuation {text[:40]!r} {problem}; change the task", "continuation"
                )
        greedy = self._greedy([request[1:] for request in requests])
        results: dict[int, tuple[float, bool]] = {}
        for index, bound in self._bounds([request[1:] for request in requests], disable_tqdm):
            results[index] = bound, greedy[index]
            self.cache_hook.add_partial("loglikelihood", requests[index][0], results[index])
        return [results[index] for index in range(len(requests))]

    def _bounds(self, pairs: list[tuple[list[int], list[int]]], disable_tqdm: bool) -> Iterator[tuple[int, float]]:
        """(index, bound) of every (context ids, continuation ids), the longest first."""
        bounds = [0.0] * len(pairs)
        states_left: Counter[int] = Counter()
        bar = tqdm(total=len(pairs), desc="likelihood", unit="text", disable=disable_tqdm or self.rank != 0)
        for group in self._batches(pairs, states_left):
            parts = weighted_log_probs(self.model, [state for _, state in group], self.ids.pad_id)
            for (index, _), part in zip(group, parts, strict=True):
                bounds[index] += part
                states_left[index] -= 1
                if not states_left[index]:
                    bar.update()
                    yield index, bounds[index]
        bar.close()

    def _batches(
        self, pairs: list[tuple[list[int], list[int]]], states_left: Counter[int]
    ) -> Iterator[list[tuple[int, State]]]:
        """The states of all bounds, in batches for one forward. ``states_left`` counts each pair's states."""
        group: list[tuple[int, State]] = []
        width = 0
        for index in sorted(range(len(pairs)), key=lambda i: -sum(map(len, pairs[i]))):
            context, continuation = pairs[index]
            # seeded by the tokens, so that neither order nor processes change the draws
            generator = generator_for(self.args.seed, 0, f"{context}{continuation}")
            states = bound_states(
                context,
                continuation,
                block_size=self.block_size,
                mask_id=self.ids.mask_id,
                mc_num=self.args.mc_num,
                generator=generator,
            )
            states_left[index] = len(states)
            for state in states:
                width = max(width, len(state))
                if group and (len(group) + 1) * width > TOKENS_AT_ONCE:
                    yield group
                    group, width = [], len(state)
                group.append((index, state))
        if group:
            yield group

    def _greedy(self, pairs: list[tuple[list[int], list[int]]]) -> list[bool]:
        """Whether greedy decoding of the context, with the block's steps of this run, begins with the continuation."""
        if not self.args.check_greedy:
            return [False] * len(pairs)
        longest: dict[tuple[int, ...], int] = {}
        for context, continuation in pairs:
            key = tuple(context)
            longest[key] = max(longest.get(key, 0), len(continuation))
        decoded: dict[tuple[int, ...], list[int]] = {}
        engine = LocalEngine.of(self.model, self.ids, max_active=self.args.max_active)
        for length in sorted(set(longest.values())):
            contexts = [context for context, needed in longest.items() if needed == length]
            requests = [Request("greedy", k, context) for k, context in enumerate(contexts)]
            settings = dataclasses.replace(self._decoding({})[0], temperature=0.0, max_token=length)
            for found in engine.generate(requests, settings, self.args.seed):
                decoded[tuple(found.prompt_ids)] = found.response_ids
        return [decoded[tuple(context)][: len(continuation)] == continuation for context, continuation in pairs]
