"""Where things live. Inputs are looked up from the current folder first; outputs always go below the repository."""

import os
from pathlib import Path

from t3d.common.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
DATA_ENDS = (".json", ".jsonl", ".parquet")


def resolve(path: str | Path) -> Path:
    """The absolute path of an input file or folder.

    An absolute path stays; a relative one that exists from the current folder wins; any other is taken from ``ROOT``.
    So `configs/x.yaml` is found from `sample/` too, and `../configs/x.yaml` works there as well.
    """
    path = Path(path).expanduser()
    return Path(os.path.abspath(path if path.is_absolute() or path.exists() else ROOT / path))


def data_file(name: str | Path) -> Path:
    """A data set's name -> ROOT/data/<name>.json. What has a slash or the end of a data file is a path already."""
    name = os.fspath(name)
    if "/" in name or os.sep in name or name.endswith(DATA_ENDS):
        return resolve(name)
    return ROOT / "data" / f"{name}.json"


def data_name(name: str | Path) -> str:
    """A data set's name, for rows and files: "MATH500", "sets/Story.v1.json" -> "Story.v1"."""
    name = Path(name).name
    return name.removesuffix(Path(name).suffix) if name.endswith(DATA_ENDS) else name


def model_name(path_or_hub_id: str | Path) -> str:
    """The last component of a folder or a hub id: "JetLM/SDAR-4B-Chat" -> "SDAR-4B-Chat"."""
    return Path(path_or_hub_id).name


def model_source(path_or_hub_id: str, key: str = "model") -> str:
    """What ``from_pretrained`` is given: the absolute folder where one exists, else the hub id as it is.

    Raises:
        UserError: neither a folder nor a possible hub id ("owner/name"); ``key`` names the setting at fault.
    """
    folder = resolve(path_or_hub_id)
    if folder.is_dir():
        return str(folder)
    owner, slash, name = path_or_hub_id.partition("/")
    # "models/x" looks like a hub id, but where ./models exists a missing folder is meant.
    if not (slash and owner and name) or "/" in name or owner in (".", "..", "~") or resolve(owner).is_dir():
        raise UserError(f"{key}={path_or_hub_id}: no such folder; give a model folder or a hub id such as owner/name")
    return path_or_hub_id


def rollout_stem(
    project: str | Path, model: str | Path, dataset: str | Path, num_node: int = 1, node_index: int = 0
) -> Path:
    """Where one rollout writes, without extension: the folder of its shards, and ``json_file(stem)`` its one JSON.

    ROOT/<project>/temp_data/outputs-eval-<model>-<dataset>, or outputs-<node>-eval-... with several nodes.
    """
    node = f"{node_index}-" if num_node > 1 else ""
    name = f"outputs-{node}eval-{model_name(model)}-{data_name(dataset)}"
    return ROOT / Path(project).expanduser() / "temp_data" / name


def json_file(stem: Path) -> Path:
    """``stem`` + ".json". Not ``with_suffix``, which would cut "SDAR-1.7B-Chat-..." at its dot."""
    return stem.parent / f"{stem.name}.json"


def run_root(output_root: str | Path, model: str | Path, data_type: str, project: str) -> Path:
    """The folder of a project's training runs: ROOT/experiments/<model>/<data_type>/<project>."""
    return ROOT / Path(output_root).expanduser() / model_name(model) / data_type / project


def setup_cache() -> Path:
    """Put the caches of compiled kernels below T3D_CACHE_ROOT (default ~/.cache/t3d); return that folder.

    Variables that are already set are kept. Scripts call this before anything compiles; importing does not.
    """
    root = Path(os.environ.get("T3D_CACHE_ROOT") or "~/.cache/t3d").expanduser().absolute()
    for variable, name in (
        ("TRITON_CACHE_DIR", "triton"),
        ("TORCHINDUCTOR_CACHE_DIR", "inductor"),
        ("TORCH_EXTENSIONS_DIR", "torch_extensions"),
    ):
        os.environ.setdefault(variable, str(root / name))
    return root
