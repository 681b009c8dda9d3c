"""lm-evaluation-harness: the bound against plain sums over all masks, the model's answers against the engine's, and the
real harness from its command line."""

import itertools
import json
import math
import os
import random
import socket
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from t3d.blocks.settings import DecodeSettings
from t3d.data.prompts import render
from t3d.decode.local import LocalEngine
from t3d.decode.protocol import Request
from t3d.states.base import generator_for
from tests.conftest import MASK, PAD, ROOT, raises_key

pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install -e '.[lm-eval]'")

from lm_eval.api.instance import Instance
from lm_eval.api.model import CachingLM
from lm_eval.api.registry import get_model

from t3d.integrations.lm_eval import __main__ as command
from t3d.integrations.lm_eval import model as harness
from t3d.integrations.lm_eval.bound import bound_states, mask_sets, weighted_log_probs
from tests.integrations.lm_eval_tasks import story

TEACHER = ROOT / "models" / "embedded-teacher"

# ---------------------------------------------------------------------------------------------------------------------
# The bound


def texts(context: int, continuation: int, seed: int = 0) -> tuple[list[int], list[int]]:
    rng = random.Random(seed)
    return [rng.randrange(60) for _ in range(context)], [rng.randrange(60) for _ in range(continuation)]


def bound(model, context, continuation, block_size, mc_num, seed=0) -> float:
    generator = torch.Generator().manual_seed(seed)
    states = bound_states(
        context, continuation, block_size=block_size, mask_id=MASK, mc_num=mc_num, generator=generator
    )
    return sum(weighted_log_probs(model, states, PAD))


