"""The kernels that read the decoder's cache: grouped sdpa, and flash-attn by a stand-in of its documented semantics."""

import pytest
import torch
from torch._dynamo.utils import counters
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from t3d.blocks.settings import DecodeSettings
from t3d.blocks.strategy import names
from t3d.common.errors import UserError
from t3d.common.paths import ROOT
from t3d.decode import graphs as graphs_module
from t3d.decode.attention import CacheAttention, attend, block_ends, choose_attention
from t3d.decode.local import LocalEngine
from t3d.decode.runner import ModelRunner
from t3d.models.decoder import load_decoder
from t3d.models.loading import load_model
from tests.conftest import tiny_model
from tests.decode.flash import flash_attn_3_with_kvcache, flash_attn_with_kvcache
from tests.decode.test_local import engine, in_full, needs_capture, needs_gpu, requests

PLAIN = DecodeSettings(temperature=0.6, max_token=14, denoising_steps_per_block=2)
SETTINGS = [
    *(
        DecodeSettings(temperature=0.6, max_token=14, denoising_steps_per_block=2, remasking_strategy=s)
        for s in names()
    ),
    DecodeSettings(temperature=0.0, max_token=14, denoising_steps_per_block=1),
    DecodeSettings(temperature=0.6, max_token=14, block_size=8, denoising_steps_per_block=3),
    DecodeSettings(temperature=0.6, max_token=14, denoising_steps_per_block=1, block_size=1),
    DecodeSettings(temperature=0.6, max_token=14, denoising_steps_per_block=2, self_verify=True),
    DecodeSettings(temperature=0.6, max_token=14, denoising_steps_per_block=2, energy_candidates=3),
    DecodeSettings(temperature=0.6, max_token=14, denoising_steps_per_block=2, random_init_ratio=0.4),
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: f"{s.remasking_strategy}-B{s.block_size}")
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
def test_flash_attention_gives_the_trajectories_of_sdpa(model, settings, fused):
    """Prompts of several lengths on three lanes, which are refilled."""
    options = {"max_active": 3, "fused_commit": fused}
    expected = in_full(engine(model, **options).generate(requests(), settings, seed=5))
    flash = engine(model, attention=flash_attn_with_kvcache, **options)
    assert in_full(flash.generate(requests(), settings, seed=5)) == expected
    assert model.config._attn_implementation == "sdpa"


def test_the_interface_of_flash_attention_3(model):
    settings = DecodeSettings(temperature=0.6, max_token=14, denoising_steps_per_block=2)
    expected = in_full(engine(model).generate(requests(), settings, seed=5))
    flash = engine(model, attention=flash_attn_3_with_kvcache)
    assert in_full(flash.generate(requests(), settings, seed=5)) == expected


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
def test_a_block_is_a_sequence_and_a_fused_commit_is_two(model, fused):
    """A lane's blocks end where the block ends; nothing after a lane's own end is read, and shapes stay the same."""
    seen = []

    def watching(q, k_cache, v_cache, **options):
        ends, lanes = options["cache_seqlens"].view(len(k_cache), -1), len(k_cache)
        blocks = ends.shape[1]
        assert options["cache_batch_idx"].tolist() == [lane for lane in range(lanes) for _ in range(blocks)]
        assert (ends % 4 == 0).all()
        # of two blocks the finished one ends where the current one begins; a part that is idle sees the first block
        assert blocks == 1 or all(a == 4 or a + 4 == b for a, b in ends.tolist())
        after = torch.arange(k_cache.shape[1]) >= ends.max(1).values[:, None]
        keys, values = (x.masked_fill(after[:, :, None, None], torch.nan) for x in (k_cache, v_cache))
        seen.append((lanes, blocks, tuple(q.shape[1:]), k_cache.shape[1]))
        return flash_attn_with_kvcache(q, keys, values, **options)

    settings = DecodeSettings(temperature=0.0, max_token=14, denoising_steps_per_block=2)
    decoder = engine(model, max_active=3, fused_commit=fused, attention=watching)
    monitored = in_full(decoder.generate(requests(), settings, seed=5))
    assert monitored == in_full(engine(model, max_active=3, fused_commit=fused).generate(requests(), settings, seed=5))
    assert {blocks for _, blocks, *_ in seen} == ({1, 2} if fused else {1})
    assert len({tuple(shapes) for _, _, *shapes in seen}) == 1


