"""The picture of docs/DECODING.md: one answer of the embedded teacher under several decode settings.

    python -m studies.storymath.pictures [--question TEXT] [--output PNG]

Each row is an answer as it was decoded. A cell is a token, its colour and number the denoising step of its block that
unmasked it; lines separate the blocks.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

from studies.domains import DOMAINS
from studies.storymath.plots import save
from t3d.blocks.settings import DecodeSettings
from t3d.cli.speaker import STORIES, Speaker
from t3d.common.errors import run_main
from t3d.common.paths import ROOT
from t3d.data.trajectory import Trajectory
from t3d.models.decoder import load_decoder

OUTPUT = ROOT / "docs" / "images" / "strategies.png"
BLOCK, WIDTH = 4, 32  # tokens of a block, and of the answer that are shown
SETTINGS: dict[str, dict[str, Any]] = {  # whole blocks of 4: one token a step, where nothing else is said
    "static, 4 steps": {},
    "static, 2 steps": {"denoising_steps_per_block": 2},
    "static, 1 step": {"denoising_steps_per_block": 1},
    "sequential, 2 steps": {"denoising_steps_per_block": 2, "remasking_strategy": "sequential"},
    "dynamic, above 0.9": {"remasking_strategy": "low_confidence_dynamic", "dynamic_threshold": 0.9},
    "entropy, below 0.4": {"remasking_strategy": "entropy_bounded", "eb_threshold": 0.4},
}


def steps_of_blocks(trajectory: Trajectory) -> list[int]:
    """The step of its own block, from 1 on, in which each token was unmasked."""
    places = range(len(trajectory.prompt_ids), len(trajectory.prompt_ids) + len(trajectory.response_ids))
    found = []
    for _, block in groupby(zip(places, trajectory.unmask_step, strict=True), lambda at: at[0] // BLOCK):
        steps = [step for _, step in block]
        order = sorted(set(steps))
        found += [1 + order.index(step) for step in steps]
    return found


def draw(ax: Any, answers: Sequence[tuple[str, list[str], list[int], int]]) -> None:
    """Rows of (label, tokens, steps of their blocks, first place in its block)."""
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    colours = colormaps["viridis"].resampled(BLOCK)
    for row, (label, words, steps, first) in enumerate(answers):
        for place, (word, step) in enumerate(zip(words[:WIDTH], steps, strict=False)):
            shade = colours(step - 1)
            ink = "white" if step <= BLOCK // 2 else "black"
            ax.add_patch(Rectangle((place, row), 1, 0.86, color=shade, lw=0))
            ax.text(place + 0.5, row + 0.33, word, ha="center", va="center", fontsize=7.5, color=ink)
            ax.text(place + 0.5, row + 0.68, str(step), ha="center", va="center", fontsize=6.5, color=ink, alpha=0.8)
            if place and (first + place) % BLOCK == 0:
                ax.plot([place, place], [row - 0.05, row + 0.91], color="black", lw=2)
        ax.text(-0.3, row + 0.43, label, ha="right", va="center", fontsize=9)
    ax.set(xlim=(-6, WIDTH), ylim=(len(answers), -0.1))
    ax.axis("off")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--question", default=STORIES[1])
    parser.add_argument("--output", type=Path, default=OUTPUT)
    args = parser.parse_args()
    decoder = load_decoder(str(ROOT / DOMAINS["StoryMath"].teacher))
    settings = DecodeSettings(block_size=BLOCK, denoising_steps_per_block=BLOCK, max_token=64, temperature=0.0)
    speaker = Speaker.of("teacher", decoder, settings)
    prompt = speaker.prompt(args.question, "math")
    answers = []
    for label, keys in SETTINGS.items():
        trajectory = speaker.answer(prompt, replace(speaker.settings, **keys))
        words = [speaker.text([token]) or "·" for token in trajectory.response_ids[: trajectory.length]]
        answers.append(
            (f"{label}: {trajectory.forwards} forwards", words, steps_of_blocks(trajectory), len(prompt) % BLOCK)
        )
        print(f"{label}: {trajectory.forwards} forwards: {trajectory.text}")
    save(args.output, (17, 3.6), lambda ax: draw(ax, answers))


if __name__ == "__main__":
    run_main(main)
