"""OpenVLA checkpoints through the public API: conventions, the five failures its users meet, the image self-test."""

import json
import shutil
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch

from openvla_checkpoint import block_image, statistics, write_adapter, write_checkpoint, write_heads, write_json
from rsd.evaluation.backend import rsd_policy
from rsd.evaluation.config import EvalConfig
from rsd.evaluation.doctor import checkpoint_files
from rsd.policy import RsdPolicy
from rsd.targets.openvla.policy import OpenVlaPolicy
from rsd.targets.openvla.prompt import Prompt
from rsd.targets.openvla.published import fingerprint, is_openvla, locate_openvla
from rsd.targets.openvla.selftest import image_self_test
from rsd.targets.openvla.statistics import Statistics
from rsd.types import Observation, RsdError

FIXTURES = Path(__file__).parent.parent.parent / "fixtures" / "openvla"
STATE = np.array([-0.1, 0.05, 1.1, 3.1, 0.2, -0.1, 0.03, -0.03], np.float32)
BOWL = "pick up the black bowl"


@pytest.fixture(scope="module")
def ar_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("openvla"))


@pytest.fixture(scope="module")
def oft_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_heads(write_checkpoint(tmp_path_factory.mktemp("oft")))


@pytest.fixture(scope="module")
def ar(ar_directory: Path) -> OpenVlaPolicy:
    return OpenVlaPolicy.from_pretrained(ar_directory)


@pytest.fixture(scope="module")
def oft(oft_directory: Path) -> OpenVlaPolicy:
    return OpenVlaPolicy.from_pretrained(oft_directory)


@pytest.fixture
def copy(oft_directory: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(oft_directory, tmp_path / "copy"))


def seen(instruction: str = BOWL, seed: int = 1) -> Observation:
    images = np.stack([block_image(seed, 256), block_image(seed + 1, 256)])
    return Observation(images, STATE, instruction)


# against the published code, from the observation on


def test_the_prompt_ends_in_token_29871(ar_directory: Path) -> None:
    published = np.load(FIXTURES / "ar.npz")["input_ids"].tolist()
    assert Prompt(ar_directory).ids("Pick up the BLACK bowl") == published
    assert published[0] == 1
    assert published[-2:] == [29901, 29871]


def test_actions_and_state_are_scaled_as_published(oft: OpenVlaPolicy, ar_directory: Path) -> None:
    published = np.load(FIXTURES / "oft.npz")
    bounds = oft.statistics.state(oft.unnorm_key)
    np.testing.assert_allclose(bounds.normalise(published["state"]), published["state_normalised"], atol=1e-6)
    tokens = torch.from_numpy(published["discrete_tokens"])[None]
    values = oft.model.token_values(tokens).reshape(8, 7).numpy()
    restored = oft.statistics.actions(oft.unnorm_key).restore(values)
    np.testing.assert_allclose(restored, published["discrete_actions"], atol=1e-6)
    head = oft.model.head(torch.from_numpy(published["l1_two_hidden"])[None])[0].detach().numpy()
    restored = oft.statistics.actions(oft.unnorm_key).restore(head)
    np.testing.assert_allclose(restored, published["l1_two_actions"], atol=1e-4)


def test_the_gripper_is_binary_with_the_environments_sign(oft: OpenVlaPolicy) -> None:
    normalised = torch.zeros(2, 7)
    normalised[:, 6] = torch.tensor([0.9, 0.2])  # OpenVLA: 1 = open
    actions = oft._to_env(normalised, None)
    assert actions[:, 6].tolist() == [-1.0, 1.0]
    assert oft._to_env(normalised + 9.0, None).max() <= 1.0


# the five failures


def test_failure_1_an_unnorm_key_beside_the_inputs_is_taken_once(copy: Path) -> None:
    wide = statistics("libero_spatial_no_noops", "other")
    wide["other"] = json.loads(json.dumps(wide["other"]))
    wide["other"]["action"]["q99"][0] = 0.5
    write_json(copy / "dataset_statistics.json", wide)
    policy = OpenVlaPolicy.from_pretrained(copy, unnorm_key="libero_spatial")
    inputs = {"observation": seen()}
    own = policy.predict(**inputs).actions
    other = policy.predict(**inputs, unnorm_key="other").actions
    assert not np.allclose(own[:, 0], other[:, 0])
    np.testing.assert_array_equal(policy.predict(**inputs, unnorm_key="libero_spatial").actions, own)


def test_failure_2_hidden_states_are_a_method(ar: OpenVlaPolicy, oft: OpenVlaPolicy) -> None:
    for policy, positions in ((ar, 7), (oft, 56)):
        features = policy.features(seen())
        assert features.shape == (positions, 32)
        assert np.isfinite(features).all()
    images = ar.engine.model.embed_images(ar._pixels(seen().images))
    prompt = torch.tensor([ar.prompt.ids(BOWL)])
    hidden, _ = ar.model.prefill(ar.model.embed_prefix(images, prompt), 0)
    np.testing.assert_allclose(ar.features(seen())[0], hidden[0, 0].detach().numpy(), atol=1e-5)


