"""``generate`` by transformers' conventions, against the engine that it must equal."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, TextDiffusionStreamer, TextStreamer
from transformers.generation.streamers import BaseStreamer

from t3d.blocks.settings import DecodeSettings
from t3d.decode.local import LocalEngine
from t3d.decode.protocol import Request
from t3d.models.generation import BlockDiffusionGenerationConfig
from tests.conftest import MASK, PAD, STOP, tiny_model


def prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 60, (n,), generator=generator).tolist() for n in lengths]


def padded(rows: list[list[int]], width: int, side: str = "left") -> dict[str, torch.Tensor]:
    pads = [[PAD] * (width - len(row)) for row in rows]
    ids = [pad + row if side == "left" else row + pad for row, pad in zip(rows, pads, strict=True)]
    mask = [[int(token != PAD) for token in row] for row in ids]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def decoded(model, rows: list[list[int]], stops=(STOP,), seed=0, on_step=None, **settings) -> list:
    """The engine's own answers, in the prompts' order."""
    engine = LocalEngine(model, mask_id=MASK, stop_ids=stops, forbidden_ids=[])
    requests = [Request(str(i), 0, tuple(row)) for i, row in enumerate(rows)]
    answers = {a.id: a for a in engine.generate(requests, DecodeSettings(**settings), seed, on_step)}
    return [answers[request.id] for request in requests]


# ---------------------------------------------------------------------------------------------------------------------
# Results


def test_greedy_equals_the_engine(model):
    rows = prompts(3, 8, 13)
    answers = decoded(model, rows, temperature=0.0, max_token=18, denoising_steps_per_block=2)
    new = max(answer.length for answer in answers)
    result = model.generate(
        **padded(rows, 15), max_new_tokens=18, denoising_steps_per_block=2, return_dict_in_generate=True
    )
    assert result.sequences.shape == (3, 15 + new)
    assert torch.equal(result.sequences[:, :15], padded(rows, 15)["input_ids"])
    for i, answer in enumerate(answers):
        rest = new - answer.length
        assert result.sequences[i, 15:].tolist() == answer.response_ids[: answer.length] + [PAD] * rest
        assert result.unmask_step[i].tolist() == answer.unmask_step[: answer.length] + [0] * rest
        assert (int(result.steps[i]), int(result.forwards[i])) == (answer.steps, answer.forwards)
        assert result.finish_reason[i] == answer.finish_reason


def test_padding_changes_nothing(model):
    rows = prompts(5, 9)
    results = [
        model.generate(**padded(rows, width, side), max_new_tokens=10)[:, width:]
        for width, side in [(9, "left"), (16, "left"), (12, "right")]
    ]
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    alone = model.generate(torch.tensor(rows[:1]), max_new_tokens=10)[0, 5:]
    assert results[0][0, : len(alone)].tolist() == alone.tolist()
    with pytest.raises(ValueError, match="attention_mask"):
        model.generate(padded(rows, 9)["input_ids"], max_new_tokens=10)


def test_length_and_stop_ids(model):
    (row,) = prompts(6)
    ids = torch.tensor([row])
    free = model.generate(ids, max_new_tokens=9, eos_token_id=[])[0, 6:].tolist()
    assert len(free) == 9
    assert model.generate(ids, max_length=15, eos_token_id=[])[0, 6:].tolist() == free
    stop = free[4]
    stopped = model.generate(ids, max_new_tokens=9, eos_token_id=[stop, 1000])[0, 6:].tolist()
    assert stopped == free[: free.index(stop) + 1]
    assert MASK not in free
    assert model.generate(ids, eos_token_id=[]).shape == (1, 256)  # the model's positions
    forbidden = model.generate(ids, max_new_tokens=9, eos_token_id=[], suppress_tokens=free)[0, 6:].tolist()
    assert not set(forbidden) & set(free)


def test_sampling_repeats_with_its_seed(model):
    ids = torch.tensor(prompts(6))
    options = {"do_sample": True, "max_new_tokens": 12, "eos_token_id": []}
    first = model.generate(ids, seed=3, **options)
    assert torch.equal(first, model.generate(ids, seed=3, **options))
    assert not torch.equal(first, model.generate(ids, seed=4, **options))
    expected = decoded(model, ids.tolist(), stops=(), seed=3, temperature=1.0, max_token=12)[0].response_ids[:12]
    assert first[0, 6:].tolist() == expected

    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(model.generate(ids, num_return_sequences=2, **options))
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert drawn[0].shape == (2, 18) and not torch.equal(drawn[0][0], drawn[0][1])


def test_block_size_is_the_models_and_can_be_given():
    model, (row,) = tiny_model(block_size=8), prompts(5)
    for options, block in [({}, 8), ({"block_size": 4}, 4)]:
        (answer,) = decoded(
            model, [row], temperature=0.0, max_token=11, block_size=block, denoising_steps_per_block=block
        )
        result = model.generate(torch.tensor([row]), max_new_tokens=11, **options)
        assert result[0, 5:].tolist() == answer.response_ids[: answer.length]


# ---------------------------------------------------------------------------------------------------------------------
# Configuration


def test_a_saved_folder_generates(story_teacher):
    """Fields of ours are read from generation_config.json, which transformers loads as its plain class."""
    model = AutoModelForCausalLM.from_pretrained(story_teacher)
    tokenizer = AutoTokenizer.from_pretrained(story_teacher)
    inputs = tokenizer("Tom has 3 apples.", return_tensors="pt")
    greedy = model.generate(**inputs, max_new_tokens=12, tokenizer=tokenizer)
    assert greedy.max() < len(tokenizer)
    config = BlockDiffusionGenerationConfig(
        **{k: v for k, v in model.generation_config.to_dict().items() if v is not None},
        denoising_steps_per_block=1,
        max_new_tokens=7,
        return_dict_in_generate=True,
    )
    expected = model.generate(**inputs, generation_config=config)
    model.generation_config = config
    folder = story_teacher.parent / "with-defaults"
    model.save_pretrained(folder)
    result = AutoModelForCausalLM.from_pretrained(folder).generate(**inputs)
    assert torch.equal(result.sequences, expected.sequences) and int(result.steps[0]) <= 3
    slow = AutoModelForCausalLM.from_pretrained(folder).generate(**inputs, denoising_steps_per_block=4)
    assert int(slow.steps[0]) > int(result.steps[0])


def test_temperature_counts_only_when_sampling(model):
    ids = torch.tensor(prompts(6))
    model.generation_config = GenerationConfig(do_sample=True, temperature=0.6, top_k=5, eos_token_id=STOP)
    greedy = model.generate(ids, max_new_tokens=8, do_sample=False)
    assert torch.equal(greedy, model.generate(ids, max_new_tokens=8, do_sample=False, seed=9))
    (answer,) = decoded(model, ids.tolist(), seed=2, temperature=0.6, top_k=5, max_token=8)
    assert model.generate(ids, max_new_tokens=8, seed=2)[0, 6:].tolist() == answer.response_ids[: answer.length]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_beams": 4}, "num_beams=4 is not supported"),
        ({"assistant_model": torch.nn.Linear(1, 1)}, "assistant_model=Linear is not supported"),
        ({"repetition_penalty": 1.2}, "repetition_penalty=1.2 is not supported"),
        ({"tempperature": 1.0}, "tempperature=1.0 is not supported"),
        ({"denoising_steps_per_block": 5}, "denoising_steps_per_block=5: more steps"),
        ({"remasking_strategy": "low"}, "remasking_strategy=low: must be one of"),
        ({"max_new_tokens": 300}, r"max_new_tokens=300: .* 1\.\.251 are possible"),
        ({"max_length": 4}, "max_length=4: leaves -1 tokens"),
        ({"attention_mask": torch.ones(1, 4)}, "attention_mask: its shape"),
        ({"input_ids": None}, "input_ids: give"),
        ({"input_ids": torch.tensor([[1, MASK]])}, "contains the mask token"),
        ({"streamer": BaseStreamer(), "do_sample": True, "num_return_sequences": 2}, "streamer: it shows one answer"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_be_done_is_an_error(model, options, message):
    with pytest.raises(ValueError, match=message):
        model.generate(**{"input_ids": torch.tensor(prompts(5))} | options)


def test_arguments_without_effect_pass(model):
    ids = torch.tensor(prompts(5))
    plain = model.generate(ids, max_new_tokens=6)
    others = {"num_beams": 1, "use_cache": True, "assistant_model": None, "logits_processor": [], "synced_gpus": False}
    assert torch.equal(plain, model.generate(ids, max_new_tokens=6, **others))
    with pytest.raises(ValueError, match="eval"):
        model.train().generate(ids)


# ---------------------------------------------------------------------------------------------------------------------
# Watching


@pytest.mark.parametrize("strategy", ["low_confidence_static", "low_confidence_dynamic"])
def test_steps_are_shown_and_end_in_the_result(model, strategy):
    rows, shown = prompts(3, 8, 13), {}
    settings = {"temperature": 0.0, "max_token": 14, "remasking_strategy": strategy, "dynamic_threshold": 0.3}
    answers = decoded(model, rows, on_step=lambda step: shown.setdefault(step.id, []).append(step), **settings)
    assert [a.response_ids for a in answers] == [a.response_ids for a in decoded(model, rows, **settings)]
    for row, answer in zip(rows, answers, strict=True):
        steps = shown[answer.id]
        assert [step.step for step in steps] == list(range(1, answer.steps + 1))
        assert steps[-1].response_ids == answer.response_ids and steps[-1].block_complete
        before = []
        for step in steps:
            assert step.unmasked == [i for i, when in enumerate(answer.unmask_step) if when == step.step]
            assert (len(row) + len(step.response_ids)) % 4 == 0
            assert step.block_complete == (MASK not in step.response_ids)
            before += [MASK] * (len(step.response_ids) - len(before))
            changed = [i for i, token in enumerate(step.response_ids) if token != before[i]]
            assert changed == step.unmasked
            assert len(step.confidence) == len(changed) and all(0 < p <= 1 for p in step.confidence)
            before = step.response_ids
        forwards = [step.forwards for step in steps]
        assert forwards == sorted(set(forwards)) and forwards[-1] == answer.forwards


class Recorder(BaseStreamer):
    """Keeps what a TextDiffusionStreamer is given."""

    def __init__(self):
        self.drafts, self.text, self.ended = [], [], False

    def put_draft(self, value):
        self.drafts.append(value.tolist())

    def put(self, value):
        self.text.append(value.tolist())

    def end(self):
        self.ended = True


def test_streamer_sees_every_draft_and_the_answer(model):
    (row,) = prompts(6)
    free = model.generate(torch.tensor([row]), max_new_tokens=9, eos_token_id=[])[0, 6:].tolist()
    for stops in ([], [free[3]]):
        recorder = Recorder()
        result = model.generate(
            torch.tensor([row]),
            max_new_tokens=9,
            eos_token_id=stops,
            streamer=recorder,
            return_dict_in_generate=True,
        )
        prompt, *blocks = recorder.text
        assert prompt == [row] and recorder.ended
        assert sum(blocks, []) == result.sequences[0, 6:].tolist()
        assert len(recorder.drafts) == int(result.steps[0])
        assert recorder.drafts[0].count(MASK) == 1 and MASK not in recorder.drafts[1]  # half a block, two steps


def test_transformers_streamers_print_the_answer(story_teacher, capsys):
    model = AutoModelForCausalLM.from_pretrained(story_teacher)
    tokenizer = AutoTokenizer.from_pretrained(story_teacher)
    inputs = tokenizer("Tom has 3 apples.", return_tensors="pt")
    options = {"max_new_tokens": 14, "tokenizer": tokenizer}
    new = model.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :]
    capsys.readouterr()
    model.generate(**inputs, **options, streamer=TextStreamer(tokenizer, skip_prompt=True))
    assert capsys.readouterr().out == tokenizer.decode(new) + "\n"
    model.generate(**inputs, **options, streamer=TextDiffusionStreamer(tokenizer, skip_prompt=True))
    printed = capsys.readouterr().out
    assert "\033[33m" in printed and tokenizer.mask_token in printed
    settled = "".join(part.rsplit("\033[J")[-1] for part in printed.split("\0337"))  # what is left outside the drafts
    assert settled == tokenizer.decode(new) + "\n"
