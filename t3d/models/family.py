"""Families of models: the facts about a kind of model folder that loading, training and export need.

A family is one record. Each file of ``t3d/models/families`` holds one (t3d.blocks.plugins). A folder's ``model_type``
names its family. A family of your own is a class like those: ``model_base=my_module:MyFamily``.

A folder of any other type is transformers' own model of that type. Its config.json then has the facts of decoding, in
keys that ``t3d convert`` writes:

    block_size      positions of one block. This key makes a plain folder a block-diffusion model.
    mask_token_id   the id that stands for "not yet decoded"; null = the tokenizer's mask token.
    logit_shift     true = the hidden state before a position predicts its token; absent = false.
    full_attention  true = every position sees every other, as in LLaDA; absent = block-causal attention.
"""

from collections.abc import Mapping
from functools import cache
from typing import Any, ClassVar

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from t3d.blocks import plugins
from t3d.common.errors import fault
from t3d.models.block_diffusion import BlockDiffusionLM, block_diffusion_class

PACKAGE = "t3d.models.families"
SEES_ALL = {"full_attention", "sliding_attention", "chunked_attention"}  # layers whose keys fit a cache slot


class Family:
    """One kind of model folder; this record is the default. Its values apply if config.json lacks them.

    Attributes:
        model_types: ``model_type`` of its folders -> the model type of transformers whose classes run them.
        block_size: positions of one block; None = config.json must have it.
        mask_id: the mask token; None = config.json's ``mask_token_id``, else the tokenizer's.
        logit_shift: the hidden state before a position predicts its token.
        full_attention: every position sees every other.
        keys: names in config.json -> names in transformers' configuration, block_size among them.
        weights: published names of weights -> transformers', regular expressions as of ``key_mapping`` in
            ``from_pretrained``. An export has the published names.
        lora: names of the layers that get adapters; empty = all linear layers of the decoder's layers.
    """

    model_types: ClassVar[Mapping[str, str]] = {}
    block_size: ClassVar[int | None] = None
    mask_id: ClassVar[int | None] = None
    logit_shift: ClassVar[bool] = False
    full_attention: ClassVar[bool] = False
    keys: ClassVar[Mapping[str, str]] = {}
    weights: ClassVar[Mapping[str, str]] = {}
    lora: ClassVar[tuple[str, ...]] = ()

    def configuration(self, found: Mapping[str, Any], **options: Any) -> PreTrainedConfig:
        """The configuration of a config.json. It always has the four keys of block diffusion.

        Args:
            found: the file's contents. options: as of ``PreTrainedConfig.from_dict``.

        Raises:
            ValueError: transformers has no such model, or it cannot decode by blocks; the text has the reason.
        """
        kind = self.model_types.get(found["model_type"], found["model_type"])
        if kind not in CONFIG_MAPPING:
            raise ValueError(f"transformers has no model of model_type {kind!r}")
        values = {self.keys.get(name, name): value for name, value in found.items()}
        values.pop("model_type", None)
        config = CONFIG_MAPPING[kind].from_dict(values, **options)
        if reason := unsuitable(config):
            raise ValueError(reason)
        given = {"block_size": self.block_size, "mask_token_id": self.mask_id}
        given |= {"logit_shift": self.logit_shift, "full_attention": self.full_attention}
        for name, value in given.items():
            if getattr(config, name, None) is None:
                setattr(config, name, value)
        return config

    def published_name(self, name: str) -> str:
        """The name in config.json of a key of transformers' configuration."""
        return next((theirs for theirs, ours in self.keys.items() if ours == name), name)


@cache
def families() -> dict[str, Family]:
    """Model type -> family, of every file of the package."""
    found = [plugins.load(name, PACKAGE)() for name in plugins.names(PACKAGE)]
    return {kind: family for family in found for kind in family.model_types}


def family_of(model_type: str) -> Family:
    """The family of a folder's ``model_type``; the default if no file has it."""
    return families().get(model_type) or Family()


def use(name: str) -> None:
    """Make known the family of the setting ``model_base``; one of ours is known already.

    Raises:
        UserError: there is none of that name.
    """
    try:
        found = plugins.load(name, PACKAGE)
    except ValueError as error:
        raise fault("model_base", name, str(error)) from error
    if not (isinstance(found, type) and issubclass(found, Family)):
        raise fault("model_base", name, "is no family; derive it from t3d.models.family.Family")
    families().update({kind: found() for kind in found.model_types})


def model_class(config: PreTrainedConfig) -> type[BlockDiffusionLM]:
    """The block-diffusion class of a configuration, on the class that AutoModelForCausalLM has for it."""
    return block_diffusion_class(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)])


def lora_modules(model: BlockDiffusionLM) -> list[str]:
    """The names of the layers of ``model`` that get adapters: its family's, or all linear ones of its layers."""
    if model.family is not None and model.family.lora:
        return list(model.family.lora)
    modules = decoder_layers(model).named_modules()
    return sorted({name.rpartition(".")[2] for name, module in modules if isinstance(module, nn.Linear)})


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The list of a decoder's layers."""
    lists = (module for module in model.get_decoder().modules() if isinstance(module, nn.ModuleList))
    return next(found for found in lists if len(found) == model.config.num_hidden_layers)


def unsuitable(config: PreTrainedConfig) -> str | None:
    """The reason why a model of this configuration cannot decode by blocks; None if it can."""
    if config.is_encoder_decoder or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return "an encoder-decoder, or no language model; a decoder-only language model is needed"
    model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    others = sorted(set(getattr(config, "layer_types", None) or ()) - SEES_ALL)
    if others or getattr(model, "_is_stateful", False):
        kinds = ", ".join(others) or "a state"
        return f"layers with {kinds}, which take tokens in one order; only attention can see a block as a whole"
    if not (getattr(model, "_supports_sdpa", False) or getattr(model, "_supports_flex_attn", False)):
        return "transformers has no sdpa or FlexAttention for it, and so no way for the block mask"
    if getattr(config, "alibi", False):
        return "ALiBi positions, which are counted from a mask of its own"
    if getattr(config, "final_logit_softcapping", None):
        return "final_logit_softcapping: its logits are no product of hidden states and the head's weight"
    return None
