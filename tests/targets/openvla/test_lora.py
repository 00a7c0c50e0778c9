"""Low-rank updates beside frozen weights: nothing at first, merged as trained, readable as PEFT's adapters are."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from openvla_checkpoint import write_checkpoint
from rsd.models.trunk import KVCache
from rsd.targets.openvla.llama import Attend
from rsd.targets.openvla.loading import load_openvla, merge_adapter
from rsd.targets.openvla.lora import Adapter, LoraConfig
from rsd.targets.openvla.model import OpenVlaModel
from rsd.types import RsdError


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("base"))


def hidden(model: OpenVlaModel) -> Tensor:
    torch.manual_seed(1)
    pixels, prompt = torch.randn(1, 1, 6, 224, 224), torch.tensor([[1, 40, 41, 29871]])
    with torch.no_grad():
        return model.action_hidden(model.embed_prefix(model.embed_images(pixels), prompt))


def randomise(adapter: Adapter) -> None:
    with torch.no_grad():
        for item in adapter.wrapped:
            item.layer.update.b.normal_(0.0, 0.1)


@pytest.mark.parametrize("vision", [False, True])
def test_updates_begin_as_nothing_and_merge_as_they_are(base: Path, tmp_path: Path, vision: bool) -> None:
    model = load_openvla(base)
    plain, adapter = hidden(model), Adapter(model, LoraConfig(rank=3, alpha=6.0, vision=vision))
    torch.testing.assert_close(hidden(model), plain, rtol=0, atol=0)
    randomise(adapter)
    updated = hidden(model)
    assert (updated - plain).abs().max() > 0.05
    adapter.merge()
    torch.testing.assert_close(hidden(model), updated, rtol=0, atol=2e-5)
    assert not any("update" in name for name, _ in model.named_parameters())

    adapter.save(tmp_path, "base")
    other = load_openvla(base)
    merge_adapter(other, tmp_path)
    torch.testing.assert_close(hidden(other), updated, rtol=0, atol=2e-5)


def test_every_matrix_of_the_trunk_is_named_as_published(base: Path) -> None:
    model = load_openvla(base)
    published = {name for item in Adapter(model, LoraConfig(rank=2)).wrapped for name in item.published}
    parts = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
    parts += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    layers = range(len(model.language_model.layers))
    assert published == {f"language_model.model.layers.{i}.{part}.weight" for i in layers for part in parts}


def test_rank_and_scale_are_checked() -> None:
    for wrong in ({"rank": 0}, {"alpha": 0.0}):
        with pytest.raises(RsdError, match=r"(rank|alpha): expected"):
            LoraConfig(**wrong)  # type: ignore[arg-type]


def test_checkpointing_changes_no_gradient(base: Path) -> None:
    """Over a growing cache: a prefix, then more positions, as training does it."""
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = load_openvla(base).requires_grad_(False)
        adapter, llama = Adapter(model, LoraConfig(rank=3)), model.language_model
        randomise(adapter)
        llama.checkpointing = checkpointing
        torch.manual_seed(2)
        first, more = torch.randn(2, 7, llama.config.dim), torch.randn(2, 3, llama.config.dim)
        cache = KVCache()
        before = llama(first, Attend(split=5), cache)
        assert cache.length == 7
        after = llama(more, Attend(), cache)
        (before.square().sum() + after.sin().sum()).backward()
        gradients.append([parameter.grad for parameter in adapter.updates.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        assert plain is not None
        torch.testing.assert_close(checkpointed, plain, rtol=1e-4, atol=1e-5)


def test_a_cache_written_in_place_is_refused_in_training(base: Path) -> None:
    llama = load_openvla(base).language_model
    llama.checkpointing = True
    with pytest.raises(RsdError, match="no gradient survives; use a KVCache"):
        llama(torch.randn(1, 2, llama.config.dim), Attend(), llama.new_cache(1, 2))
