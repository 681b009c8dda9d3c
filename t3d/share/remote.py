"""`t3d export STUDENT OUT --remote-code`: a model folder that transformers loads without t3d, by `trust_remote_code`.

The folder has one file of code, modeling_t3d.py. It holds the classes of the model, the block-causal mask and the whole
decoder with its strategies, generated from the sources of t3d. It needs torch, transformers and psutil.
"""

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from t3d import __version__
from t3d.blocks import strategy
from t3d.common import paths
from t3d.common.errors import UserError, disk_faults_as_user_errors, run_main
from t3d.common.jsonfiles import atomic_folder
from t3d.decode import attention, graphs
from t3d.models import block_diffusion
from t3d.models.block_diffusion import BlockDiffusionLM
from t3d.models.family import family_of, model_class
from t3d.models.loading import CARD, folder_config, load_config, load_tokenizer, located, special_ids
from t3d.share.bundle import Bundle, Place
from t3d.share.student import trained_folder
from t3d.share.templates import render

MODULE = "modeling_t3d"
OURS = block_diffusion.__name__
HEAD = f'''"""A block-diffusion language model with its decoder, for transformers with trust_remote_code=True.

Generated from the sources of t3d {__version__} (few-step diffusion language models, arXiv 2602.12262). Do not edit it:
`t3d export --remote-code` writes it.
"""'''


def modelling_file(kind: type[BlockDiffusionLM]) -> tuple[str, dict[str, str]]:
    """The code of a block-diffusion class (see ``model_class``), and the ``auto_map`` of config.json."""
    names = strategy.names()
    classes = {name: "".join(part.capitalize() for part in name.split("_")) for name in names}
    table = ", ".join(f'"{name}": {found}' for name, found in classes.items())
    here = strategy.__name__
    replaced = {
        Place(here, "names"): f"def names():\n    return {names!r}",
        Place(here, "strategy_named"): f"def strategy_named(name):\n    strategies = {{{table}}}\n"
        "    if name not in strategies:\n        raise ValueError(f\"must be one of {', '.join(strategies)}\")\n"
        "    return strategies[name]()",
        # the model's own kernel, without flash-attn and torch.compile
        Place(attention.__name__, "choose_attention"): "def choose_attention(model, asked):\n"
        "    return CacheAttention(asked or model.config._attn_implementation)",
        Place(graphs.__name__, "Graphs"): 'class Graphs:\n    """Not used here."""',
    }
    strategies = [Place(f"{strategy.PACKAGE}.{name}", found) for name, found in classes.items()]
    if kind.__module__ == OURS:
        auto = {"AutoConfig": "SDARConfig", "AutoModel": "SDARModel", "AutoModelForCausalLM": "SDARForCausalLM"}
        bundle = Bundle([*(Place(OURS, name) for name in auto.values()), *strategies], replaced)
        text = bundle.text()
    else:
        auto = {"AutoModelForCausalLM": "BlockDiffusionForCausalLM"}
        bundle = Bundle([Place(OURS, "BlockDiffusionLM"), *strategies], replaced)
        config, name = kind.config_class, kind.__name__  # transformers' own, and its class's name
        assert config is not None
        text = bundle.text() + (
            f"\n\nfrom {kind.__module__} import {name}\nfrom {config.__module__} import {config.__name__}\n"
            f"\n\nclass BlockDiffusionForCausalLM(BlockDiffusionLM, {name}):\n"
            f'    """{name} under the block grid."""\n\n    config_class = {config.__name__}\n'
        )
    return f"{HEAD}\n\n{text}", {name: f"{MODULE}.{found}" for name, found in auto.items()}


def export(source: str, output: str) -> Path:
    """Write the folder; returns it. It appears when it is complete.

    Raises:
        UserError: the output exists, or the source is no block-diffusion model.
    """
    folder, model = paths.output(output), Path(located(str(trained_folder(source)), "student"))
    if folder.exists():
        raise UserError(f"{output}: exists already; choose another folder, or remove it", "output")
    config = load_config(str(model), "student")
    if family_of(folder_config(str(model))["model_type"]).weights:
        raise UserError(
            f"{source}: its weights have other names than in transformers; export does not write it", "student"
        )
    code, auto_map = modelling_file(model_class(config))
    values = configuration(model, config) | {"auto_map": auto_map}
    values["architectures"] = [auto_map["AutoModelForCausalLM"].partition(".")[2]]
    kept = shutil.ignore_patterns("*.py", ".*", "__pycache__")
    with disk_faults_as_user_errors(folder), atomic_folder(folder) as fresh:
        shutil.copytree(model, fresh, ignore=kept, dirs_exist_ok=True)
        (fresh / f"{MODULE}.py").write_text(code, encoding="utf-8")
        (fresh / "config.json").write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        if (card := fresh / CARD).is_file():
            card.write_text(card.read_text(encoding="utf-8") + "\n" + render("remote.md.j2"), encoding="utf-8")
    return folder


def configuration(model: Path, config: PreTrainedConfig) -> dict[str, Any]:
    """config.json in transformers' names, with every fact of decoding. transformers chooses the attention kernel."""
    found = folder_config(str(model))
    names = family_of(found["model_type"]).keys
    values = {names.get(name, name): value for name, value in found.items() if name != "attn_implementation"}
    mask = special_ids(config, load_tokenizer(str(model), "student")).mask_id
    facts = {"block_size": config.block_size, "mask_token_id": mask, "logit_shift": bool(config.logit_shift)}
    return values | {"model_type": config.model_type, **facts}


def main(argv: Sequence[str] | None = None) -> None:
    """Write a folder that needs no t3d. ``argv``: None = the process's own arguments."""
    parser = argparse.ArgumentParser(
        prog="t3d export", description="Write a student's folder with the code that transformers needs to load it."
    )
    parser.add_argument("student", help="a training run's folder, or the folder of a block-diffusion model")
    parser.add_argument("output", help="the new folder")
    parser.add_argument(
        "--remote-code", action="store_true", required=True, help=f"add {MODULE}.py, for trust_remote_code=True"
    )
    asked = parser.parse_args(argv)
    print(export(asked.student, asked.output))


if __name__ == "__main__":
    run_main(main)
