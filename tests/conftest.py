"""What tests share: a tiny random SDAR with sharp predictions, and where real inputs may lie."""

from pathlib import Path

import pytest
import torch

from t3d.models import SDARConfig, SDARForCausalLM

SHARED = Path(__file__).resolve().parents[2] / "shared"
VOCAB, MASK, STOP, PAD = 64, 63, 62, 61


def tiny_model(seed: int = 0, block_size: int = 4, vocab: int = VOCAB) -> SDARForCausalLM:
    torch.manual_seed(seed)
    config = SDARConfig(
        vocab_size=vocab,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=256,
        initializer_range=0.2,
        tie_word_embeddings=False,
        block_size=block_size,
        mask_token_id=MASK,
        eos_token_id=STOP,
        pad_token_id=PAD,
    )
    return SDARForCausalLM._from_config(config, attn_implementation="sdpa").eval()


@pytest.fixture
def model() -> SDARForCausalLM:
    return tiny_model()


@pytest.fixture
def shared() -> Path:
    """The folder of real data and the real SDAR-4B-Chat configuration; absent on a fresh machine."""
    if not SHARED.is_dir():
        pytest.skip("no real SDAR configuration and data beside the checkout (../shared)")
    return SHARED
