"""The trunk's cache and shapes, the loader's strictness, and the strategies of this project on Llama."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from openvla_checkpoint import write_adapter, write_checkpoint, write_heads, write_json
from rsd.decoding.acceptance import acceptance_rule
from rsd.decoding.decoders import DECODERS
from rsd.decoding.primitives import Primitives
from rsd.decoding.state import EpisodeState, PolicyInput
from rsd.models.feature_drafter import DrafterConfig, FeatureDrafter
from rsd.targets.openvla.llama import Attend, Llama, LlamaConfig
from rsd.targets.openvla.loading import load_openvla
from rsd.targets.openvla.model import OpenVlaConfig, OpenVlaModel
from rsd.targets.openvla.target import OpenVlaTarget
from rsd.tokenizer.rfsq import RfsqConfig
from rsd.types import RsdError
from studies.openvla.bench_cases import full_config, random_model

SHARD = "model-00002-of-00002.safetensors"


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_heads(write_checkpoint(tmp_path_factory.mktemp("published")))


@pytest.fixture
def copy(published: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(published, tmp_path / "copy"))


@pytest.fixture(scope="module")
def llama() -> Llama:
    torch.manual_seed(0)
    return Llama(LlamaConfig(vocab_size=50, dim=32, layers=2, heads=4, mlp_dim=48)).eval()


@torch.inference_mode()
def test_passes_over_the_cache_are_one_causal_pass(llama: Llama) -> None:
    x = torch.randn(2, 9, 32)
    whole = llama(x, Attend(causal=True))
    cache = llama.new_cache(2, 9)
    parts = [llama(x[:, :5], Attend(causal=True), cache)]
    parts += [llama(x[:, index : index + 1], Attend(), cache) for index in range(5, 9)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-5)
    cache.truncate(6)
    torch.testing.assert_close(llama(x[:, 6:7], Attend(), cache), whole[:, 6:7], rtol=0, atol=1e-5)
    torch.testing.assert_close(llama(x, Attend(), keep=3), llama(x, Attend())[:, -3:], rtol=0, atol=1e-5)


@torch.inference_mode()
def test_a_split_prefix_does_not_depend_on_the_queries(llama: Llama) -> None:
    x = torch.randn(1, 7, 32)
    other = torch.cat([x[:, :5], torch.randn(1, 2, 32)], 1)
    mask = torch.ones(7, 7, dtype=torch.bool)
    mask[:5, 5:] = False
    split = llama(x, Attend(split=5))
    torch.testing.assert_close(split, llama(x, Attend(mask=mask)), rtol=0, atol=1e-5)
    torch.testing.assert_close(split[:, :5], llama(other, Attend(split=5))[:, :5], rtol=0, atol=1e-6)


def test_a_full_cache_and_a_long_sequence_are_errors(llama: Llama) -> None:
    cache = llama.new_cache(1, 4)
    with pytest.raises(RsdError, match="room for 4 positions, asked for 5"):
        llama(torch.randn(1, 5, 32), Attend(), cache)
    with pytest.raises(RsdError, match="sequence of 2049 positions: the language model has 2048"):
        llama(torch.randn(1, 2049, 32), Attend())


def edit_shard(directory: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    weights = load_file(directory / SHARD)
    change(weights)
    save_file(weights, directory / SHARD)


def edit_config(directory: Path, **changes: Any) -> None:
    content = json.loads((directory / "config.json").read_text())
    write_json(directory / "config.json", {**content, **changes})


NORM = "language_model.model.norm.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop(NORM), r"missing 1 \['language_model.model.norm.weight'\], unknown 0"),
        (lambda w: w.update(extra=torch.zeros(1)), r"unknown 1 \['extra'\]"),
        (lambda w: w.update({NORM: torch.zeros(31)}), r"norm.weight: expected \[32\], found \[31\]"),
        (lambda w: w[NORM].fill_(float("nan")), "language_model.norm holds NaN or infinity"),
    ],
)
def test_weights_that_do_not_fit_are_named(
    copy: Path, change: Callable[[dict[str, torch.Tensor]], None], message: str
) -> None:
    edit_shard(copy, change)
    with pytest.raises(RsdError, match=message):
        load_openvla(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llava"}, "model_type: expected 'openvla', found 'llava'"),
        ({"vision_backbone_id": "siglip-vit-so400m"}, "vision_backbone_id: expected 'dinosiglip-vit-so-224px'"),
        ({"text_config": {"num_attention_heads": 32, "num_key_value_heads": 8}}, "num_key_value_heads: expected 32"),
        ({"timm_model_kwargs": [{"depht": 1}, {}]}, "timm_model_kwargs"),
        ({"timm_model_kwargs": {"depth": 1}}, "timm_model_kwargs: expected two objects, found {'depth': 1}"),
        ({"timm_model_kwargs": [{"depth": 0}, {}]}, "timm_model_kwargs: field depth: expected an integer from 1"),
        ({"text_config": ["llama"]}, r"field text_config: expected an object, found \['llama'\]"),
        ({"text_config": {"hidden_size": "32"}}, "text_config: field dim: expected an integer from 1"),
        ({"text_config": {"num_attention_heads": 0}}, "text_config: field heads: expected an integer from 1"),
        ({"text_config": {"rope_parameters": {"rope_theta": [1]}}}, "field rope_theta: expected a number"),
        ({"n_action_bins": 256.0}, "field action_bins: expected an integer"),
    ],
)
def test_a_configuration_that_is_not_supported_is_named(copy: Path, change: dict[str, Any], message: str) -> None:
    edit_config(copy, **change)
    with pytest.raises(RsdError, match=message):
        load_openvla(copy)


def test_missing_and_damaged_files_are_named(copy: Path) -> None:
    head = copy / "action_head--150000_checkpoint.pt"
    torch.save({"model.fc1.weight": torch.zeros(1)}, head)
    with pytest.raises(RsdError, match=r"action_head--150000_checkpoint.pt: expected .*missing .*fc2.bias"):
        load_openvla(copy)
    torch.save({"weights": object()}, head)
    with pytest.raises(RsdError, match="not readable without unpickling"):
        load_openvla(copy)
    head.rename(copy / "action_head--1_checkpoint.pt")
    shutil.copy(copy / "action_head--1_checkpoint.pt", head)
    with pytest.raises(RsdError, match="expected one action_head file, found"):
        load_openvla(copy)
    for each in copy.glob("action_head--*"):
        each.unlink()
    (copy / SHARD).write_bytes((copy / SHARD).read_bytes()[:1000])
    with pytest.raises(RsdError, match="cut off or damaged"):
        load_openvla(copy)
    (copy / SHARD).unlink()
    with pytest.raises(RsdError, match=r"missing weights \['model-00002-of-00002.safetensors'\]"):
        load_openvla(copy)
    for shard in copy.glob("model*.safetensors"):
        shard.unlink()
    with pytest.raises(RsdError, match="no weights; expected model"):
        load_openvla(copy)


def test_an_adapter_needs_its_base_and_only_what_is_supported(tmp_path: Path, published: Path) -> None:
    run = write_adapter(tmp_path, "openvla/openvla-7b")
    with pytest.raises(RsdError, match=r"no merged weights.*the adapter says 'openvla/openvla-7b'"):
        load_openvla(run)
    settings = run / "lora_adapter" / "adapter_config.json"
    content = json.loads(settings.read_text())
    for change, said in (
        ({"use_dora": True}, "use_dora is True: not supported"),
        ({"r": "8"}, "adapter_config.json: field r: expected a number, found '8'"),
        ({"r": 0}, "expected a rank r of at least 1"),
        ({"lora_alpha": None}, "field lora_alpha: expected a number, found None"),
    ):
        write_json(settings, {**content, **change})
        with pytest.raises(RsdError, match=said):
            load_openvla(run, base=published)


def block_numbers(dim: int, mlp: int) -> int:
    """Parameters of a vision transformer's block: two norms, attention, MLP."""
    return 4 * dim + 4 * dim * dim + 4 * dim + 2 * dim * mlp + mlp + dim