@torch.no_grad()
def nelbo_by_hand(model, context, continuation, block_size) -> float:
    """- E_t E_M [1/t sum_{i in M} -log p(x^i | ...)]: every set of every block by a plain forward without layout or
    cache, weighted by the integral of t^k (1 - t)^(n - k) / t over a fine grid."""
    model.config.block_size = block_size
    ids, total = context + continuation, 0.0
    t = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    for start in range(len(context) // block_size * block_size, len(ids), block_size):
        inside = range(max(start, len(context)), min(start + block_size, len(ids)))
        for size in range(1, len(inside) + 1):
            weight = float((t ** (size - 1) * (1 - t) ** (len(inside) - size)).mean())
            for hidden in itertools.combinations(inside, size):
                block = ids[start : start + block_size]
                block += [MASK] * (block_size - len(block))
                for i in hidden:
                    block[i - start] = MASK
                log_probs = model(torch.tensor([ids[:start] + block])).logits[0].log_softmax(-1)
                total += weight * sum(float(log_probs[i, ids[i]]) for i in hidden)
    return total


@pytest.mark.parametrize("context, continuation", [(0, 3), (1, 1), (4, 4), (5, 3), (6, 7), (9, 2)])
@pytest.mark.parametrize("block_size", [2, 4])
def test_the_bound_is_the_nelbo(model, context, continuation, block_size):
    pair = texts(context, continuation)
    expected = nelbo_by_hand(model, *pair, block_size)
    assert bound(model, *pair, block_size, mc_num=15) == pytest.approx(expected, rel=1e-4)
    assert bound(model, *pair, block_size, mc_num=15, seed=1) == bound(model, *pair, block_size, mc_num=15)


@pytest.mark.parametrize("mc_num", [1, 4])
def test_drawn_masks_give_the_bound_on_average(model, mc_num):
    """Many draws of the bound, none of which saw all masks."""
    pair, draws = texts(6, 7), 600
    generator = torch.Generator().manual_seed(0)
    options = {"block_size": 4, "mask_id": MASK, "mc_num": mc_num, "generator": generator}
    states = [state for _ in range(draws) for state in bound_states(*pair, **options)]
    parts = [x for at in range(0, len(states), 500) for x in weighted_log_probs(model, states[at : at + 500], PAD)]
    found = torch.tensor(parts, dtype=torch.float64).unflatten(0, (draws, -1)).sum(-1)
    error = found.std() / draws**0.5
    assert error > 0
    assert abs(found.mean() - nelbo_by_hand(model, *pair, 4)) < 3 * error < 1


def test_sizes_of_drawn_sets_have_equal_shares():
    masked, weight = mask_sets(8, 5, 16, torch.Generator().manual_seed(0))
    sizes = masked.sum(-1)
    assert masked.shape == (16, 5, 8) and sizes.sort(0).values.tolist() == [[1 + i // 2] * 5 for i in range(16)]
    torch.testing.assert_close(weight, 8 / sizes / 16)
    masked, weight = mask_sets(3, 2, 7, torch.Generator())
    assert len({tuple(row) for row in masked[:, 0].tolist()}) == 7 and not (~masked).all(-1).any()
    torch.testing.assert_close((weight * masked.sum(-1)).sum(0), torch.full((2,), 3.0, dtype=weight.dtype))


def test_at_block_size_1_it_is_the_likelihood_itself(model):
    context, continuation = texts(3, 9)
    model.config.block_size, ids, expected = 1, context + continuation, 0.0
    for end in range(len(context), len(ids)):
        logits = model(torch.tensor([[*ids[:end], MASK]])).logits[0, -1].detach()
        expected += float(logits.log_softmax(-1)[ids[end]])
    assert bound(model, context, continuation, 1, mc_num=1) == pytest.approx(expected, rel=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# The model


@pytest.fixture
def make(story_teacher):
    def make(**arguments) -> harness.SDARHarness:
        return harness.SDARHarness(**{"pretrained": str(story_teacher), "max_gen_toks": 24} | arguments)

    return make


def instances(kind: str, arguments: list[tuple], repeats: int = 1) -> list[Instance]:
    return [Instance(kind, {}, given, 0, ("story", row, repeats)) for row, given in enumerate(arguments)]


def questions(**given) -> list[Instance]:
    return instances("generate_until", [(row["prompt"], given) for row in story.load()["test"]])


def decoded(lm: harness.SDARHarness, settings: DecodeSettings) -> list[str]:
    """The engine's own answers to the questions, uncut."""
    engine = LocalEngine(lm.model, mask_id=lm.ids.mask_id, stop_ids=lm.ids.stop_ids, forbidden_ids=lm.ids.forbidden_ids)
    requests = [Request("story/" + str(i), 0, tuple(lm.tok_encode(r.args[0]))) for i, r in enumerate(questions())]
    found = {t.id: t for t in engine.generate(requests, settings, seed=lm.args.seed)}
    found = [found[request.id] for request in requests]
    return [lm.tokenizer.decode(t.response_ids[: t.length], skip_special_tokens=True) for t in found]


NUCLEUS = {"top_p": 0.9, "top_k": 5}
DYNAMIC = {"remasking_strategy": "low_confidence_dynamic", "dynamic_threshold": 0.1}


@pytest.mark.parametrize(
    "arguments, given, settings",
    [
        ({}, {}, {"denoising_steps_per_block": 4, "temperature": 0.0}),
        ({"denoising_steps_per_block": 1}, {"max_gen_toks": 9}, {"denoising_steps_per_block": 1, "max_token": 9}),
        ({"block_size": 8}, {"max_new_tokens": 9}, {"block_size": 8, "denoising_steps_per_block": 8, "max_token": 9}),
        ({"seed": 3}, {"do_sample": True}, {"temperature": 1.0}),
        ({}, {"do_sample": True, "temperature": 0.5} | NUCLEUS, {"temperature": 0.5} | NUCLEUS),
        ({}, {"temperature": 0.5}, {"temperature": 0.5}),
        ({}, {"do_sample": False, "temperature": 0.5, "num_beams": 1, "min_p": None}, {"temperature": 0.0}),
        ({"temperature": 0.7, "top_k": 3}, {"do_sample": False}, {"temperature": 0.7, "top_k": 3}),
        (DYNAMIC, {}, DYNAMIC),
        ({"self_verify": True, "batch_size": 3}, {}, {"self_verify": True}),
        ({"energy_candidates": 3, "temperature": 0.5}, {}, {"energy_candidates": 3, "temperature": 0.5}),
    ],
)  # fmt: skip
def test_answers_are_the_engines(make, arguments, given, settings):
    lm = make(**arguments)
    expected = decoded(lm, DecodeSettings(**{"temperature": 0.0, "max_token": 24} | settings))
    assert len(set(expected)) > 6
    assert lm.generate_until(questions(**given), disable_tqdm=True) == expected
    shuffled = questions(**given)
    random.Random(0).shuffle(shuffled)
    found = lm.generate_until(shuffled[:5], disable_tqdm=True)
    assert found == [expected[request.doc_id] for request in shuffled[:5]]


def test_stop_strings_cut_the_text_and_end_it_where_they_are_a_token(make, monkeypatch):
    lm, lengths = make(), []
    generate = LocalEngine.generate

    def watching(engine, *arguments):
        for found in generate(engine, *arguments):
            lengths.append(len(found.response_ids))
            yield found

    monkeypatch.setattr(LocalEngine, "generate", watching)
    whole = lm.generate_until(questions(), disable_tqdm=True)
    undisturbed, ids = sum(lengths), [lm.tok_encode(text) for text in whole]
    common = (i for i in ids[0] if sum(i in of for of in ids) > 3 and i not in lm.tokenizer.all_special_ids)
    word, phrase = lm.tokenizer.decode(next(common)), lm.tokenizer.decode(ids[1][3:6])
    assert set(lm._stop_ids([word, phrase, "Question:"])) == {*lm.ids.stop_ids, *lm.tok_encode(word)}
    for until in (phrase, [phrase, "", word], ["never said", word]):
        lengths.clear()
        found = lm.generate_until(questions(until=until), disable_tqdm=True)
        stops = [until] if isinstance(until, str) else [stop for stop in until if stop]
        ends = [min([text.find(stop) for stop in stops if stop in text] + [len(text)]) for text in whole]
        assert found == [text[:end] for text, end in zip(whole, ends, strict=True)] and found != whole
        assert (sum(lengths) < undisturbed) == (word in stops)
        assert word in stops or sum(lengths) == undisturbed


def test_repeats_of_a_request_are_samples_of_their_own(make):
    lm = make()
    request = questions(do_sample=True)[0]
    first, second, third = lm.generate_until([request] * 3, disable_tqdm=True)
    assert len({first, second, third}) == 3
    assert lm.generate_until([request], disable_tqdm=True) == [first]


def test_likelihoods_do_not_depend_on_what_else_is_asked(make, monkeypatch):
    lm = make(mc_num=6, seed=1)
    pairs = [(row["prompt"], " " + choice) for row in story.load()["test"] for choice in row["choices"]]
    together = lm.loglikelihood(instances("loglikelihood", pairs), disable_tqdm=True)
    monkeypatch.setattr(harness, "TOKENS_AT_ONCE", 300)
    few = lm.loglikelihood(instances("loglikelihood", pairs[4:1:-1]), disable_tqdm=True)
    assert [value for value, _ in few] == pytest.approx([together[i][0] for i in (4, 3, 2)], rel=1e-5)
    assert not any(greedy for _, greedy in together)
    generator = generator_for(1, 0, str(lm.tok_encode(pairs[0][0])) + str(lm.tok_encode(pairs[0][1])))
    options = {"block_size": 4, "mask_id": lm.ids.mask_id, "mc_num": 6, "generator": generator}
    states = bound_states(lm.tok_encode(pairs[0][0]), lm.tok_encode(pairs[0][1]), **options)
    assert len(states) == 6 and together[0][0] == pytest.approx(sum(weighted_log_probs(lm.model, states, 0)), rel=1e-5)
    other = make(mc_num=6, seed=2).loglikelihood(instances("loglikelihood", pairs[:1]), disable_tqdm=True)
    assert other[0][0] != together[0][0]


def test_greedy_is_what_decoding_begins_with(make):
    lm = make(check_greedy=True, denoising_steps_per_block=2, temperature=0.9)
    contexts = [row["prompt"] for row in story.load()["test"]][:3]
    greedy = make(denoising_steps_per_block=2)
    says = greedy.generate_until(instances("generate_until", [(c, {}) for c in contexts]), disable_tqdm=True)
    pieces = [lm.tok_encode(text)[:n] for text, n in zip(says, (1, 6, 9), strict=True)]
    pairs = [(context, lm.tokenizer.decode(piece)) for context, piece in zip(contexts, pieces, strict=True)]
    pairs += [(context, says[-1][:20] + text) for context, text in pairs[:2]]
    found = lm.loglikelihood(instances("loglikelihood", pairs), disable_tqdm=True)
    assert [is_greedy for _, is_greedy in found][:3] == [True] * 3
    assert not any(is_greedy for _, is_greedy in found[3:])


def test_rolling_texts_are_scored_whole(make):
    lm = make(mc_num=3)
    rows = story.load()["test"]
    short, long = rows[0]["text"], " ".join(row["text"] for row in rows)
    ids = lm.tok_encode(long)
    assert len(ids) > 2 * lm.max_length
    found = lm.loglikelihood_rolling(instances("loglikelihood_rolling", [(short,), (long,), ("",)]), disable_tqdm=True)
    ((expected, _),) = lm.loglikelihood(instances("loglikelihood", [("", short)]), disable_tqdm=True)
    assert found[0] == pytest.approx(expected, rel=1e-5) and found[2] == 0
    prefix, at, expected = lm.prefix_token_id, 0, 0.0
    while at < len(ids):  # a token of context, except for the last window, which reaches back as far as it may
        window = ids[at : at + lm.max_length - 1]
        context = [prefix] if at == 0 else ids[at + len(window) - lm.max_length : at]
        expected += next(value for _, value in lm._bounds([(context, window)], True))
        at += len(window)
    assert found[1] == pytest.approx(expected, rel=1e-5)


def test_chat_templates_are_the_tokenizers(make):
    lm = make()
    question = "How many?"
    text = lm.apply_chat_template([{"role": "user", "content": question}])
    assert lm.tok_encode(text) == render(question, lm.tokenizer)
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": "First, add"}]
    assert lm.apply_chat_template(turns, add_generation_prompt=False).endswith("First, add")
    assert lm.chat_template(True) == lm.tokenizer.chat_template and "/" not in lm.tokenizer_name
    lm.tokenizer.chat_template = None
    with raises_key("chat_template"):
        lm.apply_chat_template(turns)


@pytest.mark.parametrize(
    "arguments, key, named",
    [
        ({"blocksize": 4}, "blocksize", "block_size"),
        ({"trust_remote_code": True}, "trust_remote_code", "=True"),
        ({"pretrained": ""}, "pretrained", "hub id"),
        ({"pretrained": "no/such/folder"}, "pretrained", "=no/such/folder"),
        ({"block_size": "four"}, "block_size", "=four"),
        ({"mc_num": 0}, "mc_num", "at least 1"),
        ({"denoising_steps_per_block": 5}, "denoising_steps_per_block", "block_size=4"),
        ({"remasking_strategy": "static"}, "remasking_strategy", "sequential"),
        ({"dtype": "int8"}, "dtype", "float32"),
        ({"max_token": 8}, "max_gen_toks", "max_token"),
        ({"batch_size": 8, "max_active": 4}, "batch_size", "max_active"),
    ],
)
def test_wrong_arguments_are_one_clear_line(make, arguments, key, named):
    with raises_key(key, named):
        make(**arguments)


def test_what_cannot_be_honoured_is_an_error(make):
    lm = make()
    for given in ({"num_beams": 4}, {"repetition_penalty": 1.2}):
        (name,) = given
        with raises_key(name, f"--gen_kwargs {name}=None"):
            lm.generate_until(questions(**given))
    with raises_key("rollout.max_token", "=400", "256 positions"):
        lm.generate_until(questions(max_gen_toks=400))
    with raises_key("continuation", "token 301", "256"):
        lm.loglikelihood(instances("loglikelihood", [("1", " yes" * 300)]))


def test_the_harness_defaults_count_as_unsaid():
    parse = harness.ModelArguments.parse
    assert parse({"pretrained": "x", "batch_size": 1, "device": "cuda:0"}) == parse({"pretrained": "x"})
    assert parse({"pretrained": "x", "batch_size": 8}).max_active == 8


# ---------------------------------------------------------------------------------------------------------------------
# The cache


def test_settings_do_not_share_a_cache(make, tmp_path, monkeypatch):
    """One path for all: every setting finds its own answers again, and no other's."""
    path = str(tmp_path / "cache_rank0.db")
    pairs = [(row["prompt"], " " + row["choices"][0]) for row in story.load()["test"]][:3]

    def ask(**arguments) -> tuple[list, list, int]:
        lm = make(**arguments)
        asked = []
        for name in ("generate_until", "loglikelihood"):
            method = getattr(lm, name)
            monkeypatch.setattr(lm, name, lambda requests, m=method: asked.extend(requests) or m(requests))
        cached = CachingLM(lm, path)
        said = cached.generate_until(questions(until=["zz"]))
        likely = cached.loglikelihood(instances("loglikelihood", pairs))
        cached.dbdict.close()
        return said, likely, len(asked)

    settings = [{}, {"denoising_steps_per_block": 1}, {"block_size": 8}, {"mc_num": 3}, {"mc_num": 3, "seed": 1}]
    first = [ask(**given) for given in settings]
    assert [asked for *_, asked in first] == [15] * 5
    assert first[0][0] != first[1][0] and first[0][1] != first[2][1] and first[3][1] != first[4][1]
    for given, (said, likely, _) in zip(settings, first, strict=True):
        assert ask(**given) == (said, likely, 0)
        assert ask(**given, max_active=2)[2] == 0  # changes no answer


def test_other_weights_do_not_share_a_cache(make, story_teacher, tmp_path):
    other = tmp_path / story_teacher.name
    lm = make()
    with torch.no_grad():
        lm.model.lm_head.weight.mul_(-1)
    lm.model.save_pretrained(other)
    lm.tokenizer.save_pretrained(other)
    assert make(pretrained=str(other)).fingerprint() != make().fingerprint()


# ---------------------------------------------------------------------------------------------------------------------
# The real harness


def test_the_declared_entry_points_lead_here():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["lm_eval.models"] == {command.NAME: command.TARGET}
    assert command.TARGET == f"{harness.__name__}:{harness.SDARHarness.__name__}"
    assert not {"lm_eval", "lm-eval"} & set(project.get("scripts", {})), "these commands are the harness's own"


def evaluated(line: list[str], output: Path, tasks: str, model_args: str, *more: str) -> tuple[dict, dict]:
    """Run the harness; its results, and the samples it logged by task."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    folder = "tests/integrations/lm_eval_tasks"
    options = ("--include_path", folder, "--output_path", str(output), "--log_samples", *more)
    line = [
        *line,
        "--model",
        "t3d_sdar",
        "--model_args",
        f"pretrained={TEACHER},{model_args}",
        "--tasks",
        tasks,
        *options,
    ]
    done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    (results,) = output.glob("*/results_*.json")
    samples = {}
    for task in tasks.split(","):
        (path,) = output.glob(f"*/samples_{task}_*.jsonl")
        rows = [json.loads(text) for text in path.read_text().splitlines()]
        samples[task] = sorted(rows, key=lambda row: row["doc_id"])
    return json.loads(results.read_text()), samples


def test_lm_eval_on_the_embedded_model(tmp_path):
    """Generation and multiple choice, as a user starts them."""
    line = [sys.executable, "-m", "t3d.integrations.lm_eval"]
    tasks = "t3d_story_generate,t3d_story_choice"
    model_args = "block_size=4,denoising_steps_per_block=4,mc_num=15"
    results, samples = evaluated(line, tmp_path, tasks, model_args, "--apply_chat_template")

    assert results["results"]["t3d_story_generate"]["exact_match,boxed"] >= 0.75
    assert results["results"]["t3d_story_choice"]["acc,none"] >= 0.75
    assert results["config"]["t3d"]["denoising_steps_per_block"] == 4 and results["config"]["model"] == "t3d_sdar"

    lm = harness.SDARHarness(pretrained=str(TEACHER), mc_num=15)
    given = {"until": ["Question:", "}."], "max_gen_toks": 96}
    rows = story.load()["test"]
    contexts = [lm.apply_chat_template([{"role": "user", "content": row["prompt"]}]) for row in rows]
    said = lm.generate_until(instances("generate_until", [(c, given) for c in contexts]), disable_tqdm=True)
    assert [row["resps"] for row in samples["t3d_story_generate"]] == [[[text]] for text in said]
    assert all("}." not in text for text in said)
    pairs = [(c, choice) for c, row in zip(contexts, rows, strict=True) for choice in row["choices"]]
    likely = lm.loglikelihood(instances("loglikelihood", pairs), disable_tqdm=True)
    logged = [float(value) for row in samples["t3d_story_choice"] for ((value, _),) in row["resps"]]
    assert logged == pytest.approx([value for value, _ in likely], rel=1e-4)


def test_a_mistake_is_one_line_and_exit_code_2(monkeypatch, capsys):
    """What the command does with the model's name and arguments, without the harness's own slow start."""
    arguments = {"pretrained": str(TEACHER), "blok_size": 4}, {"batch_size": 1, "device": "cuda:0"}
    monkeypatch.setattr(
        "lm_eval.__main__.cli_evaluate", lambda: get_model(command.NAME).create_from_arg_obj(*arguments)
    )
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("error: model_args blok_size=4: unknown; known are block_size, ")


@pytest.mark.slow
def test_two_processes_give_the_results_of_one(tmp_path):
    """With an odd number of documents, so that the harness pads a process's share; sampling and likelihoods."""
    tasks, model_args = "t3d_story_generate,t3d_story_choice,t3d_story_rolling", "mc_num=3,temperature=0.5"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
    ]
    launch += [
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        "--main_process_port",
        port,
        "-m",
        "t3d.integrations.lm_eval",
    ]
    limit = ("--limit", "7")
    two, samples = evaluated(launch, tmp_path / "two", tasks, model_args, *limit)
    one, expected = evaluated(
        [sys.executable, "-m", "t3d.integrations.lm_eval"], tmp_path / "one", tasks, model_args, *limit
    )
    assert [len(rows) for rows in samples.values()] == [7, 7, 7]
    for task, rows in samples.items():
        for mine, theirs in zip(rows, expected[task], strict=True):
            assert mine["doc_id"] == theirs["doc_id"] and mine["prompt_hash"] == theirs["prompt_hash"]
            if task == "t3d_story_generate":
                assert mine["resps"][0][0] == theirs["resps"][0][0]
    for task, scores in one["results"].items():
        for name, value in scores.items():
            if isinstance(value, float) and not math.isnan(value):
                assert two["results"][task][name] == pytest.approx(value, rel=1e-4), (task, name)
