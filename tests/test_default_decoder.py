"""Which decoder a policy takes that nobody asked for one of."""

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rsd.checkpoint import WEIGHTS_FILE
from rsd.decoding.calibration import SkipCalibration
from rsd.decoding.gate import SkipRule
from rsd.models.bundle import RsdModel
from rsd.policy import RsdPolicy
from rsd.tokenizer.action_tokenizer import ActionTokenizer
from rsd.types import RsdError


def calibration(weights: Path, **changes: Any) -> SkipCalibration:
    values = {"threshold": 20.0, "max_skips": 2, "memory_chunks": 2, "epsilon_mm": 50.0}
    values |= {"score": "expected_deviation_mm", "alpha": 0.1, "delta": 0.1, "loss": "share", "test": "betting"}
    values |= {"p_value": 0.05, "empirical_risk": 0.05, "skip_share": 0.5, "suites": "s", "acceptance": "margin"}
    sha256 = hashlib.sha256(weights.read_bytes()).hexdigest()
    return SkipCalibration(**{**values, "episodes": 9, "chunks": 90, "weights_sha256": sha256, **changes})


def test_the_default_is_the_best_that_the_checkpoint_supports(
    checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")

    def chosen(**options: Any) -> str:
        caplog.clear()
        loaded = RsdPolicy.from_pretrained(checkpoint, **options).decode
        assert f"{checkpoint}: decodes by {loaded}: " in caplog.text
        return loaded

    assert chosen() == chosen(acceptance="exact") == chosen(fine="sequential") == "rsd-fused"
    assert chosen(skip=SkipRule(10.0)) == "rsd-skip"
    assert chosen(temperature=1.0) == "rsd-fused"
    with pytest.raises(RsdError, match="found none; make it with `rsd calibrate`"):  # by name: never replaced
        RsdPolicy.from_pretrained(checkpoint, decode="rsd-skip")
    calibration(checkpoint / WEIGHTS_FILE, weights_sha256="0" * 64).save(checkpoint)
    with pytest.raises(RsdError, match="made for weights"):
        RsdPolicy.from_pretrained(checkpoint, decode="rsd-skip")


def test_the_default_of_a_model_at_hand(policy: RsdPolicy, tokenizer: ActionTokenizer) -> None:
    parts = policy.model, tokenizer, policy.config
    assert RsdPolicy.of(*parts).decode == "rsd-fused"
    assert RsdPolicy.of(*parts, temperature=1.0).decode == "rsd-fused"
    assert RsdPolicy.of(*parts, skip=SkipRule(10.0)).decode == "rsd-skip"
    config = replace(policy.config, visual_drafter=None)
    assert RsdPolicy.of(RsdModel.of(config, tokenizer), tokenizer, config, skip=SkipRule(10.0)).decode == "rsd"
