"""OpenVLA-OFT checkpoints as they lie on their users' disks: unmerged, wrapped, of other robots."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from openvla_checkpoint import (
    DIM,
    block_image,
    draw,
    statistics,
    write_adapter,
    write_checkpoint,
    write_heads,
    write_json,
)
from rsd.evaluation.backend import describe_checkpoint
from rsd.evaluation.config import EvalConfig
from rsd.targets.openvla.loading import load_openvla
from rsd.targets.openvla.model import OpenVlaModel
from rsd.targets.openvla.policy import OpenVlaPolicy
from rsd.targets.openvla.published import Settings
from rsd.types import Observation, RsdError

SEEN = Observation(np.stack([block_image(1, 256), block_image(2, 256)]), np.zeros(8, np.float32), "pick up the bowl")
HEAD, PROPRIO = "action_head--150000_checkpoint.pt", "proprio_projector--150000_checkpoint.pt"
SHARD = "model-00002-of-00002.safetensors"
Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("base"))


@pytest.fixture
def copy(base: Path, tmp_path: Path) -> Path:
    return write_heads(Path(shutil.copytree(base, tmp_path / "oft")))


def renamed(path: Path, name: Callable[[str], str]) -> None:
    if path.suffix == ".pt":
        torch.save({name(key): value for key, value in torch.load(path, weights_only=True).items()}, path)
    else:
        save_file({name(key): value for key, value in load_file(path).items()}, path)


def test_an_adapter_of_all_linear_layers_has_the_output_matrix_itself(base: Path, tmp_path: Path) -> None:
    plain = load_openvla(write_adapter(tmp_path / "plain", "base"), base=base)
    whole = load_openvla(run := write_adapter(tmp_path / "run", "base", lm_head=True), base=base)
    name, rank = "language_model.lm_head.weight", 4
    b, a = draw(name + "B", whole.config.llama.vocab_size, rank, scale=0.05), draw(name + "A", rank, DIM)
    added = whole.language_model.lm_head.weight - plain.language_model.lm_head.weight
    np.testing.assert_allclose(added.detach().numpy(), 8 / rank * b @ a, atol=1e-5)
    for (key, one), other in zip(plain.named_parameters(), whole.parameters(), strict=True):
        assert torch.equal(one, other) == ("lm_head" not in key)
    adapter = run / "lora_adapter/adapter_model.safetensors"
    renamed(adapter, lambda key: f"module.{key}".replace(".lora_A.", ".lora_A.default."))
    again = load_openvla(run, base=base)
    assert torch.equal(again.language_model.lm_head.weight, whole.language_model.lm_head.weight)
    renamed(adapter, lambda key: key.replace("lm_head.base_layer", "lm_tail.base_layer"))
    with pytest.raises(RsdError, match="unknown tensor base_model"):
        load_openvla(run, base=base)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_names_of_wrapped_modules_are_the_plain_ones(copy: Path, prefix: str) -> None:
    wanted = OpenVlaPolicy.from_pretrained(copy).predict(SEEN).actions
    for path in (copy / HEAD, copy / PROPRIO, *copy.glob("model-*")):
        renamed(path, lambda key: prefix + key.removeprefix("module."))
    np.testing.assert_array_equal(OpenVlaPolicy.from_pretrained(copy).predict(SEEN).actions, wanted)
    save_file({"a.b": torch.zeros(1), f"{prefix}a.b": torch.zeros(1)}, copy / SHARD)
    with pytest.raises(RsdError, match="holds tensors twice"):
        OpenVlaPolicy.from_pretrained(copy)


def test_a_chunk_of_another_length_goes_by_the_data_set_or_is_asked_for(copy: Path) -> None:
    (copy / PROPRIO).unlink()
    write_json(copy / "rsd_openvla.json", {"cameras": 1})
    write_json(copy / "dataset_statistics.json", statistics("bridge_orig"))
    bridge = OpenVlaPolicy.from_pretrained(copy)
    assert bridge.predict(SEEN).actions.shape == (5, 7)
    assert bridge.features(SEEN).shape == (35, DIM)
    write_json(copy / "dataset_statistics.json", statistics("my_kitchen"))
    with pytest.raises(RsdError, match=r"nor do the names of its data sets, my_kitchen: write {\"chunk\": 8}"):
        OpenVlaPolicy.from_pretrained(copy)
    write_json(copy / "rsd_openvla.json", {"cameras": 1, "chunk": 6, "unnorm_key": "my_kitchen"})
    assert OpenVlaPolicy.from_pretrained(copy).predict(SEEN).actions.shape == (6, 7)
    assert describe_checkpoint(EvalConfig(policy=str(copy), decode="l1"))["execute"] == 6
    assert Settings.load(copy).resolve(copy).chunk == 6


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (
            HEAD,
            {"model.fc2.weight": (14, DIM), "model.fc2.bias": (14,)},
            r"actions of 7 .*found 14, of two arms \(ALOHA",
        ),
        (PROPRIO, {"fc1.weight": (DIM, 14)}, r"a state of 8 .*found 14, of two arms \(ALOHA"),
        (PROPRIO, {"fc1.weight": (DIM, 7)}, r"a state of 8 .*found 7, of another robot \(Bridge"),
    ],
)
def test_other_robots_are_refused_by_name(copy: Path, file: str, change: dict[str, Any], message: str) -> None:
    weights = torch.load(copy / file, weights_only=True)
    torch.save({**weights, **{f"module.{name}": torch.zeros(shape) for name, shape in change.items()}}, copy / file)
    with pytest.raises(RsdError, match=message):
        OpenVlaPolicy.from_pretrained(copy)


def test_a_shard_that_is_a_pointer_of_git_lfs_is_named(copy: Path) -> None:
    (copy / SHARD).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    with pytest.raises(RsdError, match=f"{SHARD}: this is a git-lfs pointer"):
        OpenVlaPolicy.from_pretrained(copy)
    assert json.loads((copy / "config.json").read_text())["model_type"] == "openvla"


def test_a_loaded_model_can_be_prepared(copy: Path) -> None:
    def silenced(model: OpenVlaModel) -> None:
        torch.nn.init.zeros_(model.language_model.lm_head.weight)

    policy = OpenVlaPolicy.from_pretrained(copy, prepare=silenced)
    assert not policy.model.language_model.lm_head.weight.any()
