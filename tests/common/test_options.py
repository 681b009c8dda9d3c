import re

import pytest
import yaml

from t3d.blocks.settings import DecodeSettings
from t3d.blocks.strategy import names
from t3d.common import options
from t3d.common.errors import UserError
from t3d.common.options import load
from t3d.common.paths import ROOT
from t3d.evaluation.settings import AnalysisConfig, EvalConfig
from t3d.objectives.base import registered
from t3d.rollout.settings import SampleConfig
from t3d.training.settings import TrainConfig, presets
from tests.conftest import raises_key

SHIPPED = {
    "configs/sdar_sample.yaml": SampleConfig,
    "configs/eval.yaml": EvalConfig,
    "configs/ddo_sdar_full_self.yaml": TrainConfig,
    "configs/demo/sample.yaml": SampleConfig,
    "configs/demo/eval.yaml": EvalConfig,
    "configs/demo/train.yaml": TrainConfig,
    "configs/demo/teacher.yaml": TrainConfig,
    "configs/best.yaml": TrainConfig,
    "configs/demo/best.yaml": TrainConfig,
    "configs/opdlm.yaml": TrainConfig,
    **{str(path.relative_to(ROOT)): TrainConfig for path in sorted((ROOT / "configs" / "baselines").rglob("*.yaml"))},
}

# Every key of the release's three files, with its values. `learning_rate` of the scheduler is an interpolation there.
RELEASE_ROLLOUT = {
    "tensor_parallel_size": 1,
    "max_active": 256,
    "num_task_per_step": 1,
    "num_response_per_task": 1,
    "temperature": 0.1,
    "max_token": 2000,
    "block_size": 4,
    "denoising_steps_per_block": 4,
    "top_p": 1.0,
    "top_k": 0,
    "remasking_strategy": "low_confidence_static",
    "dynamic_threshold": 0.9,
    "start_with_think": False,
    "random_init_ratio": 0.0,
    "batch_size": 50,
}
RELEASE_EVALUATION = {
    "checkpoint_path": "/some/checkpoint",
    "eval_dataset": "MATH500",
    "data_type": "math",
    "num_node": 1,
    "node_index": 0,
    "output_unmasking_history": True,
}
RELEASE = {
    SampleConfig: {
        "experiment": {"project": "your_project"},
        "rollout": RELEASE_ROLLOUT,
        "evaluation": RELEASE_EVALUATION,
    },
    EvalConfig: {
        "experiment": {"project": "eval"},
        "model_base": "sdar",
        "rollout": RELEASE_ROLLOUT | {"max_active": 128, "temperature": 1.0, "denoising_steps_per_block": 1},
        "execute": {"num_chunk": 64},
        "evaluation": RELEASE_EVALUATION,
    },
    TrainConfig: {
        "wandb": {"entity": "your_entity", "project": "your_project", "resume": False, "run_id": None},
        "experiment": {
            "project": "ddo_sdar_full_self",
            "start_from_scratch": True,
            "num_node": 1,
            "save_every_steps": 256,
            "max_grad_norm": 1.0,
            "gradient_clipping": True,
            "checkpoints_total_limit": None,
        },
        "model": {"pretrained_model": "JetLM/SDAR-4B-Chat", "optimized_name": "optimized", "random_ratio": 0.1},
        "dataset": {"optimization_data": "SDAR-4B-Chat-MATH_train_renamed", "data_type": "math"},
        "training": {
            "gradient_checkpointing_enable": True,
            "gradient_accumulation_steps": 32,
            "batch_size_lm": 1,
            "mixed_precision": "bf16",
            "enable_tf32": True,
            "seed": 10086,
            "num_train_epochs": 30,
            "max_grad_norm": 1.0,
            "method": "semi-ar",
            "mask_strategy": "trace",
            "block_size": 8,
            "post_num": 2,
            "max_gen_length": 1024,
            "max_prompt_len": 512,
            "target_temp": 0.0,
            "reference_temp": 0.0,
            "alpha": 0.5,
            "beta": 0.1,
            "path_k_steps": 4,
            "lambda_path": 0.2,
            "mask_ratios": [1.0, 0.75, 0.5, 0.25],
            "mask_ratio_exponent": 8.0,
            "multi_round": True,
            "round_interval": 10,
        },
        "optimizer": {
            "name": "adamw",
            "params": {
                "learning_rate": 1e-5,
                "scale_lr": False,
                "beta1": 0.9,
                "beta2": 0.999,
                "weight_decay": 0.01,
                "epsilon": 1e-8,
            },
        },
        "lr_scheduler": {
            "scheduler": "cosine",
            "params": {
                "learning_rate": "${optimizer.params.learning_rate}",
                "warmup_steps": 20,
                "min_lr_scale": 0.1,
            },
        },
    },
}


