"""``model.generate(...)`` by blocks, after transformers' conventions, on the one decoder (t3d.decode.local)."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.modeling_outputs import ModelOutput

from t3d.blocks.settings import DecodeSettings
from t3d.blocks.special_ids import SpecialIds
from t3d.common.options import validate
from t3d.decode.local import LocalEngine
from t3d.decode.model_facts import position_count
from t3d.decode.protocol import Request, Step, refuse_conflict

# Fields of transformers that `generate` reads, and fields without effect on it. Any other field must have its default.
READ = {
    "max_new_tokens", "max_length", "do_sample", "temperature", "top_k", "top_p", "num_return_sequences",
    "suppress_tokens", "eos_token_id", "pad_token_id", "return_dict_in_generate",
}  # fmt: skip
NO_EFFECT = {"bos_token_id", "use_cache", "disable_compile", "transformers_version"}


class BlockDiffusionGenerationConfig(GenerationConfig):
    """transformers' generation config with the fields of block diffusion; None = the default.

    These fields of GenerationConfig work: max_new_tokens, max_length, do_sample, temperature, top_k, top_p,
    num_return_sequences, suppress_tokens, eos_token_id, pad_token_id, return_dict_in_generate. Two defaults differ:
    top_k is off. Without a length an answer may fill the model's positions, up to 2000 tokens.

    Attributes:
        block_size: positions of one block; default the model's.
        denoising_steps_per_block: 1..block_size; default block_size, one token per step.
        remasking_strategy, dynamic_threshold, eb_threshold, eb_bound, ancestral_schedule, self_verify,
            energy_candidates: see t3d.blocks.settings.DecodeSettings.
        seed: seed of the answers' random streams; by default torch's global generator draws it.
    """

    # These are class attributes, because transformers loads plain GenerationConfigs with these keys as extras.
    block_size: int | None = None
    denoising_steps_per_block: int | None = None
    remasking_strategy: str | None = None
    dynamic_threshold: float | None = None
    eb_threshold: float | None = None
    eb_bound: str | None = None
    ancestral_schedule: str | None = None
    self_verify: bool | None = None
    energy_candidates: int | None = None
    seed: int | None = None


@dataclass
class BlockDiffusionOutput(ModelOutput):
    """The result of ``generate`` with ``return_dict_in_generate=True``.

    Attributes:
        sequences: (rows, prompt + new) the given prompts, the answers, pad ids.
        unmask_step: (rows, new) the step at which each answer token was unmasked, from 1; 0 after the answer.
        steps, forwards: (rows,) denoising steps, and all forwards that the row took part in.
        finish_reason: per row "stop" or "length".
    """

    sequences: Tensor | None = None
    unmask_step: Tensor | None = None
    steps: Tensor | None = None
    forwards: Tensor | None = None
    finish_reason: list[str] | None = None


class BlockDiffusionMixin:
    """Gives a model ``generate`` by blocks. It comes before the transformers class whose own it replaces."""

    generation_config_class: type[GenerationConfig] = BlockDiffusionGenerationConfig
    config: Any  # these three are the transformers class's
    generation_config: Any
    training: bool

    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        streamer: Any | None = None,
        **kwargs: Any,
    ) -> Tensor | BlockDiffusionOutput:
        """Decode an answer to every prompt.

        Args:
            inputs: (batch, length) token ids; ``input_ids`` is another name. An ``attention_mask`` (batch, length) is 0
                at padding. Padding changes nothing, at any position.
            generation_config: default the model's. The model's also fills the fields that are None here.
            streamer: shows a single answer, which ends with its stop id. A TextDiffusionStreamer gets every denoising
                step's block as a draft and finished blocks as text. Any other streamer gets finished blocks.
            kwargs: fields that override the generation config, and ``tokenizer``: then ids beyond its vocabulary cannot
                be drawn. The mask and ``suppress_tokens`` never can.

        Returns:
            (batch * num_return_sequences, length + new) ids, padded on the right, or a BlockDiffusionOutput.

        Raises:
            ValueError: block diffusion lacks an argument or field, a value is impossible, a prompt does not fit, or the
                model is in training mode.
        """
        input_ids = kwargs.pop("input_ids", None) if inputs is None else inputs
        attention_mask, tokenizer = kwargs.pop("attention_mask", None), kwargs.pop("tokenizer", None)
        config = self._generation_config(generation_config, kwargs)
        if self.training:
            raise ValueError("generate: the model is in training mode; call model.eval() first")
        if getattr(self.config, "mask_token_id", None) is None:
            raise ValueError("mask_token_id: the model's config.json has none; set it there")
        prompts = _prompts(input_ids, attention_mask, config)
        settings = _settings(config, self.config, input_ids.shape[1], max(map(len, prompts)))
        seed = int(torch.randint(2**32, ())) if config.seed is None else config.seed

        forbidden = set(config.suppress_tokens or ())
        if tokenizer is not None:
            forbidden |= set(range(len(tokenizer), self.config.vocab_size))
        samples = config.num_return_sequences or 1
        requests = [Request(str(row), k, tuple(ids)) for row, ids in enumerate(prompts) for k in range(samples)]
        stops = _ids(config.eos_token_id)
        pad = next(iter([*_ids(config.pad_token_id), *stops]), 0)  # without both all answers are equally long
        ids = SpecialIds(self.config.mask_token_id, pad, tuple(stops), tuple(forbidden), torch.tensor([]))
        engine = LocalEngine.of(self, ids, max_active=len(requests))
        on_step = None
        if streamer is not None:
            if len(requests) > 1:
                raise ValueError(f"streamer: it shows one answer, and this call has {len(requests)}; give one prompt")
            streamer.put(input_ids.cpu())
            on_step = _stream(streamer, stops, settings.max_token)
        found = {answer.id: answer for answer in engine.generate(requests, settings, seed, on_step)}
        if streamer is not None:
            streamer.end()

        answers = [found[request.id] for request in requests]
        device = input_ids.device
        new = _padded([answer.response_ids[: answer.length] for answer in answers], pad, device)
        sequences = torch.cat([input_ids.repeat_interleave(samples, 0), new], 1)
        if not config.return_dict_in_generate:
            return sequences
        return BlockDiffusionOutput(
            sequences=sequences,
            unmask_step=_padded([answer.unmask_step[: answer.length] for answer in answers], 0, device),
            steps=torch.tensor([answer.steps for answer in answers], device=device),
            forwards=torch.tensor([answer.forwards for answer in answers], device=device),
            finish_reason=[answer.finish_reason for answer in answers],
        )

    def _generation_config(
        self, given: GenerationConfig | None, kwargs: dict[str, Any]
    ) -> BlockDiffusionGenerationConfig:
        """Arguments override the given config, which overrides the model's own. ValueError for unsupported fields."""
        config = BlockDiffusionGenerationConfig()
        if given is not None:
            config.update(**given.to_dict())
        config.update(**self.generation_config.to_dict(), defaults_only=True)
        unknown = config.update(**kwargs)
        neutral = GenerationConfig._get_default_generation_params()
        known = READ | NO_EFFECT | BlockDiffusionGenerationConfig.__annotations__.keys()
        others = {k: v for k, v in vars(config).items() if k not in known and k[0] != "_" and v != neutral.get(k)}
        for name, value in (others | unknown).items():
            if value is None or value is False or (isinstance(value, list) and not value):
                continue
            shown = value if isinstance(value, (str, int, float)) else type(value).__name__
            raise ValueError(f"generate: {name}={shown} is not supported by block diffusion; leave it out")
        return config


