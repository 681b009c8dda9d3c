"""Model folders: load a block-diffusion model and its tokenizer, know its special ids, export a student as a folder."""

import fcntl
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import is_offline_mode, save_torch_state_dict, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import RepositoryNotFoundError
from packaging.version import Version
from safetensors import safe_open
from torch import Tensor
from transformers import AutoTokenizer, GenerationConfig, PreTrainedConfig
from transformers.core_model_loading import revert_weight_conversion

from t3d.blocks.special_ids import SpecialIds
from t3d.common.errors import UserError
from t3d.common.hub import unreachable
from t3d.common.jsonfiles import atomic_folder
from t3d.common.paths import model_source, resolve, setup_cache
from t3d.data.prompts import stop_ids
from t3d.decode.model_facts import head_dim
from t3d.models.block_diffusion import BlockDiffusionLM
from t3d.models.family import families, family_of, model_class
from t3d.models.fingerprint import adapter_base, weights_fingerprint

log = logging.getLogger(__name__)

PROVENANCE = "t3d.json"  # in an exported folder: the training that made it
WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
CARD = "README.md"  # the model card: it describes one model, so an export does not copy its teacher's
# Files of the source that an export does not copy: weights in any format, and indices of their shards.
WEIGHT_FILES = (
    "*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.gguf", "*.onnx", "*.index.json",
)  # fmt: skip


def load_model(
    source: str,
    *,
    dtype: str | torch.dtype = "auto",
    attn_implementation: str | None = None,
    device: str | torch.device = "cpu",
    autoregressive: bool = False,
    key: str = "model.pretrained_model",
) -> BlockDiffusionLM:
    """A block-diffusion model in eval mode, from a folder or a hub id, without running code that the folder brings.

    Args:
        dtype: dtype of the weights; "auto" = as stored.
        attn_implementation: sdpa, eager or flex_attention; None = sdpa. It overrides the folder, because released
            folders name flex_attention, which does not work on every device.
        autoregressive: read it causally: block size 1, and the logits predict the next token (see ``load_config``).
        key: the setting that named ``source``, for error messages.

    Raises:
        UserError: it does not exist, is no block-diffusion model, or has damaged or incomplete weights.
    """
    path = located(source, key)
    config = load_config(source, key, autoregressive=autoregressive)
    family = family_of(folder_config(source, key)["model_type"])
    load_generation_config(source, key)  # transformers silently ignores a damaged file
    base, attention = model_class(config), attn_implementation or "sdpa"
    if attention == "sdpa" and not base._supports_sdpa:
        raise UserError(f"{key}={source}: transformers has no sdpa for it; set attn_implementation=flex_attention", key)
    try:
        loaded: Any = base.from_pretrained(
            path,
            config=config,
            dtype=dtype,
            attn_implementation=attention,
            key_mapping=dict(family.weights) or None,
            ignore_mismatched_sizes=True,  # reported below, by name
            output_loading_info=True,
        )
        model, info = loaded
    except Exception as error:  # damaged files raise errors of several libraries, without a common base
        raise _unreadable(key, source, "model", error) from error
    for fault, name in (("lack", "missing"), ("do not belong to it", "unexpected"), ("misfit", "mismatched")):
        found = sorted(str(item[0] if isinstance(item, tuple) else item) for item in info[f"{name}_keys"])
        if found:
            few = ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")
            told = f"its weights lack {few}" if fault == "lack" else f"weights that {fault}: {few}"
            raise UserError(f"{key}={source}: {told}; the folder is not a complete model, get it again", key)
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        raise UserError(f"{key}={source}: its head has a bias, and block diffusion's losses have none", key)
    model.family = family
    return model.to(device).eval()


