"""What tests share: a tiny random SDAR with sharp predictions, and where real inputs may lie."""

import json
import random
import resource
import shutil
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel

from studies.storymath.problems import generate
from studies.storymath.tokenizer import build_tokenizer
from t3d.blocks import decoding
from t3d.common.errors import UserError
from t3d.common.paths import ROOT
from t3d.decode.local import Run
from t3d.decode.protocol import Request
from t3d.models import SDARConfig, SDARForCausalLM
from tests.browser import browsers

SHARED = Path(__file__).resolve().parents[2] / "shared"
# the shape of transformers' own models in the tests
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
}
VOCAB, MASK, STOP, PAD = 64, 63, 62, 61

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell's background job, and all that it starts
    signal.signal(signal.SIGINT, signal.default_int_handler)


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


def reset_accelerator() -> None:
    """Empty accelerate's global state: the next Accelerator of this process may have other settings."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(autouse=True)
def fresh_accelerator() -> None:
    """No test sees the accelerate state of the test before it."""
    reset_accelerator()


@contextmanager
def raises_key(key: str | Path, *named: object) -> Iterator[pytest.ExceptionInfo[UserError]]:
    """The block ends in a UserError about ``key``. Its line has each of ``named``: a value or a remedy, no sentence."""
    with pytest.raises(UserError) as caught:
        yield caught
    line = str(caught.value)
    assert caught.value.key == str(key) and "\n" not in line
    for part in named:
        assert str(part) in line


@pytest.fixture
def model() -> SDARForCausalLM:
    return tiny_model()


@pytest.fixture
def shared() -> Path:
    """The folder of real data and the real SDAR-4B-Chat configuration; absent on a fresh machine."""
    if not SHARED.is_dir():
        pytest.skip("no real SDAR configuration and data beside the checkout (../shared)")
    return SHARED


@pytest.fixture(scope="session")
def sdar():
    """The tokenizer of SDAR-4B-Chat."""
    if not SHARED.is_dir():
        pytest.skip("no real SDAR tokenizer beside the checkout (../shared)")
    return AutoTokenizer.from_pretrained(SHARED / "sdar-4b-chat", trust_remote_code=False)


@pytest.fixture
def models_loaded(monkeypatch) -> list[str]:
    """The places from which transformers has loaded a model's weights in this test, one entry for each time."""
    places: list[str] = []
    load = PreTrainedModel.from_pretrained.__func__

    def loading(cls, place, *args, **options):
        places.append(str(place))
        return load(cls, place, *args, **options)

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(loading))
    return places


class Seen(NamedTuple):
    """A denoising step of one answer: the lane's ids before it, its masked positions, and the logits drawn from."""

    request: Request
    shown: torch.Tensor
    position: torch.Tensor
    logits: torch.Tensor


@pytest.fixture
def steps_seen(monkeypatch) -> list[Seen]:
    """Every step of the local engine in this test."""
    seen: list[Seen] = []
    parts: list[torch.Tensor] = []

    def watching_draw(logits, *args, **kwargs):
        parts.append(logits.clone())
        return draw(logits, *args, **kwargs)

    def watching_denoise(run, *args):
        parts.clear()
        before = run.lanes.ids.clone()
        result = denoise(run, *args)
        for lane, logits in enumerate(torch.cat(parts).split(result.masked.sum(-1).tolist())):
            if len(logits):
                at = result.position[lane][result.masked[lane]]
                seen.append(Seen(run.requests[lane], before[lane], at, logits))
        return result

    draw, denoise = decoding.draw, Run._denoise
    monkeypatch.setattr(decoding, "draw", watching_draw)
    monkeypatch.setattr(Run, "_denoise", watching_denoise)
    return seen


# ---------------------------------------------------------------------------------------------------------------------
# The workflows in small: a tiny random teacher with the embedded tokenizer, questions, and its trajectories


@pytest.fixture(scope="session")
def story_teacher(tmp_path_factory) -> Path:
    """A folder with a tiny untrained SDAR and the embedded tokenizer, and a file that exports must take along."""
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    config = SDARConfig(
        architectures=["SDARForCausalLM"],
        vocab_size=len(tokenizer) + 3,  # like released models: more rows than the tokenizer has tokens
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=256,
        initializer_range=0.2,
        tie_word_embeddings=False,
        block_size=4,
        mask_token_id=tokenizer.mask_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = SDARForCausalLM(config)
    stops = [tokenizer.eos_token_id, tokenizer.pad_token_id]
    model.generation_config = GenerationConfig(eos_token_id=stops, pad_token_id=tokenizer.pad_token_id)
    folder = tmp_path_factory.mktemp("models") / "tiny-teacher"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "modeling_sdar.py").write_text("raise RuntimeError('code of a model folder was run')\n")
    return folder


@pytest.fixture(scope="session")
def broken_teacher(story_teacher, tmp_path_factory) -> Path:
    """The same with a weight that is no number, as of a training that diverged."""
    folder = tmp_path_factory.mktemp("broken") / "tiny-broken"
    shutil.copytree(story_teacher, folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][3, 5] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def story_questions(tmp_path_factory) -> Path:
    """24 word problems in the layout of the question sets."""
    rng, rows = random.Random(7), []
    for _ in range(24):
        problem = generate(rng, 1)
        answer = {"ground_truth_answer": problem.answer, "solution": problem.solution}
        rows.append({"question": problem.question, **answer})
    path = tmp_path_factory.mktemp("questions") / "Story.json"
    path.write_text(json.dumps(rows))
    return path


@pytest.fixture(scope="session")
def rollout_line(story_teacher, story_questions):
    """The command line of a small rollout into a project."""

    def line(project, *more: str) -> list[str]:
        return [
            f"experiment.project={project}",
            f"evaluation.checkpoint_path={story_teacher}",
            f"evaluation.eval_dataset={story_questions}",
            "rollout.max_token=24",
            "rollout.temperature=0.5",
            *more,
        ]

    return line


@pytest.fixture(scope="session")
def story_trajectories(rollout_line, tmp_path_factory) -> Path:
    """The teacher's trajectories on the questions: 24 answers of up to 24 tokens, at block 4 and full steps."""
    from t3d.common.options import load
    from t3d.rollout.run import roll_out
    from t3d.rollout.settings import SampleConfig

    return roll_out(load(SampleConfig, rollout_line(tmp_path_factory.mktemp("rollouts"))))


@pytest.fixture(scope="session")
def cache_aside(tmp_path_factory):
    """Built data sets go to a folder of this session, in this process and in those it starts."""
    import datasets

    folder = str(tmp_path_factory.mktemp("datasets"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", folder)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
        yield


def launch_line(config: str | Path, script: str | Path, *overrides: str) -> list[str]:
    """`accelerate launch` of a script with one of the shipped configurations, on a free port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    options = ("--config_file", str(ROOT / "accelerate_configs" / config), "--main_process_port", port)
    return [sys.executable, "-m", "accelerate.commands.launch", *options, str(script), *overrides]


@pytest.fixture(scope="module")
def new_browser(tmp_path_factory):
    """Makes browsers, each a user of its own; skips where no browser is installed."""
    with browsers(tmp_path_factory.mktemp("browsers")) as make:
        yield make


@contextmanager
def largest_file(size: int):
    """The system lets this process write no file beyond so many bytes, as a full disk or a quota would."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