def test_failure_3_a_missing_unnorm_key_lists_what_there_is(ar_directory: Path) -> None:
    with pytest.raises(RsdError, match=r"no statistics of 'libero_goal'.*there are \['libero_spatial_no_noops'\]"):
        OpenVlaPolicy.from_pretrained(ar_directory, suite="libero_goal")
    for suite in ("libero_spatial_swap", "libero_spatial,libero_goal"):
        with pytest.raises(RsdError, match=r'writing {"unnorm_key": "libero_spatial_no_noops"}, say, into .*rsd_op'):
            OpenVlaPolicy.from_pretrained(ar_directory, suite=suite)
    policy = OpenVlaPolicy.from_pretrained(ar_directory, suite="libero_spatial")
    assert policy.unnorm_key == "libero_spatial_no_noops"


def test_failure_4_a_prediction_is_a_chunk_and_never_a_tuple(ar: OpenVlaPolicy, oft: OpenVlaPolicy) -> None:
    for policy in (ar, oft):
        chunk = policy.predict(seen())
        assert isinstance(chunk.actions, np.ndarray)
        assert chunk.actions.dtype == np.float32
        assert chunk.stats.prefills == 1
        assert {"preprocess", "vision", "prefill", "decode", "total"} == set(chunk.stats.latency_ms)


def test_failure_5_actions_are_always_a_chunk(
    ar: OpenVlaPolicy, oft: OpenVlaPolicy, ar_directory: Path, oft_directory: Path
) -> None:
    assert ar.predict(seen()).actions.shape == (1, 7)
    assert oft.predict(seen()).actions.shape == (8, 7)
    assert (ar.execute, oft.execute, len(oft.predict(seen()).executed)) == (1, 8, 8)
    for directory, execute, steps in ((ar_directory, 2, 1), (oft_directory, 9, 8)):
        with pytest.raises(RsdError, match=f"execute {execute}: expected 1 to {steps}, the steps of this policy's"):
            OpenVlaPolicy.from_pretrained(directory, execute=execute)
    assert len(OpenVlaPolicy.from_pretrained(oft_directory, execute=5).predict(seen()).executed) == 5
    assert ar.predict(seen()).stats.target_passes == 6
    assert oft.predict(seen()).stats.target_passes == 0


# what it sees


def test_the_image_self_test_finds_a_blind_policy(oft: OpenVlaPolicy, oft_directory: Path) -> None:
    assert image_self_test(oft).passed
    assert set(image_self_test(oft).relative_change) == {"agentview", "wrist"}
    blind = OpenVlaPolicy.from_pretrained(oft_directory)
    embed = blind.model.embed_images
    blind.engine.model.embed_images = lambda pixels: torch.zeros_like(embed(pixels))  # type: ignore[method-assign]
    report = image_self_test(blind)
    assert report.blind == ["agentview", "wrist"]
    assert "does NOT see agentview, wrist" in str(report)


def test_the_image_self_test_takes_policies_without_features() -> None:
    shipped = RsdPolicy.from_pretrained(Path(__file__).parents[3] / "checkpoints" / "libero", decode="l1")
    report = image_self_test(shipped)
    assert (report.passed, report.compared) == (True, "actions")
    assert set(report.relative_change) == {"agentview", "wrist"}


def test_camera_prompt_and_state_matter(ar: OpenVlaPolicy, oft: OpenVlaPolicy) -> None:
    wrist_changed = Observation(np.stack([seen().images[0], block_image(9, 256)]), STATE, BOWL)
    assert np.array_equal(ar.features(seen()), ar.features(wrist_changed))  # one camera
    assert not np.allclose(oft.features(seen()), oft.features(wrist_changed))
    assert not np.allclose(ar.features(seen()), ar.features(seen("open the drawer")))
    moved = Observation(seen().images, STATE + np.float32(0.02), BOWL)
    assert not np.allclose(oft.features(seen()), oft.features(moved))
    np.testing.assert_array_equal(oft.predict(seen()).actions, oft.predict(seen()).actions)


# what a directory must hold


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("tokenizer.json", "tokenizer.json: not found; copy it from the published checkpoint"),
        ("preprocessor_config.json", "preprocessor_config.json: not found"),
        ("action_head--150000_checkpoint.pt", "but no action head"),
    ],
)
def test_missing_files_are_named_before_weights_are_read(copy: Path, missing: str, message: str) -> None:
    (copy / missing).unlink()
    with pytest.raises(RsdError, match=message):
        OpenVlaPolicy.from_pretrained(copy)