def training_attention(asked: str | None, source: str, device: torch.device) -> str:
    """The attention for training: ``asked``, else FlexAttention on a CUDA GPU and sdpa elsewhere.

    FlexAttention skips pairs of packed sequences that do not see each other. It has a backward pass only on GPUs, and
    kernels for heads of width 16 and more. PyTorch 2.6 compiles it again for every length, up to a limit.
    """
    recent = Version(torch.__version__) >= Version("2.7")
    flex = device.type == "cuda" and recent and head_dim(load_config(source)) >= 16
    return asked or ("flex_attention" if flex else "sdpa")


def folder_config(source: str, key: str = "model.pretrained_model") -> dict[str, Any]:
    """The contents of a model's config.json, from a folder or a hub id; ``model_type`` is always there."""
    try:
        found = PreTrainedConfig.get_config_dict(located(source, key))[0]
        if not isinstance(found.get("model_type"), str):
            raise ValueError("config.json is missing, or has no model_type")
    except UserError:
        raise
    except Exception as error:  # of several libraries, without a common base
        raise _unreadable(key, source, "model", error) from error
    return found


def load_config(source: str, key: str = "model.pretrained_model", *, autoregressive: bool = False) -> PreTrainedConfig:
    """The configuration of a block-diffusion model, from a folder or a hub id, by its family (t3d.models.family).

    Args:
        autoregressive: accept any language model, with block size 1 and a logit shift: the autoregressive model itself.

    Raises:
        UserError: it cannot be read, its model cannot decode by blocks, or its model is autoregressive and
            ``autoregressive`` is false.
    """
    found = folder_config(source, key)
    kind = found["model_type"]
    try:
        config = family_of(kind).configuration(found, name_or_path=located(source, key))
    except ValueError as error:
        raise UserError(f"{key}={source}: a {kind!r} model; {error}", key) from error
    except Exception as error:  # a value of a wrong type is an error of huggingface_hub's own
        raise _unreadable(key, source, "model", error) from error
    if autoregressive:
        config.block_size, config.logit_shift, config.full_attention = 1, True, False
    if config.block_size is None:
        raise UserError(
            f"{key}={source}: a {kind!r} model without block_size in its config.json, so it is autoregressive; "
            "turn it into a block-diffusion model with t3d convert",
            key,
        )
    return config


def load_generation_config(source: str, key: str = "model.pretrained_model") -> GenerationConfig | None:
    """The generation settings of a model folder, or None. Raises UserError for a damaged file: without it answers would
    end elsewhere.
    """
    path = located(source, key)
    try:
        return GenerationConfig.from_pretrained(path)
    except Exception as error:
        name = "generation_config.json"
        file = Path(path) / name if Path(path).is_dir() else try_to_load_from_cache(path, name)
        if isinstance(file, str | Path) and Path(file).exists():
            raise _unreadable(key, source, "generation_config.json", error) from error
        return None


def load_tokenizer(source: str, key: str = "model.pretrained_model") -> Any:
    """The tokenizer of a model folder or hub id. Raises UserError if it cannot be read."""
    try:
        config = _config_of_a_family(source, key)
        return AutoTokenizer.from_pretrained(located(source, key), config=config, trust_remote_code=False)
    except UserError:
        raise
    except Exception as error:
        raise _unreadable(key, source, "tokenizer", error) from error


def _config_of_a_family(source: str, key: str) -> PreTrainedConfig | None:
    """The configuration of a model type that transformers does not know; None = transformers finds it."""
    found = PreTrainedConfig.get_config_dict(located(source, key))[0]
    return load_config(source, key) if found.get("model_type") in families() else None


