"""What an evaluation of the compact policy loads, seen from a process of its own."""

import json
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rsd import manifest
from rsd.checkpoint import CONFIG_FILE, weights_hash
from rsd.decoding.calibration import SkipCalibration
from rsd.decoding.gate import SkipRule
from rsd.evaluation.backend import decode_options, describe_checkpoint, libero_versions, ready, rsd_policy
from rsd.evaluation.config import EvalConfig
from rsd.evaluation.foreign import check_foreign
from rsd.evaluation.workers import Ready
from rsd.models.bundle import PolicyConfig, RsdModel
from rsd.models.corrector import ChunkCorrector
from rsd.policy import RsdPolicy
from rsd.targets.corrector import StoredCorrector, save_corrector
from rsd.tokenizer.action_tokenizer import ActionTokenizer
from rsd.types import EAGER, ONNX, RsdError

CODE = """
import json, sys
from rsd.cli.eval import check_names
from rsd.evaluation.backend import describe_checkpoint, rsd_policy, settle
from rsd.evaluation.config import EvalConfig
from rsd.evaluation.doctor import checkpoint_files, load_and_predict
import rsd.evaluation.evaluate

config, note = settle(EvalConfig())
check_names(config)
assert config.decode == "rsd-fused", note
assert rsd_policy(config).decode == "rsd-fused"
assert "sympy" not in sys.modules, "torch's compiler, 0.7 s in every worker"
describe_checkpoint(config)
checks = checkpoint_files(config.policy), load_and_predict(config.policy, "cpu", [])
assert all(check.status == "ok" for check in checks), checks
print(json.dumps([name for name in sys.modules if name.startswith("rsd.") or name == "simplejpeg"]))
"""


def test_the_compact_policy_needs_no_image_or_model_code_of_openvla() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    loaded = json.loads(done.stdout)
    assert "rsd.policy" in loaded
    assert "simplejpeg" not in loaded
    of_openvla = {name for name in loaded if name.startswith("rsd.targets.openvla.")}
    assert of_openvla == {"rsd.targets.openvla.published"}


@pytest.mark.simulator
def test_a_simulator_is_told_of_a_policy_elsewhere_without_torch() -> None:
    told = pickle.dumps(Ready(libero_versions("cpu"), describe_checkpoint(EvalConfig(decode="l1")), 128))
    code = "import pickle, sys; pickle.load(sys.stdin.buffer); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], input=told, check=False).returncode == 0


@pytest.mark.parametrize(
    ("options", "own", "engine"),
    [
        ({"decode": "rsd-fused"}, "margin", ONNX),
        ({"decode": "rsd-fused", "acceptance": "residual"}, "exact", ONNX),
        ({"decode": "rsd", "acceptance": "exact"}, "margin", EAGER),
        ({"decode": "rsd"}, "exact", EAGER),
        ({"decode": "ar", "temperature": 1.0}, "margin", EAGER),
        ({"decode": "rsd-skip"}, "exact", ONNX),  # as the calibration was
        ({"decode": "rsd-skip", "skip_threshold_mm": 5.0}, "exact", EAGER),
    ],
)
def test_a_run_is_recorded_with_the_engine_that_the_policy_takes(
    options: dict[str, Any],
    own: str,
    engine: str,
    tokenizer: ActionTokenizer,
    tiny_config: PolicyConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("RSD_ENGINE")
    RsdPolicy.of(RsdModel.of(tiny_config, tokenizer), tokenizer, tiny_config, decode="ar").save_pretrained(tmp_path)
    content = json.loads((tmp_path / CONFIG_FILE).read_text())
    content["policy"]["acceptance"] = own
    (tmp_path / CONFIG_FILE).write_text(json.dumps(content))
    manifest.seal(tmp_path)
    calibrate(tmp_path, "libero_spatial")
    config = EvalConfig(policy=str(tmp_path), **options)
    assert rsd_policy(config).engine == engine  # type: ignore[attr-defined]
    assert describe_checkpoint(config)["engine"].split()[0] == engine
    assert describe_checkpoint(config)["execute"] == 8  # all of the chunk
    if config.decode != "rsd-skip" or config.skip_threshold_mm is not None:  # the calibration is of 8
        assert describe_checkpoint(replace(config, execute=5))["execute"] == 5
    with pytest.raises(RsdError, match="execute 9: expected 1 to 8, the steps of this policy's chunk"):
        describe_checkpoint(replace(config, execute=9))


def test_a_corrector_is_looked_at_before_a_worker_is_started(
    tokenizer: ActionTokenizer, tiny_config: PolicyConfig, tmp_path: Path
) -> None:
    policy = RsdPolicy.of(RsdModel.of(tiny_config, tokenizer), tokenizer, tiny_config, decode="l1")
    policy.save_pretrained(tmp_path / "policy")
    assert tiny_config.visual_drafter is not None
    stored = StoredCorrector(tiny_config.visual_drafter, "0" * 64)
    save_corrector(ChunkCorrector(tiny_config.visual_drafter, policy.model.target), stored, tmp_path / "corrector")
    options = {"decode": "l1", "delay": 2, "meanwhile": "a2c2", "corrector": str(tmp_path / "corrector")}
    config = EvalConfig(policy=str(tmp_path / "policy"), **options)
    with pytest.raises(RsdError, match="expected one of this policy, found one trained on the chunks of another"):
        ready(config)
    (tmp_path / "corrector" / "model.safetensors").write_bytes(b"")
    with pytest.raises(RsdError, match=r"model\.safetensors: is not what manifest\.json names .*; copy the directory"):
        ready(config)


def test_what_is_asked_of_the_gate_reaches_it_and_no_distilled_drafter() -> None:
    config = EvalConfig(decode="rsd-skip", skip_threshold_mm=9.0, max_skips=4, max_skips_held=2)
    assert decode_options(config).skip == SkipRule(9.0, 4, max_skips_held=2)
    assert decode_options(replace(config, max_skips_held=None)).skip == SkipRule(9.0, 4)
    with pytest.raises(RsdError, match=r"^--max-skips-held: not with --policy policy\.py:P --decode rsd-skip; le"):
        check_foreign(replace(config, policy="policy.py:P", drafter="drafter"))


def calibrate(checkpoint: Path, suites: str) -> None:
    promise = {"epsilon_mm": 50.0, "alpha": 0.1, "delta": 0.1, "loss": "share", "test": "betting", "p_value": 0.1}
    counted = {"empirical_risk": 0.1, "skip_share": 0.5, "episodes": 9, "chunks": 90, "suites": suites}
    names = {"score": "expected_deviation_mm", "acceptance": "margin", "weights_sha256": weights_hash(checkpoint)}
    SkipCalibration(threshold=20.0, max_skips=2, memory_chunks=2, **promise, **counted, **names).save(checkpoint)