def _ids(value: int | list[int] | None) -> list[int]:
    return [] if value is None else [value] if isinstance(value, int) else list(value)


def _prompts(input_ids: Tensor | None, attention_mask: Tensor | None, config: GenerationConfig) -> list[list[int]]:
    """The real tokens of every row."""
    if input_ids is None or input_ids.dim() != 2 or not len(input_ids):
        raise ValueError("input_ids: give a (batch, length) tensor of prompts' token ids")
    if attention_mask is None:
        edges = input_ids[:, [0, -1]] if input_ids.shape[1] else input_ids
        if len(input_ids) > 1 and config.pad_token_id is not None and (edges == config.pad_token_id).any():
            raise ValueError("input_ids: they seem to be padded; also pass the tokenizer's attention_mask")
        attention_mask = torch.ones_like(input_ids)
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask: its shape {tuple(attention_mask.shape)} is not the input_ids' {tuple(input_ids.shape)}"
        )
    return [row[real].tolist() for row, real in zip(input_ids, attention_mask.bool(), strict=True)]


def _settings(config: BlockDiffusionGenerationConfig, model_config: Any, width: int, longest: int) -> DecodeSettings:
    """The decoder's settings. max_length includes the ``width`` of the given prompts; the model's positions limit the
    ``longest`` real prompt and its answer.
    """
    block = model_config.block_size if config.block_size is None else config.block_size
    given = {
        name: getattr(config, name)
        for name in (field.name for field in fields(DecodeSettings))
        if getattr(config, name, None) is not None
    }
    given = {"denoising_steps_per_block": block, "temperature": 1.0} | given | {"block_size": block}
    if not config.do_sample:
        given |= {"temperature": 0.0, "top_k": 0, "top_p": 1.0}
    settings = checked(DecodeSettings(**given))

    room = position_count(model_config) // block * block - longest
    if config.max_new_tokens is not None:
        settings.max_token, name = config.max_new_tokens, f"max_new_tokens={config.max_new_tokens}"
    elif config.max_length is not None:
        settings.max_token, name = config.max_length - width, f"max_length={config.max_length}"
    else:
        settings.max_token, name = min(settings.max_token, room), "input_ids"
    if not 0 < settings.max_token <= room:
        raise ValueError(
            f"{name}: leaves {settings.max_token} tokens for the answer to a prompt of {longest} tokens; 1..{room} "
            f"are possible with the model's {position_count(model_config)} positions"
        )
    return settings


def checked(settings: DecodeSettings) -> DecodeSettings:
    """The settings. Raises UserError (a ValueError), with the setting's name, for an impossible value."""
    validate(settings)
    refuse_conflict(settings)
    return settings


def _stream(streamer: Any, stops: list[int], max_new: int) -> Callable[[Step], None]:
    """An observer that drives a streamer: drafts of the current block, then the block when it is complete."""
    if getattr(streamer, "_takes_logits", False):
        raise ValueError("streamer: it needs logits, and block diffusion keeps none; give one that takes token ids")
    done = 0

    def on_step(step: Step) -> None:
        nonlocal done
        block = step.response_ids[done:max_new]
        if hasattr(streamer, "put_draft"):
            streamer.put_draft(torch.tensor(block))
        if step.block_complete:
            end = next((i + 1 for i, token in enumerate(block) if token in stops), len(block))
            streamer.put(torch.tensor(block[:end]))
            done = len(step.response_ids)

    return on_step


def _padded(rows: list[list[int]], pad: int, device: torch.device) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([row + [pad] * (longest - len(row)) for row in rows], device=device)