def located(source: str, key: str = "model.pretrained_model") -> str:
    """The source for transformers: a folder or a hub id. Without a connection, a hub id's folder in the hub's cache.
    For a LoRA adapter it is the folder of its model with the adapter in its weights.

    Raises:
        UserError: there is no such folder, or it is no model folder. Or a hub id is not in the cache, and the hub
            cannot be reached.
    """
    path = model_source(source, key)
    if Path(path).is_dir() and (merged := merged_adapter(Path(path), key)):
        return str(merged)
    if Path(path).is_dir() and (other := other_folder(Path(path))):
        raise UserError(f"{key}={source}: {other}", key)
    if Path(path).is_dir() or (cause := unreachable()) is None:
        return path
    cached = try_to_load_from_cache(path, "config.json")
    if isinstance(cached, str):
        return str(Path(cached).parent)
    raise UserError(
        f"{key}={source}: it is not downloaded yet, and the hub cannot be reached ({cause}); check the connection "
        "(HF_HUB_OFFLINE, HF_ENDPOINT), or give a model folder",
        key,
    )


def merged_adapter(folder: Path, key: str) -> Path | None:
    """The model of a folder's LoRA adapter with the adapter in its weights, as a folder in T3D's cache, made once.

    None where ``folder`` holds no adapter. Raises UserError where its model cannot be loaded, the two do not fit
    together, or PEFT is not installed.
    """
    base = adapter_base(folder)
    if base is None:
        return None
    target = setup_cache() / "merged" / weights_fingerprint(str(folder)) / folder.name
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target.parent / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the processes of a launch make it once
        if (target / "config.json").exists():
            return target
        try:
            model = load_model(base, dtype=torch.float32, key=key)
        except UserError as error:
            cause = str(error).removeprefix(f"{key}={base}: ")
            raise UserError(f"{key}={folder}: an adapter of {base}, which cannot be loaded: {cause}", key) from error
        merged = _merge(model, folder, base, key)
        log.warning("%s: an adapter of %s; merged into %s", folder, base, target)
        return export_model(merged, base, target, made_by=provenance(folder))


def _merge(model: BlockDiffusionLM, folder: Path, base: str, key: str) -> BlockDiffusionLM:
    """The model with a folder's adapter in its weights."""
    try:
        from peft import PeftModel, get_peft_model_state_dict

        adapted = PeftModel.from_pretrained(model, str(folder))
        names = set(get_peft_model_state_dict(adapted))
        if names != set(_weight_names(folder, "adapter_model.safetensors") or names):  # PEFT only warns
            raise ValueError("its weights are of other layers")
        return adapted.merge_and_unload()
    except ImportError as error:
        raise UserError(f"{key}={folder}: an adapter, and merging it needs peft; pip install peft", key) from error
    except Exception as error:  # of several libraries, without a common base
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".:")
        raise UserError(
            f"{key}={folder}: an adapter that does not fit {base} ({reason}); get both again", key
        ) from error


def other_folder(folder: Path) -> str | None:
    """The kind of a folder that is no model folder, and the right path; None for a model folder."""
    if (folder / "config.json").exists():
        return None
    if folder.name.startswith("models--"):
        name = folder.name.removeprefix("models--").replace("--", "/")
        return f"the hub's cache of {name}; give {name}, or {_models_below(folder) or 'another folder'}"
    run = next((path for path in (folder, *folder.parents[:2]) if (path / "log.jsonl").is_file()), None)
    if run:
        models = _models_below(run / "ckpt")
        remedy = f"give {models}" if models else "it has no trained model yet"
        return f"a folder of the training run {run}; {remedy}"
    if models := _models_below(folder):
        return f"a folder of models; give {models}"
    return "it has no config.json, so it is no model folder; give the folder of config.json, tokenizer and weights"


def _models_below(folder: Path) -> str:
    """The model folders below a folder, for people."""
    found = {path.parent for pattern in ("*/config.json", "snapshots/*/config.json") for path in folder.glob(pattern)}
    return " or ".join(map(str, sorted(found)))


def _unreadable(key: str, source: str, what: str, error: Exception) -> UserError:
    if isinstance(error.__cause__, RepositoryNotFoundError):
        return UserError(
            f"{key}={source}: the hub has no such model, or it is private; check the name, or log in to the hub",
            key,
        )
    reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".:")
    return UserError(
        f"{key}={source}: no readable {what} ({reason}); give a complete model folder, or a hub id that is "
        "reachable or downloaded already",
        key,
    )