def test_without_the_fine_tunes_statistics_the_configurations_are_used(copy: Path) -> None:
    (copy / "dataset_statistics.json").unlink()
    assert OpenVlaPolicy.from_pretrained(copy).unnorm_key == "libero_spatial_no_noops"


def test_what_the_files_do_not_say_is_asked_for_once(copy: Path) -> None:
    (copy / "proprio_projector--150000_checkpoint.pt").unlink()
    with pytest.raises(RsdError, match=r'write \{"cameras": 1\} or'):
        OpenVlaPolicy.from_pretrained(copy)
    write_json(copy / "rsd_openvla.json", {"cameras": 1})
    assert OpenVlaPolicy.from_pretrained(copy).predict(seen()).actions.shape == (8, 7)
    write_json(copy / "rsd_openvla.json", {"camera": 1})
    with pytest.raises(RsdError, match=r"unknown \['camera'\]"):
        OpenVlaPolicy.from_pretrained(copy)


def test_a_decoder_that_does_not_fit_says_which_does(ar_directory: Path, oft_directory: Path) -> None:
    with pytest.raises(RsdError, match=r"decode l1: .* has no action_head.*ar \(OpenVLA\) or discrete"):
        OpenVlaPolicy.from_pretrained(ar_directory, decode="l1")
    with pytest.raises(RsdError, match=r"decode ar: .*action_head--150000_checkpoint.pt; it decodes with l1"):
        OpenVlaPolicy.from_pretrained(oft_directory, decode="ar")
    with pytest.raises(RsdError, match="decode 'rsd': expected one of ar, l1, discrete"):
        OpenVlaPolicy.from_pretrained(ar_directory, decode="rsd")
    discrete = OpenVlaPolicy.from_pretrained(ar_directory, decode="discrete")
    assert discrete.predict(seen()).actions.shape == (8, 7)


def test_an_adapter_finds_its_base_and_merged_weights_refuse_one(ar_directory: Path, tmp_path: Path) -> None:
    run = write_adapter(tmp_path, str(ar_directory))
    assert is_openvla(run)
    adapted = OpenVlaPolicy.from_pretrained(run)
    assert not np.allclose(adapted.features(seen()), OpenVlaPolicy.from_pretrained(ar_directory).features(seen()))
    with pytest.raises(RsdError, match="leave base out"):
        OpenVlaPolicy.from_pretrained(ar_directory, base=ar_directory)


def test_a_temperature_is_refused(ar_directory: Path) -> None:
    with pytest.raises(RsdError, match=r"--temperature 0.5: .* in OpenVLA's format .* leave --temperature out"):
        rsd_policy(EvalConfig(policy=str(ar_directory), decode="ar", temperature=0.5))


def test_other_checkpoints_are_not_taken_for_openvla() -> None:
    assert locate_openvla(Path(__file__).parents[3] / "checkpoints" / "libero") is None


def test_a_hub_checkpoint_is_fetched_with_all_its_files(oft_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def download(name: str, allow_patterns: list[str]) -> str:
        assert name == "someone/openvla-7b-oft"
        asked.append(allow_patterns)
        return str(oft_directory)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert OpenVlaPolicy.from_pretrained("someone/openvla-7b-oft").decode == "l1"
    fetched = {name.name for name in oft_directory.iterdir() if any(fnmatch(name.name, p) for p in asked[-1])}
    assert fetched == {path.name for path in oft_directory.iterdir()}


def test_the_fingerprint_tells_weights_apart(copy: Path) -> None:
    before = fingerprint(copy)
    assert fingerprint(copy) == before
    path = copy / "action_head--150000_checkpoint.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
    assert fingerprint(copy) != before


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (None, "no data set's statistics"),
        ({"action": None}, "expected q01, q99 of 7 numbers"),
        ({"action": 3}, "expected q01, q99 of 7 numbers, found 3"),
        ({"action": {"q01": [None] * 7, "q99": [1.0] * 7}}, r"action.q01: expected real numbers, found object"),
        ({"action": {"q01": ["0"] * 7, "q99": [1.0] * 7}}, r"action.q01: expected real numbers, found <U1"),
        ({"action": {"q01": [0.0] * 6, "q99": [1.0] * 7}}, "expected q01, q99 of 7 numbers"),
        ({"action": {"q01": [0.0] * 7, "q99": [1.0] * 7, "mask": ["no"] * 7}}, "a mask of true and false"),
    ],
)
def test_odd_statistics_are_refused_by_the_doctor_too(copy: Path, table: Any, message: str) -> None:
    write_json(copy / "dataset_statistics.json", {"libero_spatial_no_noops": table})
    with pytest.raises(RsdError, match=message):
        Statistics.load(copy).actions("libero_spatial_no_noops")
    with pytest.raises(RsdError, match=message):
        checkpoint_files(str(copy))
