"""An autoregressive model folder becomes a block-diffusion one, without training: `t3d convert`.

    t3d convert model.pretrained_model=HuggingFaceTB/SmolLM2-135M-Instruct convert.output=models/smollm

The weights stay unchanged. The model gets a mask token, a block size, and `logit_shift`: whether its logits still
predict the next token. At block size 1 with the shift it decodes like the autoregressive model.
"""

import json
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from t3d.common import paths
from t3d.common.errors import UserError, disk_faults_as_user_errors, run_main
from t3d.common.jsonfiles import atomic_folder
from t3d.common.options import load, option

MASK = "<|mask|>"  # the name of a new mask token
UNUSED = re.compile(r"reserved|unused|placeholder|extra_id", re.IGNORECASE)  # special tokens that no text holds
SOURCE, OUTPUT, MASK_KEY = "model.pretrained_model", "convert.output", "convert.mask_token"


@dataclass
class Source:
    """The section ``model``: the autoregressive model."""

    pretrained_model: str = option("", "autoregressive model: a folder, a hub id, or a GGUF file")


@dataclass
class Target:
    """The section ``convert``: the block-diffusion model."""

    output: str = option("", "folder of the block-diffusion model; it must not exist yet")
    block_size: int = option(4, "positions of one block", ge=1)
    logit_shift: bool = option(
        True, "keep next-token prediction: the state before a position predicts its token; false = its own state does"
    )
    mask_token: str | None = option(
        None, "special token to use as the mask; null = the tokenizer's, else an unused one, else a new one"
    )


@dataclass
class ConvertConfig:
    """The keys of ``t3d convert``."""

    USUAL = (SOURCE, OUTPUT, "convert.block_size", "convert.logit_shift", MASK_KEY)

    model: Source = field(default_factory=Source)
    convert: Target = field(default_factory=Target)

    def check(self) -> None:
        """Raises UserError for a value that is missing."""
        for key, value, what in (
            (SOURCE, self.model.pretrained_model, "a folder, a hub id or a GGUF file"),
            (OUTPUT, self.convert.output, "a folder that does not exist yet"),
        ):
            if not value:
                raise UserError(f"{key}: no value; give {what}", key)


@dataclass(frozen=True)
class Mask:
    """A model's mask token: its name and id, and where it comes from."""

    token: str
    id: int
    origin: str


def find_mask(tokenizer: Any, rows: int, asked: str | None = None) -> Mask:
    """The mask token of a model with ``rows`` embeddings. A new token is added to ``tokenizer``.

    It is the first of these that exists: ``asked``, the tokenizer's mask token, a row beyond the tokenizer's words, a
    special token with the name of an unused one, a new row.

    Raises:
        UserError: the token ``asked`` is an ordinary word.
    """
    known = tokenizer.get_vocab()
    special = {entry.content: token for token, entry in tokenizer.added_tokens_decoder.items() if entry.special}
    if asked is not None and asked in known and asked not in special:
        raise UserError(f"{MASK_KEY}={asked}: an ordinary token; name a special token that no text holds", MASK_KEY)
    name = asked or tokenizer.mask_token
    if name in known:
        origin = "the tokenizer's mask token" if name == tokenizer.mask_token else "a special token"
    elif len(tokenizer) < rows or name:
        name = name or MASK
        origin = "a row that no token used" if len(tokenizer) < rows else "a new row"
    else:
        unused = sorted((token, text) for text, token in special.items() if UNUSED.search(text))
        name, origin = (unused[0][1], "an unused special token") if unused else (MASK, "a new row")
    tokenizer.add_special_tokens({"mask_token": name})
    return Mask(name, tokenizer.convert_tokens_to_ids(name), origin)


def add_mask(model: Any, mask: Mask) -> None:
    """Set the mask's row to the mean of the other embeddings; a new row is added if the model has none for it."""
    if mask.id >= model.config.vocab_size:
        model.resize_token_embeddings(mask.id + 1, mean_resizing=False)
    with torch.no_grad():
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):  # the same layer if they are tied
            others = torch.arange(len(layer.weight)) != mask.id
            layer.weight[mask.id] = layer.weight[others].float().mean(0).to(layer.weight.dtype)


@contextmanager
def as_folder(source: str, beside: Path) -> Iterator[str]:
    """A folder or hub id unchanged; a GGUF file as a temporary folder of transformers, next to ``beside``."""
    if not source.endswith(".gguf"):
        yield source
        return
    file = paths.resolve(source)
    if not file.is_file():
        raise UserError(f"{SOURCE}={source}: no such file; give a GGUF file", SOURCE)
    with tempfile.TemporaryDirectory(dir=beside.parent, prefix=".gguf-") as folder:
        unpack_gguf(file, Path(folder))
        yield folder