def test_the_published_defaults_are_openvla_7b() -> None:
    content = {
        "model_type": "openvla",
        "vision_backbone_id": "dinosiglip-vit-so-224px",
        "image_resize_strategy": "resize-naive",
        "text_config": {"model_type": "llama", "vocab_size": 32064, "pad_token_id": 32000},
    }
    config = OpenVlaConfig.from_json(content, "config.json")
    assert config == OpenVlaConfig()
    with torch.device("meta"):
        model = OpenVlaModel(config)
    dino, siglip = (block_numbers(vit.dim, vit.mlp_dim) for vit in config.vision)
    pooling = 1152 + 4 * 1152**2 + 4 * 1152 + 2 * 1152 + 2 * 1152 * 4304 + 4304 + 1152
    unused = dino + 2 * 1024 + siglip + pooling + 2 * (1024 + 1152)  # last blocks, layer scales, pooling, norms
    assert sum(parameter.numel() for parameter in model.parameters()) + unused == 7_541_237_184  # openvla-7b's


@torch.inference_mode()
def test_every_strategy_runs_on_the_llama_trunk() -> None:
    code = RfsqConfig()
    openvla = random_model(full_config("tiny"), "cpu", torch.float32)
    target = OpenVlaTarget(openvla, code, horizon=8, motion_dim=6).eval()
    draft = FeatureDrafter(DrafterConfig(), code, 8, 6, openvla.config.llama.dim).eval()
    prompt = torch.tensor([[1, 40, 41]])
    seen = torch.randn(1, 2, 6, 56, 56), torch.zeros(1, 8), (prompt, prompt)
    prefix = target.embed_prefix(*seen)

    def decode(name: str, rule: str, fine: str) -> Any:
        ops = Primitives(target, draft, acceptance_rule(rule, code), fine)
        return DECODERS[name].decode(ops, PolicyInput(*seen), EpisodeState())

    ar = decode("ar", "exact", "sequential")
    assert ar.target_passes == 7
    assert torch.equal(decode("rsd", "exact", "sequential").motion, ar.motion)
    assert decode("rsd", "margin", "regress").target_passes == 1
    assert decode("l1", "margin", "regress").value.shape == (1, 48)

    features, cache = target.prefill(prefix)
    told, gripper = [torch.randn(1, 48) for _ in range(3)], torch.ones(1, 8, dtype=torch.long)
    after = [features, *target.extend(told, gripper, 2, cache)]
    at_once, _ = target.prefill_blocks(prefix, told, gripper)
    for one, other in zip(after, at_once, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
