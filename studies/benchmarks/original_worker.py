"""Runs an original beside our benchmark, in a process with the original's own version of transformers.

    python original_worker.py NAME JOB FOLDER

It imports nothing of T3D, because T3D needs a newer transformers. JOB is a file of JSON; studies.benchmarks.originals
writes it and starts this. It prints "ready" and its version of torch, and then the seconds of one run for every line
that it reads.
"""

import json
import sys
import time
from collections.abc import Callable
from importlib import import_module
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor


def main() -> None:
    """The process."""
    name, job, folder = sys.argv[1:]
    work = WORKERS[name](json.loads(Path(job).read_text()), Path(folder))
    print("ready", torch.__version__, flush=True)
    for _ in sys.stdin:
        began = time.perf_counter()
        work()
        print(time.perf_counter() - began, flush=True)


def sdar(job: dict[str, Any], folder: Path) -> Callable[[], None]:
    """SDAR's generate.py with the release's model, one prompt at a time. That model wants masks of four dimensions."""
    sys.path.insert(0, str(folder / "SDAR"))
    block_diffusion_generate = import_module("generate").block_diffusion_generate

    model = released_model(folder, job["model"]).eval()

    def four_dimensions(module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        return args, kwargs | {"attention_mask": kwargs["attention_mask"].unsqueeze(1)}

    model.register_forward_pre_hook(four_dimensions, with_kwargs=True)
    prompts = [torch.tensor([ids]) for ids in job["prompts"]]

    def work() -> None:
        for ids in prompts:
            block_diffusion_generate(
                model,
                {"input_ids": ids},
                mask_id=job["mask_id"],
                gen_length=job["max_token"],
                block_length=job["block_size"],
                denoising_steps=job["steps"],
                temperature=job["temperature"],
                remasking_strategy="low_confidence_static",
            )

    return work


def dllm(job: dict[str, Any], folder: Path) -> Callable[[], None]:
    """dllm's sampler of block diffusion with its own Qwen3, all prompts in a batch. No padding id is drawn."""
    for name in ("dllm", "dllm.core", "dllm.core.samplers", "dllm.pipelines", "dllm.pipelines.a2d"):
        # without its imports of every pipeline
        stand_in(name).__path__ = [str(folder / "dllm" / name.replace(".", "/"))]
    sys.path.insert(0, str(folder / "dllm"))
    code, qwen3 = (
        import_module("dllm.core.samplers.bd3lm"),
        import_module("dllm.pipelines.a2d.models.qwen3.modeling_qwen3"),
    )

    model = of_folder(qwen3.A2DQwen3LMHeadModel, qwen3.A2DQwen3Config, job["model"]).eval()
    ids = {"mask_token_id": job["mask_id"], "pad_token_id": job["pad_id"], "bos_token_id": None, "eos_token_id": -1}
    sampler = code.BD3LMSampler(model=model, tokenizer=SimpleNamespace(**ids))
    blocks = -(-job["max_token"] // job["block_size"])
    config = code.BD3LMSamplerConfig(
        max_new_tokens=job["max_token"],
        block_size=job["block_size"],
        steps=blocks * job["steps"],
        steps_per_block=job["steps"],
        temperature=job["temperature"],
    )
    return lambda: sampler.sample(job["prompts"], config)


def release(job: dict[str, Any], folder: Path) -> Callable[[], None]:
    """The release's training step: its own functions in the order of its loop, then clipping and AdamW."""
    model, reference = (released_model(folder, job[name]) for name in ("student", "reference"))
    model.train()
    if job["checkpointing"]:
        model.gradient_checkpointing_enable()
        model.config.use_cache = False
    stand_in("wandb")
    stand_in("torchvision").transforms = None  # type: ignore[attr-defined]
    from omegaconf import OmegaConf

    released, prepare = import_module("train.self_ddo_sdar_full"), import_module("train.prepare")
    config = OmegaConf.load(folder / "T3D" / "configs" / "ddo_sdar_full_self.yaml")
    config.training.block_size, config.training.path_k_steps = job["block_size"], job["block_size"]
    pad, mask, vocab = job["pad_id"], job["mask_id"], job["vocab"]
    rows, start = padded(job["samples"], pad)
    steps = [sample["unmask_step"] for sample in job["samples"]]
    torch.manual_seed(0)
    ids, p_mask, position, labels = prepare.collect_training_data(
        config, rows, start, pad, mask, vocab, config.training.post_num, step_map_list=steps
    )
    attention = prepare.make_basic_block_attention(ids.shape[1], start, job["block_size"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    taken = job["first"]

    def loss_of(i: int) -> Tensor:
        one = slice(i, i + 1)
        inputs = (model, reference, ids[one], p_mask[one], position[one], labels[one], start, attention, pad)
        with torch.no_grad():
            theirs_real = released.compute_logp(*inputs, reference_logits=True)
            theirs_fake, logits = released.compute_logp_fake(*inputs, 0.0, reference_logits=True)
            drawn = logits.argmax(-1)
        real = released.compute_logp(*inputs)
        fake, logits = released.compute_logp_fake(*inputs, 0.0, x_theta_fake=drawn)
        loss, _ = released.compute_loss(config, real, fake, theirs_real, theirs_fake)
        path = released.compute_path_loss_from_step_map(
            logits, labels[one], torch.tensor(steps[i])[None], job["block_size"], job["block_size"], mask, pad, start
        )
        return loss + config.training.lambda_path * path

    def work() -> None:
        for i in range(taken):
            (loss_of(i) / taken).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return work


def padded(samples: list[dict[str, Any]], pad: int) -> tuple[Tensor, int]:
    """Prompts padded on the left, answers on the right: (sequences, length), and where the answers begin."""
    start, answer = (max(len(sample[key]) for sample in samples) for key in ("prompt_ids", "response_ids"))
    rows = torch.full((len(samples), start + answer), pad)
    for row, sample in zip(rows, samples, strict=True):
        row[start - len(sample["prompt_ids"]) : start] = torch.tensor(sample["prompt_ids"])
        row[start : start + len(sample["response_ids"])] = torch.tensor(sample["response_ids"])
    return rows, start


def released_model(folder: Path, weights: str) -> Any:
    """The release's own SDAR with these weights. PyTorch's norm takes the place of flash-attn's, which needs a GPU."""
    names = ("flash_attn", "flash_attn.ops", "flash_attn.ops.triton", "flash_attn.ops.triton.layer_norm")
    for name in names:
        stand_in(name)

    def norm(x: Tensor, weight: Tensor, bias: None, eps: float) -> Tensor:
        return torch.nn.functional.rms_norm(x, weight.shape, weight, eps)

    sys.modules[names[-1]].rms_norm_fn = norm  # type: ignore[attr-defined]
    if str(folder / "T3D") not in sys.path:
        sys.path.insert(0, str(folder / "T3D"))
    code = import_module("models.sdar")

    model = of_folder(code.SDARForCausalLM, code.SDARConfig, weights)
    model.config.fuse_cross_entropy = False  # as the release's training sets it
    return model


def stand_in(name: str) -> ModuleType:
    """An empty module of that name, unless one is loaded."""
    module = sys.modules.setdefault(name, ModuleType(name))
    module.__spec__ = module.__spec__ or ModuleSpec(name, None)
    return module


def of_folder(model_class: Any, config_class: Any, weights: str) -> Any:
    """A model in fp32 from a folder of T3D's, whose configuration is of a newer transformers."""
    from safetensors.torch import load_file

    found = json.loads((Path(weights) / "config.json").read_text())
    for key in ("model_type", "architectures", "rope_parameters", "layer_types", "dtype", "transformers_version"):
        value = found.pop(key, None)
        if key == "rope_parameters" and value:
            found["rope_theta"] = value["rope_theta"]
    model = model_class(config_class(**found, attn_implementation="sdpa"))
    state: dict[str, Tensor] = {}
    for file in Path(weights).glob("*.safetensors"):
        state |= load_file(file)
    model.load_state_dict(state)
    return model


WORKERS = {"sdar": sdar, "dllm": dllm, "release": release}

if __name__ == "__main__":
    main()
