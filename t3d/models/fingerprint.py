"""A digest of a model's weights that does not read them whole."""

import hashlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from t3d.common.errors import UserError
from t3d.common.paths import resolve


def adapter_base(folder: Path) -> str | None:
    """The model that a folder's LoRA adapter (PEFT's adapter_config.json) belongs to; None where it holds no adapter.

    Raises UserError where the file names no model.
    """
    file = folder / "adapter_config.json"
    if not file.is_file():
        return None
    try:
        base = json.loads(file.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError):
        base = None
    if not isinstance(base, str) or not base:
        raise UserError(
            f"{file}: base_model_name_or_path is not there; write the adapter's model into it",
            "base_model_name_or_path",
        )
    return base


def weights_fingerprint(source: str) -> str:
    """A quick digest of a model folder's weights. A hub id is its own digest. An adapter's covers its model's.


    It reads the name, shape, beginning, middle and end of every tensor in *.safetensors. Of pytorch_model*.bin it reads
    256 samples and the end, which lists a checksum per tensor. Raises UserError for a damaged *.safetensors.
    """
    folder = Path(source)
    if not folder.is_dir():
        return source
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(path.name.encode())
        try:
            with safe_open(path, "pt") as file:
                for name in sorted(file.keys()):
                    tensor = file.get_tensor(name)  # memory-mapped: only the sampled parts are read
                    flat, middle = tensor.reshape(-1), tensor.numel() // 2
                    digest.update(f"{name}/{tensor.dtype}/{tuple(tensor.shape)}".encode())
                    for part in (flat[:1024], flat[middle : middle + 1024], flat[-1024:]):
                        digest.update(part.view(torch.uint8).numpy())
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{path}: not readable ({error}); the model folder is damaged, get it again", str(path)
            ) from error
    for path in sorted(folder.glob("pytorch_model*.bin")):
        size = path.stat().st_size
        digest.update(f"{path.name}/{size}".encode())
        with path.open("rb") as file:
            for place in range(0, size, size // 256 + 1):
                file.seek(place)
                digest.update(file.read(4096))
            file.seek(max(0, size - (1 << 20)))
            digest.update(file.read())
    if base := adapter_base(folder):
        of_base = weights_fingerprint(str(resolve(base)) if resolve(base).is_dir() else base)
        digest.update((folder / "adapter_config.json").read_bytes() + of_base.encode())
    return f"v2-{digest.hexdigest()}"  # digests without v2-, in older folders, cover both ends of every file
