"""The generated benchmarks: StoryMath and StoryCode, each with its tokenizer and its embedded teacher.

A domain's package has `problems.build_splits` and `tokenizer.build_tokenizer`.
"""

import argparse
import json
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from t3d.common.jsonfiles import atomic_write
from t3d.common.paths import ROOT


class Domain(NamedTuple):
    """A generated benchmark.

    name: as its data sets begin. data_type: the kind of its questions. teacher: a folder below the root, and config:
    its training. told: the questions in a few words. instead: the real benchmark in whose place it stands. results: the
    folder of its figures below docs/results/tables. page: their page below docs. paper: whether the page shows the
    paper's own figures too.
    """

    name: str
    data_type: str
    teacher: str
    config: str
    told: str
    instead: str
    results: str
    page: str
    paper: bool = False

    @property
    def runs(self) -> Path:
        """The default folder of the tables' models and rollouts."""
        return Path("experiments/tables") / self.results

    @property
    def package(self) -> str:
        """The package of its questions. ``python -m`` writes them."""
        return f"studies.{self.name.lower()}"

    def split(self, name: str) -> str:
        """The name of a data set."""
        return f"{self.name}_{name}"

    def build_splits(self, with_sft: bool = False) -> dict[str, list[dict]]:
        """Every data set; with_sft: the teacher's large training set too."""
        return import_module(f"{self.package}.problems").build_splits(with_sft)

    def build_tokenizer(self) -> Any:
        """Its tokenizer."""
        return import_module(f"{self.package}.tokenizer").build_tokenizer()


DOMAINS = {
    "StoryMath": Domain(
        name="StoryMath",
        data_type="math",
        teacher="models/embedded-teacher",
        config="configs/demo/teacher.yaml",
        told="short generated word problems",
        instead="MATH500",
        results="",
        page="RESULTS.md",
        paper=True,
    ),
    "StoryCode": Domain(
        name="StoryCode",
        data_type="code",
        teacher="models/storycode-teacher",
        config="configs/demo/storycode_teacher.yaml",
        told="short Python functions from generated requirements",
        instead="MBPP",
        results="StoryCode",
        page="STORYCODE.md",
    ),
}


def named(text: str) -> Domain:
    """A command line's domain, whose teacher is there."""
    if text not in DOMAINS:
        raise argparse.ArgumentTypeError(f"{text}: give one of {', '.join(DOMAINS)}")
    if not (ROOT / DOMAINS[text].teacher).exists():
        missing = f"{DOMAINS[text].teacher} is not there; make teacher OF={text.lower()} trains it, in two hours"
        raise argparse.ArgumentTypeError(f"{text}: {missing}")
    return DOMAINS[text]


def initial_model(domain: Domain, folder: Path, block_size: int, seed: int) -> None:
    """An untrained tiny SDAR with its tokenizer, as a Hugging Face folder; at block size 1 an autoregressive Qwen3."""
    from transformers import GenerationConfig, Qwen3ForCausalLM, set_seed

    from t3d.models import SDARForCausalLM

    tokenizer = domain.build_tokenizer()
    kind: Any = Qwen3ForCausalLM if block_size == 1 else SDARForCausalLM
    config = kind.config_class(
        architectures=[kind.__name__],
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=False,
        block_size=block_size,
        mask_token_id=tokenizer.mask_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    if block_size == 1:
        config.logit_shift = True
    set_seed(seed)
    model = kind(config)
    stops = [tokenizer.eos_token_id, tokenizer.pad_token_id]
    model.generation_config = GenerationConfig(eos_token_id=stops, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write(domain: Domain) -> None:
    """The command of a domain's package."""
    parser = argparse.ArgumentParser(description=f"Write data/{domain.name}_*.json, and an untrained model.")
    parser.add_argument("--data", type=Path, default=ROOT / "data", help=f"folder of the {domain.name}_*.json files")
    parser.add_argument("--sft", action="store_true", help="also the teacher's training set (200,000 problems)")
    parser.add_argument("--init", type=Path, help="also write an untrained model into this folder")
    parser.add_argument("--block-size", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0, help="initial weights")
    args = parser.parse_args()
    for name, rows in domain.build_splits(with_sft=args.sft).items():
        with atomic_write(args.data / f"{name}.json") as file:
            file.write(json.dumps(rows, indent=0))
        print(f"{args.data / name}.json: {len(rows)} problems")
    if args.init:
        initial_model(domain, args.init, args.block_size, args.seed)
        print(f"{args.init}: untrained model")
