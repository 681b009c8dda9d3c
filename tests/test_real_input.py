"""SDAR-4B-Chat's own configuration and tokenizer on real questions. The weights are random and few: it is the plumbing
that is shown, from MATH_train prompts to a score on MATH500."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer

from t3d.common.options import load
from t3d.data.release import prepare_training_file, read_release_json
from t3d.evaluation.run import evaluate
from t3d.evaluation.settings import EvalConfig
from t3d.models import SDARForCausalLM
from t3d.rollout.run import roll_out
from t3d.rollout.settings import SampleConfig
from t3d.tasks import prompt
from t3d.training.loop import train
from t3d.training.settings import TrainConfig
from tests.conftest import reset_accelerator

SMALL = {
    **{"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "head_dim": 16, "max_window_layers": 2},
}
MASK, END_OF_TEXT, END_OF_TURN = 151669, 151643, 151645


@pytest.fixture
def teacher(tmp_path, shared):
    """SDAR-4B-Chat with two small layers of random weights, and the code files that its config points to."""
    folder = tmp_path / "SDAR-small"
    shutil.copytree(shared / "sdar-4b-chat", folder)
    (folder / "model.safetensors.index.json").unlink()
    config = json.loads((folder / "config.json").read_text()) | SMALL
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    for name in ("configuration_sdar.py", "modeling_sdar.py"):
        (folder / name).write_text("raise RuntimeError('code of a model folder was run')\n")
    torch.manual_seed(0)
    model = SDARForCausalLM(AutoConfig.from_pretrained(folder)).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "weights")
    shutil.copy(tmp_path / "weights" / "model.safetensors", folder)
    return folder


@pytest.mark.usefixtures("cache_aside")
def test_from_math_prompts_to_a_score_on_math500(tmp_path, shared, teacher):
    project = f"experiment.project={tmp_path / 'project'}"
    decode = ("rollout.max_token=24", "rollout.temperature=0.1", "evaluation.data_type=math")
    questions = shared / "data" / "MATH_train.json"
    rolled = roll_out(
        load(
            SampleConfig,
            [
                *("config=configs/sdar_sample.yaml", project, f"evaluation.checkpoint_path={teacher}", *decode),
                *(f"evaluation.eval_dataset={questions}", "evaluation.limit=16"),
            ],
        )
    )
    assert rolled.name == "outputs-eval-SDAR-small-MATH_train.json"

    renamed = tmp_path / "SDAR-small-MATH_train_renamed.json"
    assert prepare_training_file([rolled], renamed).kept == 16
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    asked = [row["question"] for row in json.loads(questions.read_text())[:16]]
    records = list(read_release_json(renamed))
    assert [record.question for record in records] == asked
    for record in records:
        record.validate(MASK)
        assert record.prompt_ids == prompt(record.question, tokenizer)[0].tolist()
        assert max(record.response_ids) < len(tokenizer) < 151936, "an id beyond the tokenizer"
        ended = bool({END_OF_TEXT, END_OF_TURN} & set(record.response_ids[: record.length]))
        assert record.finish_reason == ("stop" if ended else "length")

    reset_accelerator()
    run = train(
        load(
            TrainConfig,
            [
                *("config=configs/ddo_sdar_full_self.yaml", f"experiment.output_root={tmp_path / 'runs'}"),
                *(f"model.pretrained_model={teacher}", f"dataset.optimization_data={renamed}"),
                *("training.batch_size_lm=2", "training.gradient_accumulation_steps=1", "training.max_steps=2"),
                *("optimizer.params.learning_rate=1e-3", "lr_scheduler.params.warmup_steps=0"),
            ],
        )
    )
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log] == [1, 2] and all(row["sequences"] == 2 for row in log)
    assert log[0]["path"] > 0 and log[0]["grad_norm"] > 0

    student = run / "ckpt" / "optimized"
    assert {path.name for path in student.iterdir()} - {"t3d.json"} == {path.name for path in teacher.iterdir()}
    for path in teacher.iterdir():
        if path.suffix != ".safetensors":
            assert (student / path.name).read_bytes() == path.read_bytes(), path.name
    config = json.loads((student / "config.json").read_text())
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_sdar.SDARForCausalLM"
    assert config["rope_theta"] == 1000000
    before, after = (load_file(folder / "model.safetensors") for folder in (teacher, student))
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in before.items()} == {
        name: (tensor.shape, tensor.dtype) for name, tensor in after.items()
    }
    assert not torch.equal(before["lm_head.weight"], after["lm_head.weight"])

    output = evaluate(
        load(
            EvalConfig,
            [
                *("config=configs/eval.yaml", project, f"evaluation.checkpoint_path={student}", *decode),
                *(f"evaluation.eval_dataset={shared / 'data' / 'MATH500.json'}", "evaluation.limit=8"),
            ],
        )
    )
    (row,) = json.loads(output.read_text())
    assert row["n"] == 8 and row["dataset"] == "MATH500" and row["tokens_per_step"] == 4
    assert sum(row["finish_reasons"].values()) == 8 and 0 <= row["accuracy"] <= 1
