"""Free text: likelihood under an autoregressive judge against transformers' own loss, and variety by hand."""

import json
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from t3d.cli import dispatch
from t3d.evaluation import judge as judge_module
from t3d.evaluation.judge import Judge, variety
from tests.conftest import raises_key
from tests.models.test_convert import convert, write
from tests.models.test_loading import word_tokenizer


def answers(*lengths):
    """Answers of random ids, each with a tail behind its end as decoding leaves it."""
    generator = torch.Generator().manual_seed(0)
    return [
        SimpleNamespace(
            id=f"q{i // 2}/{i % 2}",
            prompt_ids=torch.randint(60, (prompt,), generator=generator).tolist(),
            response_ids=torch.randint(60, (length + 3,), generator=generator).tolist(),
            length=length,
        )
        for i, (prompt, length) in enumerate(lengths)
    ]


LENGTHS = [(3, 5), (1, 9), (7, 1), (4, 4)]


def test_variety_by_hand():
    assert variety([[1, 2, 1, 2], [1, 2]]) == {"distinct_2": 2 / 4, "repetition": 0.0}
    # groups of 4 in 1 2 1 2 1 2: 1212, 2121, 1212
    assert variety([[1, 2, 1, 2, 1, 2]])["repetition"] == pytest.approx(1 / 3)
    assert variety([[7], []]) == {"distinct_2": 0.0, "repetition": 0.0}


@pytest.mark.parametrize("tokens", [1, 16, 4096])
def test_the_likelihood_is_transformers_loss_whatever_goes_side_by_side(tmp_path, monkeypatch, tokens):
    monkeypatch.setattr(judge_module, "TOKENS", tokens)
    monkeypatch.setattr(judge_module, "ROWS", 3)
    source = write(tmp_path / "ar")
    plain = AutoModelForCausalLM.from_pretrained(source)
    given = answers(*LENGTHS)
    expected = []
    for answer in given:
        ids = torch.tensor([answer.prompt_ids + answer.response_ids[: answer.length]])
        labels = ids.masked_fill(torch.arange(ids.shape[1]) < len(answer.prompt_ids), -100)
        expected.append(float(plain(ids, labels=labels).loss))
    reader = Judge(source, source)
    assert reader.per_token(given) == pytest.approx(expected, rel=1e-4)
    found = reader.measures(given)
    assert found["nll"] == pytest.approx(sum(expected) / 4, rel=1e-4)
    assert found["nll_low"] < found["nll"] < found["nll_high"]


def test_a_judge_of_other_tokens_is_refused(tmp_path):
    ours = write(tmp_path / "ours")
    other = write(
        tmp_path / "other", word_tokenizer(eos_token="<stop>", pad_token="<pad>", additional_special_tokens=["<x>"])
    )
    Judge(other, ours)  # it knows one token more
    swapped = write(tmp_path / "swapped", word_tokenizer(pad_token="<stop>", eos_token="<pad>"))
    with raises_key("evaluation.judge"):
        Judge(swapped, ours)


def test_the_command_measures_text(tmp_path, capsys):
    """A converted model's answers under the model that it was converted from, at two speeds."""
    folder = convert(write(tmp_path / "ar"), tmp_path / "bd")
    questions = tmp_path / "prompts.json"
    questions.write_text(json.dumps([{"question": f"w{i} w{i + 1}"} for i in range(3)]))
    dispatch(
        [
            "eval",
            f"evaluation.checkpoint_path={folder}",
            f"evaluation.eval_dataset={questions}",
            "evaluation.seeds=[1,2]",
        ]
        + ["evaluation.data_type=text", f"evaluation.judge={tmp_path / 'ar'}", "rollout.max_token=12"]
        + ["rollout.denoising_steps_per_block=2", f"evaluation.output={tmp_path / 'results.json'}"]
    )
    rows = json.loads((tmp_path / "results.json").read_text())
    assert [row["seed"] for row in rows] == [1, 2]
    for row in rows:
        assert row["nll_low"] <= row["nll"] <= row["nll_high"] and 0 < row["distinct_2"] <= 1 and "accuracy" not in row
    table = capsys.readouterr().out
    assert all(head in table for head in ("NLL/token", "Distinct 2-grams", "Repeated 4-grams", "Tokens"))


def test_a_report_of_text_has_a_table_and_a_chart(tmp_path, capsys):
    """Likelihood against speed, with the autoregressive model's row in the chart; the mean over seeds has its error."""
    rows = [
        {"method": method, "model": "m", "dataset": "prompts", "block_size": block, "tokens_per_step": float(speed)}
        | {"strategy": "low_confidence_static", "seed": seed, "n": 3, "nll": 2 + speed / 10 + seed / 100}
        | {"nll_low": 1.5, "nll_high": 4.0, "distinct_2": 0.5, "repetition": 0.1, "mean_length": 9.0}
        for method, block, speed in (("autoregressive", 1, 1), ("opdlm", 4, 1), ("opdlm", 4, 4))
        for seed in (1, 2)
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    dispatch(["report", str(tmp_path), "--html", str(tmp_path / "page.html")])
    table, page = capsys.readouterr().out, (tmp_path / "page.html").read_text()
    assert "2.415 ± 0.005" in table and "Accuracy" not in table
    assert page.count("<svg") == 1 and "NLL per token" in page and "autoregressive" in page