def special_ids(model_config: Any, tokenizer: Any, generation_config: Any | None = None) -> SpecialIds:
    """Collect the special ids from a model's configurations and its tokenizer.

    Raises:
        UserError: there is no mask, pad or stop token, or the model has no embedding for it.
    """
    words, vocabulary = len(tokenizer), model_config.vocab_size
    mask_id = _first(getattr(model_config, "mask_token_id", None), tokenizer.mask_token_id)
    if mask_id is None:
        raise UserError(
            "mask_token_id: neither config.json nor the tokenizer has one; set it in config.json", "mask_token_id"
        )
    pad_id = _first(tokenizer.pad_token_id, getattr(generation_config, "pad_token_id", None), model_config.pad_token_id)
    if pad_id is None:
        raise UserError(
            "pad_token: neither the tokenizer nor config.json has one; set it in tokenizer_config.json", "pad_token"
        )
    stops = stop_ids(tokenizer, generation_config)
    for name, token in (("mask_token_id", mask_id), ("pad_token_id", pad_id), *(("eos_token_id", i) for i in stops)):
        if not 0 <= token < vocabulary:
            raise UserError(f"{name}={token}: the model has ids 0..{vocabulary - 1} only; correct config.json", name)
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    special |= {*tokenizer.all_special_ids, mask_id, pad_id, *stops}
    ordinary = torch.tensor([token for token in range(min(words, vocabulary)) if token not in special])
    return SpecialIds(mask_id, pad_id, stops, tuple(sorted({mask_id, *range(words, vocabulary)})), ordinary)


def _first(*values: int | None) -> int | None:
    return next((value for value in values if value is not None), None)


def export_model(
    model: BlockDiffusionLM,
    source: str,
    folder: Path,
    *,
    state_dict: dict[str, Tensor] | None = None,
    block_size: int | None = None,
    made_by: dict[str, Any] | None = None,
) -> Path:
    """Write a trained model as a Hugging Face folder that loads wherever its teacher did. One process calls it.

    Weights have the teacher's names and dtype. All other files of the teacher's folder except its card are copied
    unchanged, because re-saving a configuration loses keys that other loaders read. In config.json only the block size
    may change. ``t3d card`` writes the student's card. An older export at ``folder`` stays in place until the new one
    is complete.

    Args:
        source: the teacher: a folder, or a hub id (non-weight files that are not in the local cache are downloaded).
        state_dict: weights gathered from shards; None = the model's own.
        block_size: the student's block size in training; None = the teacher's.
        made_by: the training, for ``provenance``.

    Raises:
        UserError: ``folder`` is the teacher's own.
    """
    teacher, folder = _source_folder(source), Path(folder)
    if folder.exists() and folder.samefile(teacher):
        raise UserError(f"export to {folder}: this is the teacher's own folder; choose another", str(folder))
    with atomic_folder(folder) as fresh:
        _write_model(model, teacher, fresh, state_dict, block_size, made_by)
    return folder


def _write_model(
    model: BlockDiffusionLM,
    teacher: Path,
    fresh: Path,
    state_dict: dict[str, Tensor] | None,
    block_size: int | None,
    made_by: dict[str, Any] | None,
) -> None:
    """The weights, configuration and tokenizer of ``export_model``, into an empty folder."""
    config = json.loads((teacher / "config.json").read_text())
    dtype = (config.get("dtype") or config.get("torch_dtype") or "").removeprefix("torch.")
    weights = _named_weights(model, state_dict, _weight_names(teacher), dtype)
    save_torch_state_dict(weights, fresh, max_shard_size="5GB", metadata={"format": "pt"})
    for file in teacher.iterdir():
        if file.is_file() and not file.name.startswith(".") and not any(file.match(p) for p in WEIGHT_FILES):
            shutil.copyfile(file, fresh / file.name)
    if (templates := teacher / "additional_chat_templates").is_dir():
        shutil.copytree(templates, fresh / templates.name)
    block_key = family_of(config["model_type"]).published_name("block_size")
    if block_size is not None and config.get(block_key) != block_size:
        text = json.dumps(config | {block_key: block_size}, indent=2, ensure_ascii=False)
        (fresh / "config.json").write_text(text + "\n")
    for name in (PROVENANCE, CARD):  # the teacher's own
        (fresh / name).unlink(missing_ok=True)
    if made_by is not None:
        (fresh / PROVENANCE).write_text(json.dumps(made_by, indent=2, ensure_ascii=False) + "\n")