def test_blocks_end_after_their_last_position():
    position = torch.tensor([[4, 5, 6, 7, 8, 9, 10, 11], [0, 1, 2, 3, 20, 21, 22, 23]])
    ends = block_ends(position, 4)
    assert ends.shape == (2, 2, 1, 1) and ends.dtype == torch.int32
    assert ends.flatten().tolist() == [8, 12, 4, 24]


@pytest.mark.parametrize("heads, groups", [(4, 1), (2, 2), (1, 4)])
def test_grouped_heads_equal_repeated_ones(heads, groups):
    """On a CPU, to the bit with the pinned PyTorch; 2.6 rounds otherwise."""
    torch.manual_seed(0)
    query = torch.randn(3, 4, heads * groups, 8).transpose(1, 2)
    key, value = torch.randn(2, 3, heads, 24, 8).unbind(0)
    mask = torch.where(torch.rand(3, 1, 4, 20) < 0.6, 0.0, -torch.inf)
    mask[..., 0] = 0
    module = torch.nn.Module()
    module.num_key_value_groups = groups
    found, _ = attend(module, query, key[:, :, :20], value[:, :, :20], mask, scaling=0.3)
    expected, _ = sdpa_attention_forward(module, query, key[:, :, :20], value[:, :, :20], mask, scaling=0.3)
    assert torch.equal(found, expected) if graphs_module.CAPTURES else torch.allclose(found, expected, atol=1e-6)
    meta, _ = attend(module, *(x.to("meta") for x in (query, key, value, mask.new_zeros(3, 1, 4, 24))), scaling=0.3)
    assert meta.shape == found.shape  # on other devices a group's queries are more rows


def test_the_choice():
    model = tiny_model()
    assert choose_attention(model, None) == choose_attention(model, "sdpa")
    assert not choose_attention(model, None).by_ends  # no CUDA device
    assert choose_attention(model, "eager") == CacheAttention("eager")
    for own in ("eager", "flex_attention"):
        model.set_attn_implementation(own)
        assert choose_attention(model, None) == CacheAttention(own)


def test_flash_attention_that_cannot_be_is_one_line():
    teacher = str(ROOT / "models" / "embedded-teacher")
    with pytest.raises(UserError) as error:
        load_decoder(teacher, attn_implementation="flash_attention_2", device="cpu")
    assert error.value.key == "rollout.attn_implementation"


def test_a_forward_that_fails_leaves_the_models_own_attention(model):
    def broken(*args, **kwargs):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError):
        list(engine(model, attention=broken).generate(requests(), DecodeSettings(max_token=8), seed=0))
    assert model.config._attn_implementation == "sdpa"


def real_decoder(attention: str | None, dtype: torch.dtype) -> LocalEngine:
    model = load_model(str(ROOT / "models" / "embedded-teacher"), dtype=dtype, device="cuda")
    return LocalEngine(model, mask_id=model.config.mask_token_id, stop_ids=[138], forbidden_ids=[], attention=attention)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
def test_the_real_kernel_computes_what_sdpa_does(fused):
    """In bf16: the hidden states of block forwards over lanes of several lengths, fused and not."""
    pytest.importorskip("flash_attn")
    states = {}
    for attention in ("sdpa", "flash_attention_2"):
        decoder, seen = real_decoder(attention, torch.bfloat16), []
        decoder.fused_commit = fused
        forward = ModelRunner.predicting

        def watching(runner, hidden, *rest, seen=seen, forward=forward):
            seen.append(hidden.float())
            return forward(runner, hidden, *rest)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ModelRunner, "predicting", watching)
            settings = DecodeSettings(temperature=0.0, denoising_steps_per_block=2, max_token=4)
            list(decoder.generate(requests(), settings, seed=0))
        states[attention] = seen
    first, second = (torch.cat([s.flatten() for s in states[name][:2]]) for name in states)
    torch.testing.assert_close(first, second, rtol=0.05, atol=0.05 * float(first.abs().max()))


