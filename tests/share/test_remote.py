"""A folder with its own code gives what the library gives, in a process that has no t3d."""

import ast
import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from t3d.models.loading import load_model
from t3d.share import card
from t3d.share.remote import export, main
from tests.conftest import largest_file, raises_key

SETTINGS = (
    {"denoising_steps_per_block": 4},
    {"denoising_steps_per_block": 1, "block_size": 8},
    {"remasking_strategy": "entropy_bounded", "eb_threshold": 3.0},
    {"do_sample": True, "temperature": 0.8, "seed": 3, "remasking_strategy": "random", "self_verify": True},
)
WITHOUT = """
import json, sys
sys.modules["t3d"] = None  # as if it were not installed
import torch
from transformers import AutoModelForCausalLM
ids, settings, *folders = json.loads(sys.argv[1])
found = []
for folder in folders:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    assert not any(name == "t3d" or name.startswith("t3d.") for name in sys.modules if name != "t3d")
    prompt = torch.tensor([ids])
    answers = [model.generate(prompt, max_new_tokens=24, **each).tolist() for each in settings]
    found.append({"logits": model(prompt).logits, "answers": answers})
torch.save(found, "found.pt")
"""


@pytest.fixture
def llama(tmp_path, story_teacher):
    """A block-diffusion folder on one of transformers' own models, with a logit shift."""
    tokenizer = AutoTokenizer.from_pretrained(story_teacher)
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.3,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    tokenizer.save_pretrained(tmp_path / "llama")
    file = tmp_path / "llama" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"block_size": 4, "logit_shift": True}))
    return tmp_path / "llama"


def test_without_t3d_logits_and_answers_are_the_librarys(trained, llama, tmp_path):
    originals, folders = [trained.student, llama], [tmp_path / "out" / "sdar", tmp_path / "out" / "llama"]
    for original, folder in zip(originals, folders, strict=True):
        main([str(original), str(folder), "--remote-code"])
    ids = list(range(3, 17))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    line = [sys.executable, "-c", WITHOUT, json.dumps([ids, SETTINGS, *map(str, folders)])]
    done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for original, folder, found in zip(originals, folders, torch.load(tmp_path / "found.pt"), strict=True):
        first, second = load_model(str(original)), load_model(str(folder))
        first.config.mask_token_id = second.config.mask_token_id  # Llama's is the tokenizer's
        for model in (first, second):
            prompt = torch.tensor([ids])
            torch.testing.assert_close(found["logits"], model(prompt).logits, rtol=0, atol=1e-6)
            answers = [model.generate(prompt, max_new_tokens=24, **each).tolist() for each in SETTINGS]
            assert found["answers"] == answers and len({str(answer) for answer in answers}) > 2


def test_the_folder_has_one_file_of_code_that_names_no_t3d(trained, tmp_path):
    assert (trained.student / "modeling_sdar.py").exists(), "the teacher's own code"
    main([str(trained.run), str(tmp_path / "out"), "--remote-code"])
    assert [path.name for path in (tmp_path / "out").glob("*.py")] == ["modeling_t3d.py"]
    tree = ast.parse((tmp_path / "out" / "modeling_t3d.py").read_text())
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    imported |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    others = {name.partition(".")[0] for name in imported} - sys.stdlib_module_names
    assert others == {"torch", "transformers", "psutil"}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_t3d.SDARForCausalLM"


def test_a_card_goes_along(trained, tmp_path):
    card.main([str(trained.run), "--repo", "me/small"])
    main([str(trained.run), str(tmp_path / "out"), "--remote-code"])
    text = (tmp_path / "out" / "README.md").read_text()
    assert text.startswith((trained.student / "README.md").read_text()) and "trust_remote_code=True" in text
    assert (tmp_path / "out" / "training" / "results.json").exists()


def test_an_output_that_exists_is_kept(trained, tmp_path):
    (tmp_path / "out").mkdir()
    with raises_key("output"):
        main([str(trained.run), str(tmp_path / "out"), "--remote-code"])
    assert not list((tmp_path / "out").iterdir())


def test_a_full_disk_is_one_line_and_leaves_no_parts(llama, tmp_path):
    out = tmp_path / "out"
    with raises_key(out / "own", "make room"), largest_file(5000):
        export(str(llama), str(out / "own"))
    assert not list(out.iterdir())