def write(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(text if isinstance(text, str) else yaml.safe_dump(text))
    return f"config={path}"


def message(schema, *argv, **kwargs):
    with pytest.raises(UserError) as error:
        load(schema, argv, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


# --- defaults, files, order -------------------------------------------------------------------------------------------


def test_every_shipped_file_loads():
    assert {str(p.relative_to(ROOT)) for p in (ROOT / "configs").glob("*.yaml")} <= set(SHIPPED)
    for file, schema in SHIPPED.items():
        assert isinstance(load(schema, [f"config={file}"]), schema)


@pytest.mark.parametrize("file", ["configs/sdar_sample.yaml", "configs/eval.yaml"])
def test_shipped_file_states_the_defaults(file):
    assert load(SHIPPED[file], [f"config={file}"]) == SHIPPED[file]()


def test_shipped_training_file_states_the_defaults_and_leaves_the_presets_free():
    loaded = load(TrainConfig, [], default="configs/ddo_sdar_full_self.yaml")
    loaded.experiment.checkpoints_total_limit = loaded.training.tokens_per_batch = None
    assert loaded == TrainConfig()
    for file in ("configs/ddo_sdar_full_self.yaml", "configs/demo/train.yaml"):
        for name, values in presets(None).items():
            training = load(TrainConfig, [f"config={file}", f"training.preset={name}"]).training
            assert {key: getattr(training, key) for key in values} == values


@pytest.mark.parametrize("schema", RELEASE)
def test_every_key_of_the_release_loads_with_its_value(schema, tmp_path):
    loaded = options.to_dict(load(schema, [write(tmp_path, RELEASE[schema])]))

    def compare(given, got, path=""):
        for key, value in given.items():
            if isinstance(value, dict):
                compare(value, got[key], f"{path}{key}.")
            elif path + key not in schema.RELEASED:
                assert got[key] == value

    compare(RELEASE[schema], loaded)


def test_order_defaults_preset_file_command_line(tmp_path):
    file = write(tmp_path, "training: {preset: release, round_interval: 7}\n")
    training = load(TrainConfig, [file, "training.path_loss=rank"]).training
    assert (training.trace_order, training.block_size, training.instruction) == ("reversed", 8, False)  # preset
    assert training.round_interval == 7  # file
    assert training.path_loss == "rank"  # command line
    assert training.alpha == 0.5  # default
    assert load(TrainConfig, [file, "training.preset=algorithm1"]).training.round_interval == 7
    assert load(TrainConfig, ["training.preset=algorithm1"]).training.round_interval == 1
    assert load(TrainConfig, ["training.preset=algorithm1", "training.round_interval=3"]).training.round_interval == 3


def test_a_file_builds_on_another(tmp_path, monkeypatch):
    """Its values win over the base's, the command line's over both; a chain may have several links."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.yaml").write_text("training: {alpha: 0.1, beta: 0.2, lambda_path: 0.3}\n")
    (tmp_path / "b.yaml").write_text("base: a.yaml\ntraining: {beta: 0.4, preset: algorithm1}\n")
    (tmp_path / "c.yaml").write_text("training: {lambda_path: 0.5}\nbase: b.yaml\n")
    training = load(TrainConfig, ["config=c.yaml", "training.alpha=0.6"]).training
    assert (training.alpha, training.beta, training.lambda_path, training.round_interval) == (0.6, 0.4, 0.5, 1)
    (tmp_path / "a.yaml").write_text("base: c.yaml\n")
    assert message(TrainConfig, "config=c.yaml") == "config=c.yaml: base: c.yaml leads back to itself; leave it out"
    (tmp_path / "a.yaml").write_text("base: d.yaml\n")
    assert message(TrainConfig, "config=c.yaml").startswith("config=d.yaml: no such file")
    (tmp_path / "a.yaml").write_text("base: [d.yaml]\n")
    assert message(TrainConfig, "config=c.yaml") == "base=[d.yaml]: expected the name of a YAML file (in a.yaml)"
    (tmp_path / "a.yaml").write_text("training: {alhpa: 1}\n")
    assert message(TrainConfig, "config=c.yaml").endswith("did you mean training.alpha? (in a.yaml)")


def test_every_objective_has_its_two_files():
    """For a model of 4B and for the embedded teacher, where T3D's own is the demo's; each sets its objective."""
    for name in registered():
        large = "configs/opdlm.yaml" if name == "opdlm" else f"configs/baselines/{name}.yaml"
        assert load(TrainConfig, [f"config={large}"]).training.objective == name
        file = "configs/demo/train.yaml" if name == "t3d" else f"configs/baselines/demo/{name}.yaml"
        assert load(TrainConfig, [f"config={file}"]).training.objective == name


def test_best_is_one_recipe_for_both_sizes():
    sizes = [load(TrainConfig, [f"config=configs/{size}best.yaml"]) for size in ("", "demo/")]
    recipe = {(c.training.objective, c.training.likelihood_k, c.training.mask_ratio_exponent) for c in sizes}
    assert recipe == {("block_likelihood", 2.0, 3.0)} and {c.model.random_ratio for c in sizes} == {0.0}


def test_found_from_root_and_from_a_subfolder(monkeypatch):
    for folder, files in {
        ROOT: ["configs/eval.yaml"],
        ROOT / "configs" / "demo": ["configs/eval.yaml", "../eval.yaml", "../../configs/eval.yaml"],
    }.items():
        monkeypatch.chdir(folder)
        for file in files:
            assert load(EvalConfig, [f"config={file}"]) == EvalConfig()


def test_saved_configuration_loads_as_the_same(tmp_path):
    argv = [
        "training.preset=release",
        "training.mixed_precision=no",
        "training.mask_ratios=[1.0,0.5]",
        "model.dtype=bfloat16",
    ]
    first = load(TrainConfig, argv)
    options.save(first, tmp_path / "run" / "config.yaml")
    assert load(TrainConfig, [f"config={tmp_path}/run/config.yaml"]) == first


def test_values_of_the_command_line():
    loaded = load(
        SampleConfig,
        [
            "rollout.temperature=0",
            "rollout.batch_size=null",
            "evaluation.limit=16",
            "rollout.attn_implementation=sdpa",
            "evaluation.eval_dataset=a=b",
            "experiment.project=${evaluation.eval_dataset}-x",
        ],
    )
    assert loaded.rollout.temperature == 0.0 and loaded.rollout.batch_size is None
    assert loaded.evaluation.limit == 16 and loaded.experiment.project == "a=b-x"
    assert load(TrainConfig, ["optimizer.params.learning_rate=1e-4"]).optimizer.params.learning_rate == 1e-4
    assert load(TrainConfig, ["training.mixed_precision=no"]).training.mixed_precision == "no"


@pytest.mark.parametrize("text", ["007", "12:30:00", "1e5", "0x1F", "true", "no", "2026-01-02", "a: b", "run #2", "*x"])
def test_a_text_key_takes_text_as_it_is_written(text, tmp_path):
    loaded = load(TrainConfig, [f"experiment.run_name={text}"])
    assert loaded.experiment.run_name == text
    options.save(loaded, tmp_path / "config.yaml")
    assert load(TrainConfig, [f"config={tmp_path}/config.yaml"]).experiment.run_name == text
    for written, meant in ((f"'{text}'", text), (f'"{text}"', text), ("null", None)):
        assert load(TrainConfig, [f"experiment.run_name={written}"]).experiment.run_name == meant


@pytest.mark.parametrize("tokens", [["--local_rank=1"], ["--local-rank=1"], ["--local_rank", "1"]])
def test_the_local_rank_that_a_launcher_adds_is_accepted(tokens):
    assert load(SampleConfig, [*tokens, "rollout.seed=3"]).rollout.seed == 3
    assert load(SampleConfig, ["rollout.seed=3", *tokens]).rollout.seed == 3


def test_several_data_sets_as_text_or_as_a_list(tmp_path):
    for given in ("A,B", "[A,B]"):
        assert load(EvalConfig, [f"evaluation.eval_dataset={given}"]).evaluation.eval_dataset == "A,B"
    file = write(tmp_path, {"evaluation": {"eval_dataset": ["A", "B"], "seeds": [1, 2]}})
    loaded = load(EvalConfig, [file])
    assert loaded.evaluation.eval_dataset == "A,B" and loaded.evaluation.seeds == [1, 2]
    for given in ("[]", "[1,2]", "[[A],B]"):
        assert "expected text" in message(EvalConfig, f"evaluation.eval_dataset={given}")
    assert "expected text" in message(SampleConfig, "evaluation.eval_dataset=[A,B]")


def test_an_empty_file_and_empty_sections_change_nothing(tmp_path):
    assert load(SampleConfig, [write(tmp_path, "")]) == SampleConfig()
    assert load(SampleConfig, [write(tmp_path, "rollout:\nevaluation: {}\n")]) == SampleConfig()


def test_decode_settings_are_the_plain_record():
    settings = load(EvalConfig, ["rollout.block_size=8", "rollout.eb_threshold=0.3"]).rollout.decode_settings()
    assert type(settings) is DecodeSettings
    assert (settings.block_size, settings.eb_threshold, settings.denoising_steps_per_block) == (8, 0.3, 1)


def test_clip_norm():
    assert load(TrainConfig, []).clip_norm == 1.0
    assert load(TrainConfig, ["experiment.max_grad_norm=0.5", "training.max_grad_norm=1.0"]).clip_norm == 0.5
    assert load(TrainConfig, ["experiment.gradient_clipping=false"]).clip_norm is None


# --- help -------------------------------------------------------------------------------------------------------------


def shown(schema, *argv, capsys):
    with pytest.raises(SystemExit) as exit:
        load(schema, argv, default="configs/eval.yaml")
    assert exit.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: ") and "configs/eval.yaml" in text
    assert all(len(line) <= 120 for line in text.splitlines())
    return text


@pytest.mark.parametrize("schema", [SampleConfig, EvalConfig, TrainConfig, AnalysisConfig])
def test_help_all_explains_every_key(schema, capsys):
    text = shown(schema, "no.such=1", "--help-all", capsys=capsys)
    for key, item in options._items(schema()).items():
        assert f"  {key}=" in text
        assert item.limits.get("help"), f"{key} has no help"
    if "USUAL" not in vars(schema):
        assert text == shown(schema, "--help", capsys=capsys)
    if schema is TrainConfig:
        assert "  algorithm1: round_interval=1\n" in text
    elif schema is not AnalysisConfig:
        default = "1.0" if schema is EvalConfig else "0.1"
        assert f"rollout.temperature={default}  (a number, at least 0)" in text


@pytest.mark.parametrize("schema", [SampleConfig, EvalConfig, TrainConfig])
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_explains_the_usual_keys_and_names_the_others(schema, flag, capsys):
    text, everything = shown(schema, flag, capsys=capsys), shown(schema, "--help-all", capsys=capsys)
    items = options._items(schema())
    explained = [key for key in items if f"  {key}=" in text]
    assert set(explained) == set(schema.USUAL) and len(explained) == len(schema.USUAL) < len(items) / 1.5
    assert "--help-all" in text and text.count("\n") < everything.count("\n") / 1.3
    for key in items.keys() - set(explained):
        assert re.search(rf"[ ,]{key.rpartition('.')[2]}(,|\n)", text)
    for section in {key.rpartition(".")[0] for key in items}:  # in a section the usual keys come first
        keys = re.findall(rf"^  ({re.escape(section)}\.\w+)=", everything, re.M)
        assert sorted(keys, key=lambda key: key not in schema.USUAL) == keys


# --- what is wrong ----------------------------------------------------------------------------------------------------

TASK_KINDS = "math, code, option, text, or my_module:MyTask"
STRATEGIES = ", ".join([*names(), "or module:Object"])


@pytest.mark.parametrize(
    ("schema", "override", "expected"),
    [
        # unknown keys
        (TrainConfig, "training.block_siez=8", "unknown key; did you mean training.block_size?"),
        (SampleConfig, "temperature=1", "unknown key; did you mean rollout.temperature?"),
        (SampleConfig, "rolout.top_k=1", "unknown key; did you mean rollout.top_k?"),
        (SampleConfig, "rollout.top_k.x=1", "unknown key; did you mean rollout.top_k?"),
        (SampleConfig, "qqqq=1", "unknown key; --help lists all keys"),
        (SampleConfig, "execute.num_chunk=1", "unknown key; --help lists all keys"),
        # types
        (SampleConfig, "rollout.block_size=four", "expected a whole number, for example rollout.block_size=4"),
        (SampleConfig, "rollout.block_size=4.5", "expected a whole number, for example rollout.block_size=4"),
        (SampleConfig, "rollout.block_size=null", "expected a whole number, for example rollout.block_size=4"),
        (SampleConfig, "rollout.max_active=true", "expected a whole number, for example rollout.max_active=256"),
        (SampleConfig, "evaluation.limit=some", "expected a whole number or null"),
        (EvalConfig, "rollout.temperature=hot", "expected a number, for example rollout.temperature=1.0"),
        (SampleConfig, "rollout.fused_commit=perhaps", "expected true or false, for example rollout.fused_commit=true"),
        (SampleConfig, "evaluation.data_type=[math]", "expected text, for example evaluation.data_type=math"),
        (
            TrainConfig,
            "training.mask_ratios=1.0",
            "expected a list of numbers, for example training.mask_ratios=[1.0, 0.75, 0.5, 0.25]",
        ),
        (
            TrainConfig,
            "training.mask_ratios=[[1.0]]",
            "expected a list of numbers, for example training.mask_ratios=[1.0, 0.75, 0.5, 0.25]",
        ),
        (
            TrainConfig,
            "training.mask_ratios=[1.0, x]",
            "expected a list of numbers, for example training.mask_ratios=[1.0, 0.75, 0.5, 0.25]",
        ),
        (
            SampleConfig,
            "evaluation=5",
            "is a section; set one of its keys: checkpoint_path, eval_dataset, data_type, num_node, node_index, "
            "output_unmasking_history, limit",
        ),
        # impossible values
        (SampleConfig, "rollout.block_size=0", "must be at least 1"),
        (
            SampleConfig,
            "rollout.denoising_steps_per_block=5",
            "more steps than the block has positions; at most block_size=4",
        ),
        (SampleConfig, "rollout.denoising_steps_per_block=0", "must be at least 1"),
        (SampleConfig, "rollout.temperature=-0.1", "must be at least 0"),
        (SampleConfig, "rollout.temperature=nan", "must be a finite number"),
        (SampleConfig, "rollout.top_p=0.0", "must be above 0 and at most 1"),
        (SampleConfig, "rollout.top_p=1.5", "must be above 0 and at most 1"),
        (SampleConfig, "rollout.top_k=-1", "must be at least 0"),
        (SampleConfig, "rollout.max_token=0", "must be at least 1"),
        (SampleConfig, "rollout.remasking_strategy=greedy", f"must be one of {STRATEGIES}"),
        (
            SampleConfig,
            "rollout.remasking_strategy=low_confidence_statik",
            f"must be one of {STRATEGIES}; did you mean low_confidence_static?",
        ),
        (
            SampleConfig,
            "evaluation.data_type=maths",
            "must be one of math, code, option, text, or my_module:MyTask; did you mean math?",
        ),
        (SampleConfig, "evaluation.node_index=1", "nodes count from 0; must be below evaluation.num_node=1"),
        (
            EvalConfig,
            "model_base=lada",
            "must be one of a2d, dream, fast_dllm, llada, llada2, sdar, sdar_moe, or module:Object",
        ),
        (EvalConfig, "rollout.engine=vllm", "must be one of local, sglang"),
        (TrainConfig, "training.block_size=0", "must be at least 1"),
        (TrainConfig, "training.alpha=-1.0", "must be at least 0"),
        (TrainConfig, "training.ema_decay=1.5", "must be above 0 and below 1"),
        (TrainConfig, "training.lora=16", "is a section; set one of its keys: rank, alpha, dropout, target_modules"),
        (
            TrainConfig,
            "training.lora.target_modules=q_proj",
            "expected a list of names or null",
        ),
        (TrainConfig, "training.mask_ratios=[]", "give at least one ratio, for example training.mask_ratios=[1.0]"),
        (TrainConfig, "training.preset=paper", "must be one of t3d, algorithm1, release"),
        (TrainConfig, "training.max_gen_length=0", "must be at least 1"),
        (TrainConfig, "optimizer.params.learning_rate=0.0", "must be above 0"),
        (TrainConfig, "optimizer.params.beta1=1.0", "must be at least 0 and below 1"),
        (
            SampleConfig,
            "rollout.tensor_parallel_size=8",
            "the local engine loads a whole model per process; leave it at 1",
        ),
        (SampleConfig, "rollout.random_init_ratio=1.1", "must be at least 0 and at most 1"),
        (
            TrainConfig,
            "training.likelihood_k=2.0",
            "works only with training.objective=block_likelihood; leave it out",
        ),
    ],
)
def test_a_wrong_override_is_one_line(schema, override, expected):
    assert message(schema, override) == f"{override}: {expected}"


def test_two_keys_that_do_not_go_together_name_the_other_one():
    for objective in ("sft", "redi"):
        text = message(TrainConfig, "training.t_max=0.01", f"training.objective={objective}")
        assert text == "training.t_min=0.05: must not be above training.t_max=0.01"


@pytest.mark.parametrize(
    ("schema", "override"),
    [
        (SampleConfig, "rollout.num_task_per_step=2"),
        (TrainConfig, "training.method=trace"),
        (TrainConfig, "training.target_temp=1.0"),
        (TrainConfig, "training.max_grad_norm=0.5"),
        (TrainConfig, "optimizer.name=sgd"),
        (TrainConfig, "optimizer.params.scale_lr=true"),
        (TrainConfig, "lr_scheduler.params.learning_rate=0.1"),
        (TrainConfig, "lr_scheduler.params.learning_rate=${optimizer.params.beta1}"),
        (TrainConfig, "experiment.start_from_scratch=false"),
    ],
)
def test_a_released_key_that_asks_for_something_else_is_refused(schema, override):
    key = override.partition("=")[0]
    assert key in schema.RELEASED
    with raises_key(key) as error:
        load(schema, [override])
    assert str(error.value).endswith(schema.RELEASED[key].remedy)


@pytest.mark.parametrize(
    "line",
    [
        ["experiment.max_grad_norm=0.5", "training.max_grad_norm=0.5"],
        ["training.max_grad_norm=null"],
        ["optimizer.params.learning_rate=0.1", "lr_scheduler.params.learning_rate=0.1"],
        ["lr_scheduler.params.learning_rate=null"],
        ["experiment.start_from_scratch=false", "experiment.resume=auto"],
        ["experiment.num_node=4"],
    ],
)
def test_a_released_key_that_changes_nothing_is_accepted(line):
    live = [override for override in line if override.partition("=")[0] not in TrainConfig.RELEASED]
    assert load(TrainConfig, line) == load(TrainConfig, live)


def test_each_item_of_a_list_is_checked():
    text = message(TrainConfig, "training.mask_ratios=[1.0,0.0]")
    assert text == "training.mask_ratios=0.0: must be above 0 and at most 1"


@pytest.mark.parametrize(
    ("token", "expected"),
    [
        ("foo", "foo: not understood; write key=value, for example rollout.block_size=4, or --help"),
        ("=1", "=1: not understood; write key=value, for example rollout.block_size=4, or --help"),
        ("--limit=4", "--limit=4: not understood; write key=value, for example rollout.block_size=4, or --help"),
        ("rollout.seed=[1", "rollout.seed=[1: the value is malformed; check its brackets and quotes"),
        ("config=", "config=: no file; write config=FILE"),
        ("config=x.yaml", f"config=x.yaml: no such file (looked in {ROOT})"),
        ("config=configs", f"config=configs: no such file (looked in {ROOT})"),
    ],
)
def test_a_malformed_token_is_one_line(token, expected):
    assert message(SampleConfig, token) == expected


def test_two_files():
    assert (
        message(SampleConfig, "config=a.yaml", "config=b.yaml")
        == "config=b.yaml: config= is given twice; give one file"
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("rollout:\n  block_siez: 8\n", "rollout.block_siez=8: unknown key; did you mean rollout.block_size? (in {})"),
        ("rolout:\n  top_k: 8\n", "rolout.top_k=8: unknown key; did you mean rollout.top_k? (in {})"),
        (
            "rollout: {block_size: x}\n",
            "rollout.block_size=x: expected a whole number, for example rollout.block_size=4",
        ),
        (
            "rollout: {block_size: {a: 1}}\n",
            "rollout.block_size={{'a': 1}}: expected a whole number, for example rollout.block_size=4",
        ),
        ("rollout: {block_size: 0}\n", "rollout.block_size=0: must be at least 1"),
        ("- 1\n- 2\n", "config={}: holds a list; write `section:` and below it `key: value`"),
        ("rollout: [1,\n", "config={}: not valid YAML in line 2: "),
        ("a: 1\na: 2\n", "config={}: not valid YAML in line 2: found duplicate key a"),
        (
            "experiment: {project: '${nowhere.at}'}\n",
            "experiment.project=${{nowhere.at}}: Interpolation key 'nowhere.at' not found; write the value itself",
        ),
        ("experiment: {project: '???'}\n", "experiment.project=???: expected text"),
        ("rollout: {block_size: '${experiment.project}'}\n", "rollout.block_size=${{experiment.project}}: "),
    ],
)
def test_a_wrong_file_is_one_line(text, expected, tmp_path):
    file = write(tmp_path, text)
    assert message(SampleConfig, file).startswith(expected.format(file.removeprefix("config=")))


def test_unreadable_file(tmp_path):
    (tmp_path / "config.yaml").write_bytes(b"\xff\xfe\x00a")
    assert message(SampleConfig, f"config={tmp_path}/config.yaml").startswith(f"config={tmp_path}/config.yaml: ")


# --- accelerate's files -----------------------------------------------------------------------------------------------


def test_accelerate_files_leave_precision_and_clipping_to_the_training_config():
    config_args = pytest.importorskip("accelerate.commands.config.config_args")
    files = sorted((ROOT / "accelerate_configs").glob("*.yaml"))
    assert "1_node_8_gpus_deepspeed_zero1.yaml" in {file.name for file in files}
    for file in files:
        loaded = config_args.load_config_from_file(str(file))
        assert loaded.mixed_precision == "no"
        if loaded.deepspeed_config:
            assert loaded.deepspeed_config["gradient_clipping"] == "auto"
            assert loaded.deepspeed_config["gradient_accumulation_steps"] == 1
            assert loaded.deepspeed_config["offload_optimizer_device"] == "none"
            assert f"zero{loaded.deepspeed_config['zero_stage']}" in file.name


def test_answers_shorter_than_a_block_are_refused():
    with raises_key("training.max_gen_length", "=3", "training.block_size=4"):
        load(TrainConfig, ["training.max_gen_length=3", "training.block_size=4"])


def test_a_key_that_the_objective_does_not_read_is_refused():
    states = ("mask_ratios=[1.0]", "mask_ratio_exponent=1.0", "mask_strategy=random")
    states += ("block_grid=response", "trace_order=reversed")
    loss = ("path_loss=levels", "path_k_steps=2", "round_interval=5", "multi_round=false", "reference_offload=true")
    unread = {name: states + loss for name in ("dparallel", "redi", "sft")} | {"naive_td": loss}
    unread["sft"] += ("post_num=1",)
    for objective, keys in unread.items():
        for key in keys:
            said = message(TrainConfig, f"training.objective={objective}", f"training.{key}")
            assert said.startswith(f"training.{key}: works only with training.objective=") and "t3d" in said
            load(TrainConfig, [f"training.{key}"])
    for preset, key in {"release": "path_loss=levels", "algorithm1": "round_interval=1"}.items():
        said = message(TrainConfig, "training.objective=naive_td", f"training.preset={preset}")
        assert said == f"training.preset={preset}: its {key} works only with training.objective=t3d; leave it out"


def test_refresh_keys_need_a_refresh():
    for key in ("steps_per_block=2", "temperature=0.5", "random_init_ratio=0.5", "max_active=8"):
        said = message(TrainConfig, f"training.refresh_{key}")
        assert said.startswith(f"training.refresh_{key}: works only with refreshed trajectories; set training.refresh")
        load(TrainConfig, [f"training.refresh_{key}", "training.refresh_rollouts=5"])
    more = ("training.block_size=4", "training.refresh_rollouts=5")
    said = message(TrainConfig, *more, "training.refresh_steps_per_block=5")
    assert said.endswith("=5: more steps than the block has positions; set at most training.block_size=4")


def test_own_states_and_levels_do_not_go_together():
    with raises_key("training.path_states"):
        load(TrainConfig, ["training.path_states=own", "training.path_loss=levels"])


def test_an_objective_without_any_term_is_told():
    off = ("training.ddo_weight=0", "training.lambda_path=0")
    with raises_key("training.ddo_weight", "forward_kl_weight", "lambda_path"):
        load(TrainConfig, off)
    assert load(TrainConfig, [*off, "training.forward_kl_weight=1"]).training.forward_kl_weight == 1