@pytest.mark.gpu
@needs_gpu
def test_the_real_kernel_is_the_default():
    pytest.importorskip("flash_attn")
    assert real_decoder(None, torch.bfloat16).attention.by_ends
    assert not real_decoder(None, torch.float32).attention.by_ends
    settings = DecodeSettings(temperature=0.0, denoising_steps_per_block=2, max_token=24)
    found = [real_decoder(name, torch.bfloat16).generate(requests(), settings, seed=0) for name in (None, "sdpa")]
    flash, sdpa = ({r.id: r.response_ids for r in results} for results in found)
    same = sum(a == b for i in flash for a, b in zip(flash[i], sdpa[i], strict=False))
    assert same > 0.8 * sum(map(len, sdpa.values()))  # in half precision a tie may turn


def test_every_family_passes_the_ends_on():
    """The ends stand in the place of a mask: models of several families of transformers leave them alone."""
    from transformers import AutoModelForCausalLM

    from t3d.models.block_diffusion import block_diffusion_class
    from tests.models.test_families import FAMILIES, plain_config

    settings = DecodeSettings(temperature=0.0, max_token=8, denoising_steps_per_block=2)
    for kind in ("sdar_moe", "llama", "qwen2", "mistral", "smollm3", "gemma3_text", "olmo2"):
        base, own, said = FAMILIES[kind]
        config = plain_config(base, own)
        for name, value in {"block_size": 4, "logit_shift": False}.items():
            setattr(config, name, said.get(name, value))
        torch.manual_seed(0)
        cls = block_diffusion_class(AutoModelForCausalLM._model_mapping[type(config)])
        model = cls._from_config(config, attn_implementation="sdpa").eval()
        sdpa = in_full(engine(model, max_active=3).generate(requests(), settings, seed=5))
        flash = engine(model, max_active=3, attention=flash_attn_with_kvcache)
        assert in_full(flash.generate(requests(), settings, seed=5)) == sdpa, kind


# ---------------------------------------------------------------------------------------------------------------------
# Steps as graphs: captured by torch.compile, and run without its compiler


@pytest.fixture
def captured(monkeypatch):
    """torch.compile by the backend "eager", which takes every forward as one whole graph or raises."""
    compile = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda m, **kw: compile(m, backend="eager", fullgraph=True, **kw))
    torch._dynamo.reset()
    yield counters
    torch._dynamo.reset()


@needs_capture
@pytest.mark.parametrize("fused, graphs", [(True, 2), (False, 1)])
def test_flash_attention_leaves_few_shapes(model, captured, fused, graphs, caplog):
    """Any lengths, and a second call of as many lanes: a graph with commits and one without; each is logged."""
    captured.clear()
    expected = in_full(engine(model, max_active=3).generate(requests(), PLAIN, seed=5))
    options = {"max_active": 3, "fused_commit": fused, "attention": flash_attn_with_kvcache}
    decoder = engine(model, compile=True, **options)
    with caplog.at_level("INFO", "t3d.decode.graphs"):
        for _ in range(2):
            found = in_full(decoder.generate(requests(), PLAIN, seed=5))
    assert [answer[:3] for answer in found] == [answer[:3] for answer in expected]
    assert len(decoder.graphs.shapes) == captured["stats"]["unique_graphs"] == graphs == len(caplog.messages)


@needs_capture
def test_the_number_of_graphs_is_bounded(model, captured, monkeypatch, caplog):
    """Other numbers of lanes would be other graphs; beyond the bound a forward runs without one."""
    monkeypatch.setattr(graphs_module, "LIMIT", 2)
    captured.clear()
    decoder = engine(model, compile=True, max_active=8)
    for count in (8, 3, 5):
        expected = in_full(engine(model).generate(requests()[:count], PLAIN, seed=5))
        assert in_full(decoder.generate(requests()[:count], PLAIN, seed=5)) == expected
    assert len(decoder.graphs.shapes) == captured["stats"]["unique_graphs"] == 2
    assert any(record.levelname == "WARNING" for record in caplog.records)
