"""Rollouts, training, export and rollouts of the student, by the stages' own functions, on models that are not SDAR."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from studies.storymath.tokenizer import build_tokenizer
from t3d.common.options import load
from t3d.data.shards import read_shards
from t3d.rollout.run import roll_out
from t3d.rollout.settings import SampleConfig
from t3d.training.loop import train
from t3d.training.settings import TrainConfig
from tests.conftest import SHAPE

KEYS = {"block_size": 4}  # the mask token is the tokenizer's
MASKED = KEYS | {"mask_token_id": build_tokenizer().mask_token_id}  # where the family has an id of its own
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}


def folder_of(path, kind: str, own: dict, said: dict):
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = AutoConfig.for_model(kind, vocab_size=len(tokenizer), bos_token_id=None, **SHAPE, **special, **own)
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    GenerationConfig(eos_token_id=list(special.values()), pad_token_id=special["pad_token_id"]).save_pretrained(path)
    tokenizer.save_pretrained(path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | said))
    return path


@pytest.mark.parametrize(
    "kind, own, said, training",
    [
        ("llama", {"tie_word_embeddings": True}, KEYS | {"logit_shift": True}, ["training.round_interval=1"]),
        pytest.param(
            *("llama", {}, KEYS | {"full_attention": True}, ["training.objective=naive_td"]), marks=pytest.mark.slow
        ),
        pytest.param(
            *("qwen3_moe", EXPERTS, MASKED | {"model_type": "sdar_moe"}, ["training.lora.rank=2"]),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            *("qwen2", {}, MASKED | {"model_type": "Fast_dLLM_Qwen"}),
            [
                *("training.refresh_rollouts=1", "training.objective=naive_td", "training.max_gen_length=64"),
            ],
            marks=pytest.mark.slow,
        ),
    ],
    ids=["llama-shift", "llama-full-attention", "sdar-moe-lora", "fast-dllm-refresh"],
)
def test_from_questions_to_a_student_that_decodes(kind, own, said, training, tmp_path, story_questions, cache_aside):
    teacher = folder_of(tmp_path / "teacher", kind, own, said)

    def rollouts(model, project: str):
        line = [f"experiment.project={tmp_path / project}", f"evaluation.eval_dataset={story_questions}"]
        line += [f"evaluation.checkpoint_path={model}", "evaluation.limit=6", "rollout.max_token=12"]
        return roll_out(load(SampleConfig, line))

    data = rollouts(teacher, "teacher-answers")
    line = [f"model.pretrained_model={teacher}", f"dataset.optimization_data={data}", "training.max_steps=2"]
    line += [f"experiment.output_root={tmp_path}", "experiment.project=p", "experiment.run_name=r"]
    line += ["training.batch_size_lm=3", "training.gradient_accumulation_steps=1", "training.mixed_precision=no"]
    run = train(load(TrainConfig, [*line, *training, "optimizer.params.learning_rate=2e-2"]))
    student = run / "ckpt" / "optimized"
    assert (student / "config.json").read_text() == (teacher / "config.json").read_text() or kind == "qwen2"
    answers = {t.id: t.response_ids for t in read_shards(data.with_suffix(""))} if data.suffix else {}
    again = rollouts(student, "student-answers")
    assert again.exists() and len(json.loads(again.read_text())) == 6
    assert answers != {t.id: t.response_ids for t in read_shards(again.with_suffix(""))}