def provenance(source: str | Path) -> dict[str, Any]:
    """The training that made a model folder: objective, project, run, step and teacher. Empty if no run made it."""
    file = resolve(source) / PROVENANCE
    if not file.is_file() and (base := adapter_base(file.parent)):
        return {"objective": "adapter", "teacher": base}
    try:
        found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except ValueError as error:
        raise UserError(
            f"{file}: not readable as JSON ({error}); delete it, or export the model again", str(file)
        ) from error
    return found if isinstance(found, dict) else {}


def _source_folder(source: str) -> Path:
    """The folder of a model. For a hub id: the cached snapshot that was loaded, completed by its other files."""
    path = model_source(source)
    if Path(path).is_dir():
        return Path(located(source))
    # Loading did not fetch remote code. The export needs it in the revision that is in the cache. Offline only the
    # files in the cache are copied.
    cached = try_to_load_from_cache(path, "config.json")
    revision = Path(cached).parent.name if isinstance(cached, str) else None
    only = is_offline_mode()  # else huggingface_hub 1.33 asks the hub for the files of a known revision, and fails
    return Path(snapshot_download(path, revision=revision, ignore_patterns=list(WEIGHT_FILES), local_files_only=only))


def _weight_names(folder: Path, file_name: str = WEIGHTS) -> list[str] | None:
    """The names of a folder's weights; None if they are not in safetensors files."""
    if (folder / WEIGHTS_INDEX).exists():
        return list(json.loads((folder / WEIGHTS_INDEX).read_text())["weight_map"])
    if (folder / file_name).exists():
        with safe_open(folder / file_name, framework="pt") as file:
            return list(file.keys())
    return None


def _named_weights(
    model: BlockDiffusionLM, state_dict: dict[str, Tensor] | None, names: list[str] | None, dtype: str | None
) -> dict[str, Tensor]:
    """The weights under the published ``names`` (None: all of them, tied ones once), floating point ones in
    ``dtype``.
    """
    weights = dict(model.state_dict() if state_dict is None else state_dict)
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    for name, original in tied.items():  # gathering may drop one of two tied weights
        weights.setdefault(name, weights[original])
    if names is None:
        weights = {name: weight for name, weight in weights.items() if name not in tied}
    target = getattr(torch, dtype) if dtype else None
    exact = tuple(getattr(model, "_keep_in_fp32_modules_strict", None) or ())  # such as a router's bias
    for name, weight in weights.items():
        if weight.is_floating_point() and not any(part in name for part in exact):
            weights[name] = weight.detach().to("cpu", target)
    weights = revert_weight_conversion(model, weights)
    names = list(weights) if names is None else names
    lacking = [name for name in names if name not in weights]
    assert not lacking, f"the state dict lacks {lacking[:3]}"
    result: dict[str, Tensor] = {}
    written: set[int] = set()
    for name in names:
        weight = weights[name].detach().cpu().contiguous()
        # A teacher may store both weights of a tied pair. And on a CPU ZeRO-3 gathers views of one shared buffer.
        whole = weight.untyped_storage().nbytes() == weight.nbytes
        result[name] = weight if whole and weight.data_ptr() not in written else weight.clone()
        written.add(result[name].data_ptr())
    return result
