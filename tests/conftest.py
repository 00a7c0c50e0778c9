"""Tiny models and data that the tests share; random weights, so nothing here needs a download."""

import functools
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from hypothesis import settings

from rsd.checkpoint import load_model, read_content
from rsd.decoding.gate import SkipRule
from rsd.environment import ENGINE
from rsd.models.bundle import PolicyConfig, RsdModel
from rsd.models.feature_drafter import DrafterConfig
from rsd.models.target import TargetConfig
from rsd.models.visual_drafter import VisualDrafterConfig
from rsd.policy import RsdPolicy
from rsd.runtime import onnx_graph
from rsd.tokenizer.action_tokenizer import ActionTokenizer, TokenizerConfig
from rsd.types import EAGER, Observation

HERE = Path(__file__).parent
# the files that take longest, begun first, so that no worker waits for another's in the end
LONGEST = (
    *("goldens/test_goldens.py", "test_shipped_checkpoint.py", "sim/test_libero.py", "collection/test_collect.py"),
    *("training/test_openvla_training.py", "training/test_training_commands.py", "sim/test_scenes.py"),
    *("evaluation/test_kills.py", "evaluation/test_launchers.py", "targets/openvla/test_openvla_libero.py"),
    *("studies/test_substitution.py", "sim/test_observables.py", "runtime/test_onnx_graph.py", "test_documents.py"),
    *("evaluation/test_libero_evaluation.py", "training/test_parallel.py", "studies/test_openvla_bench.py"),
)
if lost := [name for name in LONGEST if not (HERE / name).is_file()]:
    raise FileNotFoundError(f"tests/conftest.py: LONGEST names {', '.join(lost)}")
policy_module = sys.modules["rsd.policy"]
pytest.register_assert_rewrite("refusals")
settings.register_profile("rsd", deadline=None)  # a busy machine is no failure
settings.load_profile("rsd")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    ranks = {HERE / name: rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path, len(ranks)))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if torch.get_num_threads() != 1:  # anew: a command called in this process leaves it all cores for the tests after
        torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _eager() -> None:
    """Tiny models need no ONNX graphs, of which each takes seconds to export; also in processes that tests start."""
    os.environ[ENGINE] = EAGER


@pytest.fixture(autouse=True)
def _no_debugging(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RSD_DEBUG", raising=False)


@functools.cache
def loaded_once(directory: Path) -> Any:
    """What `load_model` gives for the shipped checkpoint, once a process."""
    return load_model(directory, read_content(directory), ActionTokenizer.load(directory))


@pytest.fixture
def one_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Policies of one checkpoint share one model, which eager decoders only read: loading takes a second of CPU."""
    monkeypatch.setattr(policy_module, "load_model", lambda directory, *_: loaded_once(directory))


@pytest.fixture
def shared_graphs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One folder of ONNX graphs for all workers: what one has exported, the others load."""
    base = tmp_path_factory.getbasetemp()
    with pytest.MonkeyPatch.context() as patch:
        folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "graphs"
        patch.setattr(onnx_graph, "graph_folder", lambda: folder)
        yield


@pytest.fixture(scope="session")
def tiny_config() -> PolicyConfig:
    target = TargetConfig(image_size=32, channels=(16, 16, 32, 32), dim=64, layers=2, heads=2, text_dim=32)
    draft = DrafterConfig(levels=3, dim=32, layers=1, heads=2)
    return PolicyConfig(
        target, draft, VisualDrafterConfig(2, (16, 16, 16, 32), dim=32, layers=1, heads=2, levels=draft)
    )


def smooth_chunks(count: int, seed: int = 0) -> np.ndarray:
    """Chunks float32 [N, 8, 7] in [-1, 1] that change slowly over time, as a robot's do; gripper -1 or +1."""
    rng = np.random.default_rng(seed)
    start, slope = rng.normal(0.0, 0.4, (2, count, 1, 6))
    motion = np.clip(start + slope * np.linspace(-0.5, 0.5, 8)[:, None], -1.0, 1.0)
    gripper = np.where(rng.random((count, 1, 1)) < 0.5, -1.0, 1.0) * np.ones((1, 8, 1))
    return np.concatenate([motion, gripper], axis=-1).astype(np.float32)


@pytest.fixture(scope="session")
def chunks() -> np.ndarray:
    return smooth_chunks(500)


@pytest.fixture(scope="session")
def other_chunks() -> np.ndarray:
    return smooth_chunks(300, seed=9)


@pytest.fixture(scope="session")
def tokenizer(chunks: np.ndarray) -> ActionTokenizer:
    return ActionTokenizer.fit(chunks, TokenizerConfig())


@pytest.fixture(scope="session")
def make_model(tiny_config: PolicyConfig, tokenizer: ActionTokenizer) -> Callable[[int], RsdModel]:
    def make(seed: int) -> RsdModel:
        torch.manual_seed(seed)
        return RsdModel.of(tiny_config, tokenizer).eval()

    return make


@pytest.fixture
def make_steady_model(make_model: Callable[[int], RsdModel]) -> Callable[[], RsdModel]:
    """Models that never switch the gripper: the draft may act alone."""

    def make() -> RsdModel:
        model = make_model(0)
        assert model.visual_drafter is not None
        for head in (model.target.gripper_head, model.visual_drafter.levels.gripper_head):
            torch.nn.init.constant_(head.bias, -9.0)
        return model

    return make


@pytest.fixture
def policy(make_model: Callable[[int], RsdModel], tokenizer: ActionTokenizer, tiny_config: PolicyConfig) -> RsdPolicy:
    provenance = {"data": "random weights"}
    return RsdPolicy.of(make_model(0), tokenizer, tiny_config, decode="rsd", provenance=provenance)


@pytest.fixture
def checkpoint(policy: RsdPolicy, tmp_path: Path) -> Path:
    policy.save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


@pytest.fixture
def hub_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub in this folder in the place of the network; it takes private repositories."""
    hub = tmp_path / "hub"

    class Api:
        def create_repo(self, repo_id: str, private: bool, exist_ok: bool) -> None:
            assert private
            assert exist_ok
            (hub / repo_id).mkdir(parents=True)

        def upload_folder(self, repo_id: str, folder_path: str) -> None:
            for path in Path(folder_path).iterdir():
                (hub / repo_id / path.name).write_bytes(path.read_bytes())

    def download(repo_id: str, allow_patterns: list[str]) -> str:
        if not (hub / repo_id).exists():
            raise OSError("no such repository")
        assert {path.name for path in (hub / repo_id).iterdir()} <= set(allow_patterns)
        return str(hub / repo_id)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return hub


@pytest.fixture
def make_observation() -> Callable[..., Observation]:
    def make(seed: int = 0, size: int = 32, instruction: str = "pick up the bowl") -> Observation:
        rng = np.random.default_rng(seed)
        images = rng.integers(0, 256, (2, size, size, 3), dtype=np.uint8)
        return Observation(images, rng.normal(0.0, 0.5, 8).astype(np.float32), instruction)

    return make


@pytest.fixture
def make_policy(
    make_steady_model: Callable[[], RsdModel], tokenizer: ActionTokenizer, tiny_config: PolicyConfig
) -> Callable[..., RsdPolicy]:
    """A policy whose visual drafter remembers, and with `rsd-skip`, acts alone two chunks of three."""

    def make(decode: str = "rsd-skip", **options: Any) -> RsdPolicy:
        skip = SkipRule(threshold_mm=1e9, max_skips=2)
        return RsdPolicy.of(make_steady_model(), tokenizer, tiny_config, decode=decode, skip=skip, **options)

    return make