def unpack_gguf(file: Path, folder: Path) -> None:
    """Write the model and the tokenizer of a GGUF file as a folder of transformers, weights in fp32.

    Raises:
        UserError: the package ``gguf`` is missing, or transformers cannot read the file.
    """
    from huggingface_hub import save_torch_state_dict
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except ImportError as error:
        raise UserError(f"{SOURCE}={file}: reading GGUF needs the package gguf; pip install gguf", SOURCE) from error
    except Exception as error:  # damaged files raise errors of several libraries, without a common base
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise UserError(
            f"{SOURCE}={file}: transformers cannot read it ({reason}); give another file", SOURCE
        ) from error
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    weights = {name: weight for name, weight in model.state_dict().items() if name not in tied}
    save_torch_state_dict(weights, folder, metadata={"format": "pt"})
    config = model.config.to_diff_dict() | {"architectures": [type(model).__name__], "dtype": "float32"}
    for name in ("quantization_config", "_name_or_path"):
        config.pop(name, None)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def convert(config: ConvertConfig) -> list[str]:
    """Write the block-diffusion folder; returns the report's lines.

    Raises:
        UserError: the output exists; the source is no decoder language model, or is a block-diffusion model already.
            A block-diffusion folder at block size 1 with a logit shift is an autoregressive model.
    """
    target, output = config.convert, paths.output(config.convert.output)
    if output.exists():
        raise UserError(f"{OUTPUT}={target.output}: exists already; choose another folder, or remove it", OUTPUT)
    output.parent.mkdir(parents=True, exist_ok=True)
    with disk_faults_as_user_errors(output), as_folder(config.model.pretrained_model, output) as source:
        return _convert_folder(source, config.model.pretrained_model, output, target)


def _convert_folder(source: str, name: str, output: Path, target: Target) -> list[str]:
    from t3d.models.loading import export_model, folder_config, load_model, load_tokenizer, special_ids

    found = folder_config(source, SOURCE)
    if found.get("block_size", 1) != 1 or "block_size" in found and not found.get("logit_shift"):
        raise UserError(f"{SOURCE}={name}: a block-diffusion model already, of blocks of {found['block_size']}", SOURCE)
    model, tokenizer = load_model(source, autoregressive=True, key=SOURCE), load_tokenizer(source, SOURCE)
    mask = find_mask(tokenizer, model.config.vocab_size, target.mask_token)
    add_mask(model, mask)
    if borrowed := tokenizer.pad_token is None and model.generation_config.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.config.mask_token_id = mask.id
    ids = special_ids(
        model.config, tokenizer, model.generation_config
    )  # raises UserError for a missing id before a file is written

    keys = {"block_size": target.block_size, "mask_token_id": mask.id, "logit_shift": target.logit_shift}
    with atomic_folder(output) as fresh:
        export_model(model, source, fresh, made_by={"objective": "converted", "teacher": name} | keys)
        file = fresh / "config.json"
        written = json.loads(file.read_text()) | keys | {"vocab_size": model.config.vocab_size}
        file.write_text(json.dumps(written, indent=2, ensure_ascii=False) + "\n")
        tokenizer.save_pretrained(fresh)
    shift = "the next token's (logit_shift)" if target.logit_shift else "the position's own"
    return [
        f"{name}: {found['model_type']}, {model.num_parameters():,} weights",
        f"mask     {mask.token} = {mask.id}, {mask.origin}",
        f"blocks   of {target.block_size}; logits are {shift}",
        f"stops    {_names(tokenizer, ids.stop_ids)}",
        f"pad      {_names(tokenizer, [ids.pad_id])}{', as the model has none of its own' if borrowed else ''}",
        *([] if tokenizer.chat_template else ["no chat template: put one into tokenizer_config.json before rollouts"]),
        f"written to {output}",
    ]


def _names(tokenizer: Any, tokens: Sequence[int]) -> str:
    return ", ".join(f"{tokenizer.convert_ids_to_tokens(token)} = {token}" for token in tokens)


def main(argv: Sequence[str] | None = None) -> None:
    """Convert. ``argv``: None = the process's own arguments."""
    print("\n".join(convert(load(ConvertConfig, argv))))


if __name__ == "__main__":
    run_main(main)
