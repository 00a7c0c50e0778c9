"""`rsd train policy --backbone openvla` on a small random checkpoint in the published format, and what it leaves."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

import rsd.training.loop as training_loop
import rsd.training.openvla as openvla_training
from openvla_checkpoint import SUITE, statistics, write_checkpoint, write_heads, write_json
from rsd.cli import dispatch
from rsd.data.demonstrations import load_demonstrations
from rsd.evaluation.calibrate import CalibrateConfig, calibrate
from rsd.models.feature_drafter import DrafterConfig
from rsd.models.visual_drafter import VisualDrafterConfig
from rsd.policy import RsdPolicy
from rsd.targets.openvla.lora import LoraConfig
from rsd.targets.openvla.rsd_policy import OpenVlaBody
from rsd.tokenizer.action_tokenizer import ActionTokenizer
from rsd.training.loop import STATE_FILE, LoopConfig
from rsd.training.openvla import TrainOpenVlaConfig, train_openvla
from rsd.training.policy import TrainDrafterConfig, TrainPolicyConfig, train_drafter, train_policy
from rsd.types import Observation, RsdError

DRAFT = DrafterConfig(levels=3, dim=32, layers=1, heads=2)
VISUAL = VisualDrafterConfig(2, (16, 16, 16, 32), dim=32, layers=1, heads=2, levels=DRAFT)
LOOP = LoopConfig(
    steps=4, batch_size=4, learning_rate=5e-3, warmup=2, ema=0.5, save_every=2, log_every=1, cuda_graph=False
)


@pytest.fixture(scope="module")
def config(
    openvla_demonstrations: Path, tokenizer: ActionTokenizer, tmp_path_factory: pytest.TempPathFactory
) -> TrainOpenVlaConfig:
    root = tmp_path_factory.mktemp("openvla_training")
    tokenizer.save(root)
    return TrainOpenVlaConfig(
        source=str(write_heads(write_checkpoint(root / "oft"))),
        data=(openvla_demonstrations,),
        tokenizer=root,
        output=root / "run",
        device="cpu",
        cameras=1,
        validation_every=4,
        validation_frames=4,
        lora=LoraConfig(rank=4),
        feature_drafter=DRAFT,
        visual_drafter=VISUAL,
        loop=LOOP,
    )


@pytest.fixture(scope="module")
def trained(config: TrainOpenVlaConfig) -> Path:
    return train_openvla(config)


@pytest.fixture(scope="module")
def seen(openvla_demonstrations: Path) -> list[Observation]:
    episodes = [e for e in load_demonstrations(openvla_demonstrations) if e.images is not None]
    return [Observation(e.images[t], e.state[t], e.instruction) for e in episodes[::2] for t in (0, 8)]  # type: ignore[index]


def tensors(directory: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    files = ("model.safetensors", "lora_adapter/adapter_model.safetensors")
    return {f"{file} {name}": value for file in files for name, value in load_file(directory / file).items()}


# training


def test_one_batch_is_learned_by_heart(
    config: TrainOpenVlaConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = openvla_training.OpenVlaFrames.draw

    def always_the_same(self: openvla_training.OpenVlaFrames, count: int, chunks: int) -> tuple[Tensor, bool]:
        torch.manual_seed(0)
        return draw(self, count, chunks)

    monkeypatch.setattr(openvla_training.OpenVlaFrames, "draw", always_the_same)
    train_openvla(replace(config, output=tmp_path, loop=replace(LOOP, steps=12, save_every=0)))
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    for name, share in (("total", 0.7), ("levels", 0.8), ("draft", 0.8), ("visual", 0.8), ("l1", 0.6)):
        values = [event.value for event in events.Scalars(f"loss/{name}")]
        assert len(values) == 12
        assert np.mean(values[-3:]) < share * np.mean(values[:2]), name


def test_an_interrupted_training_ends_as_a_whole_one(
    config: TrainOpenVlaConfig, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, losses = [0], openvla_training.policy_losses

    def counted(*args: object) -> object:
        calls[0] += 1
        if calls[0] == 4:
            raise KeyboardInterrupt
        return losses(*args)  # type: ignore[arg-type]

    config = replace(config, output=tmp_path)
    monkeypatch.setattr(openvla_training, "policy_losses", counted)
    with pytest.raises(KeyboardInterrupt):
        train_openvla(config)
    state = torch.load(tmp_path / STATE_FILE, weights_only=True)
    assert state["step"] == 2
    assert sum(value.numel() for value in state["model"].values()) < 2e6  # nothing of the base's 1.6 M embeddings
    calls[0] = 100
    resumed, whole = tensors(train_openvla(config)), tensors(trained)
    assert calls[0] == 102  # steps 3 and 4
    assert resumed.keys() == whole.keys()
    for name, value in whole.items():
        assert torch.equal(resumed[name], value), name
    with pytest.raises(RsdError, match="belongs to a run with other settings"):
        train_openvla(replace(config, lora=LoraConfig(rank=5)))
    source = Path(shutil.copytree(config.source, tmp_path / "base"))
    monkeypatch.setattr(training_loop, "describe", lambda _: json.loads(state["config"]))  # all but the base alike
    (source / "preprocessor_config.json").write_text((source / "preprocessor_config.json").read_text() + " ")
    with pytest.raises(RsdError, match="belongs to a run with other settings"):
        train_openvla(replace(config, source=str(source)))


def test_only_what_was_added_is_trained_and_all_of_it(
    config: TrainOpenVlaConfig, trained: Path, tmp_path: Path
) -> None:
    untrained = tensors(train_openvla(replace(config, output=tmp_path, loop=replace(LOOP, steps=0))))
    after = tensors(trained)
    same = [name for name, value in after.items() if torch.equal(untrained[name], value)]
    # first-level blocks are never told a gripper that is known, the last block is not a level's
    assert not [name for name in same if "lora" in name or "level_head" in name or "draft." in name]
    assert all(torch.count_nonzero(value) == 0 for name, value in untrained.items() if "lora_B" in name)
    settings = json.loads((trained / "lora_adapter" / "adapter_config.json").read_text())
    assert len(settings["target_modules"]) == 3 * 7  # the small Llama's layers, no vision
    assert (settings["r"], settings["lora_alpha"]) == (4, 16.0)


def test_its_policy_loads_acts_and_knows_where_it_comes_from(trained: Path, seen: list[Observation]) -> None:
    policy = RsdPolicy.from_pretrained(trained, decode="rsd-fused")
    assert isinstance(policy.core.body, OpenVlaBody)
    assert all(policy.predict(observation).stats.prefills == 1 for observation in seen)
    assert policy.provenance["training"]["lora"]["rank"] == 4
    assert policy.provenance["data"]["episodes"] == 3
    assert policy.provenance["data"]["frames"] == 3 * 24
    assert {"ar", "l1", "rsd margin", "rsd-fused margin", "visual"} <= set(policy.provenance["validation"])
    assert policy.core.body.config.state_low[2] == 0.9  # of the projector's own statistics


def test_what_cannot_be_trained_is_refused(
    config: TrainOpenVlaConfig, demonstrations: Path, states_only: Path, trained: Path, tmp_path: Path
) -> None:
    with pytest.raises(RsdError, match="images of 32 x 32 px, OpenVLA's pipeline starts from 256; render again"):
        train_openvla(replace(config, data=(demonstrations,), output=tmp_path / "other"))
    with pytest.raises(RsdError, match="rsd demos render"):
        train_openvla(replace(config, data=(states_only,), output=tmp_path / "other"))
    with pytest.raises(RsdError, match="expected a checkpoint in OpenVLA's format"):
        train_openvla(replace(config, source=str(trained), output=tmp_path / "other"))
    with pytest.raises(RsdError, match="cuda-graph"):
        replace(config, loop=replace(LOOP, cuda_graph=True))
    several = Path(shutil.copytree(config.source, tmp_path / "several"))
    write_json(several / "dataset_statistics.json", statistics(SUITE, "libero_goal_no_noops"))
    with pytest.raises(RsdError, match=r"statistics of several data sets; choose one of .* by writing .*unnorm_key"):
        train_openvla(replace(config, source=str(several), output=tmp_path / "other"))
    with pytest.raises(RsdError, match="expected a compact policy, found one on OpenVLA"):
        train_policy(TrainPolicyConfig(init=str(trained)))
    with pytest.raises(RsdError, match="its drafts are trained with it"):
        train_drafter(TrainDrafterConfig(policy=str(trained)))


def test_the_command_line_reaches_it(
    config: TrainOpenVlaConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", "policy", "--backbone=openvla", "--from", config.source, "--data", str(config.data[0])]
    command += ["--tokenizer", str(config.tokenizer), "--output", str(tmp_path / "run"), "--device", "cpu"]
    command += ["--loop.steps", "1", "--loop.batch-size", "2", "--loop.accumulate", "2", "--lora.rank", "2"]
    assert dispatch([*command, "--lora.vision", "--validation-frames", "2", "visual-drafter:none"]) == 0
    content = json.loads((tmp_path / "run" / "checkpoint" / "config.json").read_text())
    assert content["policy"]["visual_drafter"] is None
    assert content["provenance"]["training"]["lora"] == {"rank": 2, "alpha": 16.0, "vision": True}
    capsys.readouterr()
    for decode in ("rsd-fused", "rsd-skip"):
        with pytest.raises(RsdError, match="has no visual drafter; use rsd, l1 or ar, or train one"):
            RsdPolicy.from_pretrained(tmp_path / "run" / "checkpoint", decode=decode)
    with pytest.raises(RsdError, match="has no visual drafter, whose chunks rsd-skip executes"):
        calibrate(CalibrateConfig(policy=str(tmp_path / "run" / "checkpoint"), output=tmp_path / "rollouts"))
    assert dispatch(["train", "policy", "--backbone", "llava"]) == 2
    assert "--backbone 'llava': expected one of compact, openvla" in capsys.readouterr().err
    assert dispatch(["train", "policy", "--backbone", "openvla"]) == 2
    assert "--from" in capsys.readouterr().err


def test_the_updates_are_merged_as_they_were_trained(
    config: TrainOpenVlaConfig, tmp_path: Path, seen: list[Observation], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model before `finish` and the policy that is loaded give the same hidden states."""
    finish, kept = openvla_training.finish, []

    def before(trainee: openvla_training.Trainee) -> object:
        target = trainee.model.target
        with torch.no_grad():
            kept.append(target.prefill(target.embed_prefix(*scene))[0])
        return finish(trainee)

    torch.manual_seed(0)
    prompt = torch.randint(3, 30000, (1, 12))
    scene = torch.randn(1, 2, 6, 224, 224), torch.randn(1, 19), (prompt, torch.ones(1, 32, dtype=torch.long))
    monkeypatch.setattr(openvla_training, "finish", before)
    lora, loop = replace(config.lora, vision=True), replace(LOOP, steps=3, ema=0.0)
    directory = train_openvla(replace(config, output=tmp_path, cameras=2, lora=lora, loop=loop))
    target = RsdPolicy.from_pretrained(directory).model.target
    with torch.no_grad():
        loaded = target.prefill(target.embed_prefix(*scene))[0]
    torch.testing.assert_close(loaded, kept[0], rtol=0, atol=2e-5)


def work(rank: int, config: TrainOpenVlaConfig, port: int) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    train = training_loop.train

    def spy(model: nn.Module, *arguments: Any) -> nn.Module:
        average = train(model, *arguments)
        torch.save(model.state_dict(), config.output / f"{rank}.pt")
        return average

    training_loop.train = spy
    train_openvla(config)
    dist.destroy_process_group()


def test_two_processes_train_one_policy(config: TrainOpenVlaConfig, tmp_path: Path) -> None:
    config = replace(config, output=tmp_path, visual_drafter=None, loop=replace(LOOP, steps=2, batch_size=2))
    mp.spawn(work, args=(config, 29_000 + (os.getpid() + 1_000) % 2_000), nprocs=2)
    mine, theirs = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    policy = RsdPolicy.from_pretrained(tmp_path / "checkpoint", decode="ar")
    assert policy.provenance["processes"] == 2
    alone = tensors(train_openvla(replace(config, output=tmp_path / "alone")))
    assert any(not torch.equal(alone[name], value) for name, value in tensors(tmp_path / "checkpoint").items())
