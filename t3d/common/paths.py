"""Places on disk: relative paths belong to the workspace; the shipped configurations are found from every folder."""

import os
from pathlib import Path

from t3d.common.errors import UserError

PACKAGE = Path(__file__).resolve().parents[1]
ROOT = PACKAGE.parent  # the root of a checkout; site-packages for an installed package
DATA_ENDS = (".json", ".jsonl", ".parquet")


def workspace() -> Path:
    """The folder that relative paths belong to: the checkout's root inside a checkout, else the current folder.

    So a command does the same in the checkout's root and in `sample/`.
    """
    here = Path.cwd()
    return ROOT if here.is_relative_to(ROOT) else here


def shipped() -> Path:
    """The folder that holds `configs/` and `accelerate_configs/`: an installed package, or the checkout."""
    return PACKAGE if (PACKAGE / "configs").is_dir() else ROOT


def resolve(path: str | Path) -> Path:
    """The absolute path of an input file or folder.

    A relative path is looked up in the current folder, then in the workspace, then among the shipped configurations.
    A path that is found nowhere belongs to the workspace.
    """
    path = Path(path).expanduser()
    homes = [Path.cwd(), workspace(), *([shipped()] if path.suffix == ".yaml" else [])]
    found = next((home for home in homes if (home / path).exists()), workspace())
    return Path(os.path.abspath(found / path))


def output(path: str | Path) -> Path:
    """The absolute path of an output file or folder: a relative one belongs to the workspace."""
    return workspace() / Path(path).expanduser()


def data_file(name: str | Path) -> Path:
    """A data set's name -> <workspace>/data/<name>.json. A name with a slash or a data file's extension is a path."""
    name = os.fspath(name)
    if "/" in name or os.sep in name or name.endswith(DATA_ENDS):
        return resolve(name)
    return output("data") / f"{name}.json"


def data_name(name: str | Path) -> str:
    """A data set's name, for rows and files: "MATH500", "sets/Story.v1.json" -> "Story.v1"."""
    name = Path(name).name
    return name.removesuffix(Path(name).suffix) if name.endswith(DATA_ENDS) else name


def model_name(path_or_hub_id: str | Path) -> str:
    """The last component of a folder or a hub id: "JetLM/SDAR-4B-Chat" -> "SDAR-4B-Chat"."""
    return Path(path_or_hub_id).name


def model_source(path_or_hub_id: str, key: str = "model") -> str:
    """The source for ``from_pretrained``: the absolute folder if it exists, else the hub id.

    Raises:
        UserError: neither a folder nor a possible hub id ("owner/name"); ``key`` names the setting at fault.
    """
    folder = resolve(path_or_hub_id)
    if folder.is_dir():
        return str(folder)
    owner, slash, name = path_or_hub_id.partition("/")
    # "models/x" looks like a hub id. If ./models exists, the user means a folder, and it is missing.
    if not (slash and owner and name) or "/" in name or owner in (".", "..", "~") or resolve(owner).is_dir():
        raise UserError(
            f"{key}={path_or_hub_id}: no such folder; give a model folder or a hub id such as owner/name", key
        )
    return path_or_hub_id


def rollout_stem(
    project: str | Path, model: str | Path, dataset: str | Path, num_node: int = 1, node_index: int = 0
) -> Path:
    """A rollout's path without extension. The shards lie in this folder; ``json_file(stem)`` is its JSON file.

    <workspace>/<project>/temp_data/outputs-eval-<model>-<dataset>, or outputs-<node>-eval-... with several nodes.
    """
    node = f"{node_index}-" if num_node > 1 else ""
    name = f"outputs-{node}eval-{model_name(model)}-{data_name(dataset)}"
    return output(project) / "temp_data" / name


def json_file(stem: Path) -> Path:
    """``stem`` + ".json". ``with_suffix`` would cut "SDAR-1.7B-Chat-..." at its dot."""
    return stem.parent / f"{stem.name}.json"


def run_root(output_root: str | Path, model: str | Path, data_type: str, project: str) -> Path:
    """The folder of a project's training runs: <workspace>/experiments/<model>/<data_type>/<project>."""
    return output(output_root) / model_name(model) / data_type / project


def setup_cache() -> Path:
    """Put the caches of compiled kernels below T3D_CACHE_ROOT (default ~/.cache/t3d); return that folder.

    Variables that are set already are kept. Scripts call this before anything compiles.
    """
    root = Path(os.environ.get("T3D_CACHE_ROOT") or "~/.cache/t3d").expanduser().absolute()
    for variable, name in (
        ("TRITON_CACHE_DIR", "triton"),
        ("TORCHINDUCTOR_CACHE_DIR", "inductor"),
        ("TORCH_EXTENSIONS_DIR", "torch_extensions"),
    ):
        os.environ.setdefault(variable, str(root / name))
    return root
