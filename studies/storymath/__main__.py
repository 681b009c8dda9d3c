"""Write the embedded benchmark: data/StoryMath_*.json and models/embedded-init (``python -m studies.storymath``)."""

import argparse
import json
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, Qwen3ForCausalLM, set_seed

from studies.storymath.problems import build_splits
from studies.storymath.tokenizer import build_tokenizer
from t3d.common.errors import run_main
from t3d.common.jsonfiles import atomic_write
from t3d.common.paths import ROOT
from t3d.models import SDARForCausalLM


def initial_model(folder: Path, block_size: int, seed: int) -> None:
    """An untrained tiny SDAR with its tokenizer, as a Hugging Face folder; at block size 1 an autoregressive Qwen3."""
    tokenizer = build_tokenizer()
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


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=ROOT / "data", help="folder of the StoryMath_*.json files")
    parser.add_argument("--sft", action="store_true", help="also the teacher's training set (200,000 problems)")
    parser.add_argument("--init", type=Path, help="also write an untrained model into this folder")
    parser.add_argument("--block-size", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0, help="initial weights")
    args = parser.parse_args()
    for name, rows in build_splits(with_sft=args.sft).items():
        with atomic_write(args.data / f"{name}.json") as file:
            file.write(json.dumps(rows, indent=0))
        print(f"{args.data / name}.json: {len(rows)} problems")
    if args.init:
        initial_model(args.init, args.block_size, args.seed)
        print(f"{args.init}: untrained model")


if __name__ == "__main__":
    run_main(main)
