"""Every training's step, forward and backward, is recorded on a GPU: nothing in it may come from the host."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rsd.models.bundle import PolicyConfig
from rsd.training.config import LossConfig, TrainCorrectorConfig
from rsd.training.corrector import train_corrector
from rsd.training.loop import LoopConfig
from rsd.training.policy import TrainDrafterConfig, TrainPolicyConfig, train_drafter, train_policy
from rsd.training.tokenizer import TrainTokenizerConfig, train_tokenizer


@pytest.mark.gpu
def test_policy_drafters_and_corrector_train_on_a_gpu(
    demonstrations: Path, tiny_config: PolicyConfig, tmp_path: Path
) -> None:
    train_tokenizer(TrainTokenizerConfig((demonstrations,), tmp_path / "tokenizer"))
    loop = LoopConfig(steps=6, batch_size=16, warmup=2)
    shared: dict[str, Any] = {"data": (demonstrations,), "device": "cuda", "validation_every": 4, "loop": loop}
    told = replace(tiny_config, target=replace(tiny_config.target, committed=True))
    config = TrainPolicyConfig(
        tokenizer=tmp_path / "tokenizer",
        output=tmp_path / "policy",
        policy=told,
        loss=LossConfig(committed=0.5, levels_every=3),
        **shared,
    )
    policy = str(train_policy(config))
    draft = TrainDrafterConfig(policy=policy, output=tmp_path / "draft", resume_weights=True, **shared)
    made = [train_drafter(replace(draft, kind=kind, output=tmp_path / kind)) for kind in ("feature", "visual")]
    made.append(train_corrector(TrainCorrectorConfig(policy=policy, output=tmp_path / "corrector", **shared)))
    assert all(any(directory.glob("*.safetensors")) for directory in made)
