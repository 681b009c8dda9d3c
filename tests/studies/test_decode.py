"""The decoding benchmark in small: it runs, and measures what it says. Speeds are for a quiet machine."""

import torch

from studies.benchmarks import decode
from studies.benchmarks.measure import in_fresh_process, peak_memory
from t3d.blocks.settings import DecodeSettings


def test_peak_memory_is_what_is_held_at_a_time():
    assert 60 * 2**20 < in_fresh_process(peak_memory, _hold_once, torch.device("cpu")) < 120 * 2**20


def _hold_once():
    block = torch.zeros(2**24)
    for _ in range(20):
        block += 1


def test_share_of_the_model():
    case = decode.Case.random(2, 64, 500, prompts=3, max_token=8)
    assert 0.1 < decode.model_share(case, DecodeSettings(denoising_steps_per_block=1, temperature=0.1)) < 1
