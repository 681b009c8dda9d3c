"""The published way to decode SDAR, our own implementation as a baseline: one prompt at a time, one commit per block.

It follows generate.py of SDAR's repository. The cache grows. In each block every step projects all positions onto the
vocabulary and samples with ``torch.multinomial``. A block without masks goes through the model once more to store its
keys and values. Two points differ: it has only static remasking, and it removes the keys of unstored forwards from the
cache. The original's model skips their store. (Both concatenate keys and values once per layer and forward.)
"""

import torch
from transformers import DynamicCache

from t3d.blocks.decoding import quota
from t3d.blocks.settings import DecodeSettings
from t3d.decode.cache import CACHE_NAME


@torch.no_grad()
def generate(model, prompt_ids: list[int], settings: DecodeSettings, mask_id: int, stop_ids: list[int]) -> list[int]:
    """Decode one prompt; returns the response's ids up to the end of the last block."""
    block, prompt = settings.block_size, len(prompt_ids)
    total = -(-(prompt + settings.max_token) // block) * block
    x = torch.full((1, total), mask_id, device=model.device)
    x[0, :prompt] = torch.tensor(prompt_ids)
    block_of = torch.arange(total, device=model.device) // block
    visible = (block_of.unsqueeze(0) <= block_of.unsqueeze(1))[None, None]
    position = torch.arange(total, device=model.device)[None]
    cache = DynamicCache()
    shares = quota(settings).tolist()

    def forward(start: int, end: int, store: bool):
        logits = model(
            x[:, start:end],
            visible[:, :, start:end, :end],
            position_ids=position[:, start:end],
            use_cache=True,
            **{CACHE_NAME: cache},
        ).logits
        if not store:
            cache.crop(start - end)
        return logits

    first = prompt // block * block
    if first:
        forward(0, first, store=True)
    for start in range(first, total, block):
        end = start + block
        for share in [*shares, 0]:
            masked = x[0, start:end] == mask_id
            if not masked.any():
                forward(start, end, store=True)
                break
            token, confidence = _sample(forward(start, end, store=False)[0], settings.temperature)
            chosen = confidence.masked_fill(~masked, -torch.inf).topk(min(share, int(masked.sum()))).indices
            x[0, start + chosen] = token[chosen]
        if any(stop in x[0, prompt:end] for stop in stop_ids):
            return x[0, prompt:end].tolist()
    return x[0, prompt:].tolist()


def _sample(logits: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    if temperature == 0:
        confidence, token = logits.softmax(-1).max(-1)
        return token, confidence
    probability = (logits / temperature).softmax(-1)
    token = torch.multinomial(probability, 1)
    return token.squeeze(-1), probability.gather(-1, token).squeeze(-1)
