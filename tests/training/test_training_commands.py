"""The three training commands from demonstrations on disk to files that load, in miniature."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

import rsd.training.policy as training_policy
from rsd.checkpoint import weights_hash
from rsd.data.demonstrations import load_demonstrations
from rsd.locks import exclusive
from rsd.models.bundle import PolicyConfig
from rsd.models.feature_drafter import DrafterConfig
from rsd.models.target import BlockTarget
from rsd.models.trunk import KVCache
from rsd.policy import RsdPolicy
from rsd.targets.corrector import CorrectedPolicy, read_corrector
from rsd.tokenizer.action_tokenizer import ActionTokenizer, TokenizerConfig
from rsd.training.config import DrafterLoss, TrainCorrectorConfig
from rsd.training.corrector import train_corrector
from rsd.training.dataset import FrameDataset, chunk_targets
from rsd.training.loop import STATE_FILE, LoopConfig
from rsd.training.policy import (
    TrainDrafterConfig,
    TrainPolicyConfig,
    resolve_device,
    split,
    train_drafter,
    train_policy,
)
from rsd.training.tokenizer import TrainTokenizerConfig, train_tokenizer
from rsd.types import Observation, RsdError
from studies.deviation import DeviationConfig, measure_deviation

LOOP = LoopConfig(steps=30, batch_size=16, learning_rate=3e-3, warmup=3, ema=0.9, save_every=10, log_every=1)


@pytest.fixture(scope="module")
def tokenizer_folder(demonstrations: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(TrainTokenizerConfig((demonstrations,), folder))
    return folder


@pytest.fixture(scope="module")
def config(
    demonstrations: Path, tokenizer_folder: Path, tiny_config: PolicyConfig, tmp_path_factory: pytest.TempPathFactory
) -> TrainPolicyConfig:
    return TrainPolicyConfig(
        data=(demonstrations,),
        tokenizer=tokenizer_folder,
        output=tmp_path_factory.mktemp("run"),
        device="cpu",
        validation_every=4,
        policy=tiny_config,
        loop=LOOP,
    )


@pytest.fixture(scope="module")
def trained(config: TrainPolicyConfig) -> Path:
    return train_policy(config)


def observation_of(folder: Path) -> Observation:
    episode = next(iter(load_demonstrations(folder)))
    assert episode.images is not None
    return Observation(episode.images[0], episode.state[0], episode.instruction)


# tokenizer


def test_train_tokenizer_fits_the_labels_and_saves(
    states_only: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = TokenizerConfig(levels=5, rho=3.0)
    tokenizer = train_tokenizer(TrainTokenizerConfig((states_only,), tmp_path / "new" / "folder", settings))
    labels = [episode.labels for episode in load_demonstrations(states_only, images=False)]
    chunks = np.concatenate([chunk_targets(label, 8) for label in labels])
    expected = ActionTokenizer.fit(chunks, settings)
    loaded = ActionTokenizer.load(tmp_path / "new" / "folder")
    assert loaded.to_json() == tokenizer.to_json() == expected.to_json()
    printed = capsys.readouterr().out
    assert "; next: rsd train policy --tokenizer " in printed
    assert "6 demonstrations, 144 chunks" in printed
    assert printed.count("mean error") == 5


# policy


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"acceptance": "blind(nan)"}, "acceptance 'blind"),
        ({"fine": "regres"}, "fine: expected one of regress, sequential"),
    ],
)
def test_what_could_not_be_loaded_is_not_trained(config: TrainPolicyConfig, wrong: dict[str, str], said: str) -> None:
    with pytest.raises(RsdError, match=re.escape(said)):
        train_policy(replace(config, policy=replace(config.policy, **wrong)))


def test_train_policy_lowers_the_loss(trained: Path, config: TrainPolicyConfig) -> None:
    events = EventAccumulator(str(config.output / "tensorboard"))
    events.Reload()
    for name in ("total", "levels", "draft", "l1"):
        values = [event.value for event in events.Scalars(f"loss/{name}")]
        assert len(values) == 30
        assert np.mean(values[-3:]) < 0.9 * np.mean(values[:3]), name


def test_its_checkpoint_loads_acts_and_knows_where_it_comes_from(
    trained: Path, config: TrainPolicyConfig, demonstrations: Path
) -> None:
    policy = RsdPolicy.from_pretrained(trained)
    assert policy.config == config.policy
    assert np.isfinite(policy.predict(observation_of(demonstrations)).actions).all()
    provenance = policy.provenance
    assert provenance["training"]["loop"]["steps"] == 30
    assert provenance["data"]["episodes"] == 9
    assert provenance["data"]["instructions"] == [
        "pick up the black bowl next to the ramekin",
        "open the drawer",
    ]
    assert provenance["versions"]["torch"] == torch.__version__
    report = provenance["validation"]
    assert report["episodes"] == 3
    assert {"ar", "parallel", "l1", "coarse-only", "rsd margin", "rsd agreement", "rsd exact"} <= set(report)
    assert all(0.0 < report[name]["l1_error"] < 5.0 for name in ("ar", "l1", "rsd margin"))
    accepted = {rule: report[f"rsd {rule}"]["tokens_accepted_by_level"] for rule in ("margin", "exact")}
    assert all(m >= e for m, e in zip(accepted["margin"], accepted["exact"], strict=True))


def test_state_normalisation_is_that_of_the_training_episodes(
    trained: Path, config: TrainPolicyConfig, demonstrations: Path
) -> None:
    training, _ = split(load_demonstrations(demonstrations), config.validation_every)
    state = FrameDataset(training, 8, torch.device("cpu")).state
    target = RsdPolicy.from_pretrained(trained).model.target
    assert torch.allclose(target.state_mean, state.mean(0), atol=1e-3)
    assert torch.allclose(target.state_std, state.std(0) + 1e-3, atol=1e-3)


def test_an_interrupted_training_continues_to_the_same_step(
    config: TrainPolicyConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(config, output=tmp_path, loop=replace(LOOP, steps=12, save_every=5))
    calls, losses = [0], training_policy.policy_losses

    def counted(*args: object) -> object:
        calls[0] += 1
        if calls[0] == 8:
            raise KeyboardInterrupt
        return losses(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(training_policy, "policy_losses", counted)
    with pytest.raises(KeyboardInterrupt):
        train_policy(config)
    assert not (tmp_path / "checkpoint").exists()
    calls[0] = 100
    RsdPolicy.from_pretrained(train_policy(config))
    assert calls[0] == 107  # steps 6 to 12
    assert torch.load(tmp_path / STATE_FILE, weights_only=True)["step"] == 12

    with pytest.raises(RsdError, match=r"belongs to a run with other settings \(data, loss.jitter\)"):
        train_policy(replace(config, data=(), loss=replace(config.loss, jitter=0.1)))  # before anything is read
    with pytest.raises(RsdError, match="belongs to a run with other settings"):
        train_drafter(TrainDrafterConfig(policy="nowhere", data=(), output=tmp_path, device="cpu"))


def test_training_from_a_checkpoint_starts_with_its_weights(
    trained: Path, config: TrainPolicyConfig, tmp_path: Path
) -> None:
    still = replace(config, init=str(trained), output=tmp_path / "still", loop=replace(LOOP, steps=0))
    source, copy = (RsdPolicy.from_pretrained(path).model for path in (trained, train_policy(still)))
    for name, value in source.state_dict().items():
        assert torch.equal(copy.state_dict()[name], value)

    other = replace(config.policy, feature_drafter=replace(config.policy.feature_drafter, levels=2))
    with pytest.raises(RsdError, match=r"its sizes .* differ"):
        train_policy(replace(still, policy=other, output=tmp_path / "other"))


def test_what_matches_is_taken_over_from_a_checkpoint_of_another_size(
    trained: Path, config: TrainPolicyConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    deeper = replace(config.policy, target=replace(config.policy.target, layers=config.policy.target.layers + 1))
    again = replace(config, init=str(trained), init_matching=True, policy=deeper, output=tmp_path / "deeper")
    grown = RsdPolicy.from_pretrained(train_policy(replace(again, loop=replace(LOOP, steps=0)))).model.state_dict()
    source = RsdPolicy.from_pretrained(trained).model.state_dict()
    assert all(torch.equal(grown[name], value) for name, value in source.items())
    assert grown.keys() - source.keys()
    printed = capsys.readouterr().out
    assert "start afresh: target.trunk" in printed
    assert re.search(r"^checkpoint: .*; next: rsd eval --policy ", printed, re.MULTILINE)


def test_deviation_from_the_baseline_is_measured_on_held_out_frames(
    trained: Path, demonstrations: Path, tmp_path: Path
) -> None:
    output = tmp_path / "deviation.json"
    rows = measure_deviation(DeviationConfig((demonstrations,), str(trained), 6, validation_every=4, output=output))
    by_name = {(row.decode, row.acceptance, row.fine): row for row in rows}
    nothing = dict.fromkeys(("normalised", "mm", "degrees"), (0.0, 0.0, 0.0))
    assert by_name["ar", "margin", "regress"].from_ar == nothing
    assert by_name["rsd", "exact", "sequential"].from_ar == nothing  # the tokens are those of `ar`
    assert by_name["rsd", "exact", "sequential"].gripper_differs_from_ar == 0.0
    p50, p99, largest = by_name["l1", "margin", "regress"].from_ar["mm"]
    assert 0 < p50 <= p99 <= largest
    stored = json.loads(output.read_text())
    assert stored["frames"] == 6
    assert [row["decode"] for row in stored["rows"]] == [row.decode for row in rows]


@pytest.mark.parametrize(
    ("height", "width", "said"),
    [
        (64, 64, r"expected images of 32 px as in .*task0_demo\.hdf5 before, found 64 px"),
        (32, 24, r"expected images uint8 \[\d+, S, S, 3\], square and of one size, found uint8 \[\d+, 32, 24, 3\]"),
    ],
)
@pytest.mark.parametrize("kind", ["policy", "draft"])
def test_images_of_another_size_are_refused_before_the_training_wherever_they_are(
    trained: Path, config: TrainPolicyConfig, tmp_path: Path, height: int, width: int, said: str, kind: str
) -> None:
    """Those held out come last, after the training."""
    data = tmp_path / "data"
    shutil.copytree(config.data[0], data)
    with h5py.File(data / "task1_demo.hdf5", "r+") as file:
        for key in ("agentview_rgb", "eye_in_hand_rgb"):
            obs = file["data/demo_5/obs"]  # the twelfth, held out
            steps = len(obs[key])
            del obs[key]
            obs.create_dataset(key, data=np.zeros((steps, height, width, 3), np.uint8))
    begin = {
        "policy": lambda: train_policy(replace(config, data=(data,), output=tmp_path / "run")),
        "draft": lambda: train_drafter(
            TrainDrafterConfig(
                policy=str(trained), data=(data,), output=tmp_path / "run", device="cpu", validation_every=4
            )
        ),
    }
    with pytest.raises(RsdError, match=rf"demo_5 of .*task1_demo\.hdf5: {said}"):
        begin[kind]()
    assert not (tmp_path / "run" / STATE_FILE).exists()


@pytest.mark.parametrize(
    ("column", "value", "said"),
    [(2, 3.14, "actions within .-1, the tokenizer's limit, found 3"), (6, 0.0, "dimension 6 to be -1 or 1, found 0")],
)
def test_labels_that_the_tokenizer_cannot_say_are_refused(
    column: int, value: float, said: str, config: TrainPolicyConfig, demonstrations: Path, tmp_path: Path
) -> None:
    data = Path(shutil.copytree(demonstrations, tmp_path / "data"))
    with h5py.File(data / "task1_demo.hdf5", "r+") as file:
        file["data/demo_5/actions"][3, column] = value
    with pytest.raises(RsdError, match=rf"task1_demo\.hdf5, demo_5: expected {said}"):
        train_policy(replace(config, data=(data,), output=tmp_path / "run"))


def test_images_of_another_size_than_the_models_are_refused(config: TrainPolicyConfig, tmp_path: Path) -> None:
    larger = replace(config.policy, target=replace(config.policy.target, image_size=64))
    with pytest.raises(RsdError, match="images of 32 x 32 px, expected 64 x 64"):
        train_policy(replace(config, policy=larger, output=tmp_path / "run"))


@pytest.mark.parametrize("kind", ["policy", "draft"])
def test_a_validation_that_fails_costs_no_training(
    trained: Path, config: TrainPolicyConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    def failing(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(training_policy, "validate", failing)
    loop = replace(LOOP, steps=2)
    draft = TrainDrafterConfig(
        policy=str(trained), data=config.data, output=tmp_path, device="cpu", resume_weights=True, loop=loop
    )
    begin = {
        "policy": lambda: train_policy(replace(config, output=tmp_path, loop=loop)),
        "draft": lambda: train_drafter(draft),
    }
    with pytest.raises(ZeroDivisionError):
        begin[kind]()
    assert torch.load(tmp_path / STATE_FILE, weights_only=True)["step"] == 2
    RsdPolicy.from_pretrained(tmp_path / "checkpoint")


def test_a_training_has_its_folder_for_itself(config: TrainPolicyConfig, states_only: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    with exclusive(tmp_path):
        for begin in (
            lambda: train_policy(replace(config, output=tmp_path)),
            lambda: train_drafter(TrainDrafterConfig(output=tmp_path)),
            lambda: train_tokenizer(TrainTokenizerConfig((states_only,), tmp_path)),
        ):
            with pytest.raises(RsdError, match="another run is writing here"):
                begin()
    nowhere = TrainDrafterConfig(policy="nowhere", data=config.data, output=tmp_path / "runs" / "draft", device="cpu")
    for fail in (
        lambda: train_policy(replace(config, output=tmp_path / "runs" / "policy", device="abacus")),
        lambda: train_drafter(nowhere),
        lambda: train_tokenizer(TrainTokenizerConfig((tmp_path / "nowhere",), tmp_path / "runs" / "tokenizer")),
    ):
        with pytest.raises(RsdError, match=r"abacus|nowhere"):
            fail()
        assert not (tmp_path / "runs").exists()  # nothing is left of what never began
    (other / "checkpoint").mkdir(parents=True)
    with pytest.raises(RsdError, match="a checkpoint of another run; choose another --output"):
        train_policy(replace(config, output=other))


def test_a_tokenizer_is_replaced_only_if_asked_for(states_only: Path, tmp_path: Path) -> None:
    config = TrainTokenizerConfig((states_only,), tmp_path)
    train_tokenizer(config)
    before = (tmp_path / "tokenizer.json").read_bytes()
    other = replace(config, tokenizer=TokenizerConfig(levels=5, rho=3.0))
    with pytest.raises(RsdError, match=r"tokenizer.json: exists already; choose another --output, or --overwrite"):
        train_tokenizer(other)
    assert (tmp_path / "tokenizer.json").read_bytes() == before
    train_tokenizer(replace(other, overwrite=True))
    assert ActionTokenizer.load(tmp_path).config.levels == 5


def test_states_without_images_are_refused(config: TrainPolicyConfig, states_only: Path, tmp_path: Path) -> None:
    with pytest.raises(RsdError, match="rsd demos render"):
        train_policy(replace(config, data=(states_only,), output=tmp_path))


# draft


def test_train_draft_keeps_everything_else(
    trained: Path, demonstrations: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes, prefill = set[bool](), BlockTarget.prefill

    def spy(target: BlockTarget, prefix: Tensor) -> tuple[Tensor, KVCache]:
        modes.add(target.training)
        return prefill(target, prefix)

    monkeypatch.setattr(BlockTarget, "prefill", spy)
    draft = DrafterConfig(levels=2, dim=32, layers=1, heads=2)
    directory = train_drafter(
        TrainDrafterConfig(
            policy=str(trained),
            data=(demonstrations,),
            output=tmp_path,
            device="cpu",
            validation_every=4,
            feature_drafter=draft,
            loop=replace(LOOP, steps=10),
        )
    )
    assert modes == {False}  # no dropout in what the draft reads
    before, after = (RsdPolicy.from_pretrained(path, decode="rsd") for path in (trained, directory))
    assert after.config == replace(before.config, feature_drafter=draft)
    for name, value in before.model.state_dict().items():
        if not name.startswith("feature_drafter."):
            assert torch.allclose(after.model.state_dict()[name], value, atol=1e-6), name
    assert len(after.predict(observation_of(demonstrations)).stats.num_draft_tokens) == 2
    assert after.provenance["feature_drafter"]["training"]["feature_drafter"]["levels"] == 2
    assert after.provenance["data"] == before.provenance["data"]
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    values = [event.value for event in events.Scalars("loss/draft")]
    assert np.mean(values[-3:]) < np.mean(values[:3])
    assert json.loads((directory / "config.json").read_text())["policy"]["feature_drafter"]["levels"] == 2


@pytest.mark.parametrize("resume", [False, True])
def test_train_light_draft_keeps_everything_else(
    trained: Path, demonstrations: Path, tmp_path: Path, resume: bool
) -> None:
    before = RsdPolicy.from_pretrained(trained)
    assert before.config.visual_drafter is not None
    visual_drafter = replace(before.config.visual_drafter, layers=1)
    config = TrainDrafterConfig(
        policy=str(trained),
        data=(demonstrations,),
        output=tmp_path,
        device="cpu",
        validation_every=4,
        kind="visual",
        resume_weights=resume,
        **({} if resume else {"visual_drafter": visual_drafter}),
        loss=DrafterLoss(blind=1.0),
        loop=replace(LOOP, learning_rate=1e-5 if resume else 3e-3),
    )
    directory = train_drafter(config)
    after = RsdPolicy.from_pretrained(directory)
    assert after.config == (before.config if resume else replace(before.config, visual_drafter=visual_drafter))
    assert after.model.visual_drafter is not None
    assert before.model.visual_drafter is not None
    new, old = after.model.state_dict(), before.model.state_dict()
    assert all(torch.allclose(new[n], old[n], atol=1e-6) for n in old if not n.startswith("visual_drafter."))
    cameras = [after.model.visual_drafter.cameras.state_dict(), before.model.visual_drafter.cameras.state_dict()]
    moved = max(float((a - b).abs().max()) for a, b in zip(*(part.values() for part in cameras), strict=True))
    assert 0 < moved < 0.01 if resume else moved > 0.01  # it started from the weights there, or afresh
    assert after.provenance["visual_drafter"]["training"]["loss"]["blind"] == 1.0
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    if not resume:
        values = [event.value for event in events.Scalars("loss/visual_regress")]
        assert np.mean(values[-3:]) < np.mean(values[:3])


def test_weights_that_are_not_there_are_not_resumed(
    config: TrainPolicyConfig, demonstrations: Path, tmp_path: Path
) -> None:
    without = replace(
        config, policy=replace(config.policy, visual_drafter=None), loop=replace(LOOP, steps=1), output=tmp_path
    )
    directory = train_policy(without)
    with pytest.raises(RsdError, match="has no visual drafter"):
        train_drafter(
            TrainDrafterConfig(
                policy=str(directory),
                data=(demonstrations,),
                output=tmp_path / "d",
                device="cpu",
                kind="visual",
                resume_weights=True,
            )
        )


# what the commands share


@pytest.mark.parametrize(("every", "held_out"), [(2, [1, 3, 5, 7, 9, 11]), (5, [4, 9]), (40, [11])])
def test_whole_episodes_are_held_out(demonstrations: Path, every: int, held_out: list[int]) -> None:
    everything = [(d.source, d.episode) for d in load_demonstrations(demonstrations)]
    training, validation = split(load_demonstrations(demonstrations), every)
    assert [(d.source, d.episode) for d in validation] == [everything[i] for i in held_out]
    rest = [everything[i] for i in range(12) if i not in held_out]
    assert [(d.source, d.episode) for d in training] == rest


def test_impossible_splits_are_refused(demonstrations: Path) -> None:
    everything = list(load_demonstrations(demonstrations))
    with pytest.raises(RsdError, match="at least 2 demonstrations, found 1"):
        split(everything[:1], 40)


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_device("cpu").type == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto").type == "cpu"
    with pytest.raises(RsdError, match="no CUDA device"):
        resolve_device("cuda:0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert resolve_device("auto").type == "cuda"


# corrector


def test_a_corrector_corrects_stale_chunks_of_its_own_policy_alone(
    trained: Path, config: TrainPolicyConfig, demonstrations: Path, tmp_path: Path
) -> None:
    assert config.policy.visual_drafter is not None
    sizes = {"policy": str(trained), "data": (demonstrations,), "device": "cpu", "validation_every": 4}
    job = TrainCorrectorConfig(**sizes, output=tmp_path / "run", corrector=config.policy.visual_drafter, loop=LOOP)
    policy, target = RsdPolicy.from_pretrained(trained, decode="l1"), weights_hash(trained)
    fresh = train_corrector(replace(job, output=tmp_path / "fresh", loop=replace(LOOP, steps=0)))
    alone, corrected = (CorrectedPolicy(policy, path, target) for path in (fresh, train_corrector(job)))
    report = read_corrector(tmp_path / "run" / "checkpoint", target).provenance["validation"]
    assert 0.0 < report["motion"] < 0.95 * report["uncorrected"]
    episode = list(load_demonstrations(demonstrations))[3]  # held out
    assert episode.images is not None
    observations = [Observation(*seen, episode.instruction) for seen in zip(episode.images, episode.state, strict=True)]
    chunks = [alone.predict(observations[0]).actions, alone.predict(observations[2]).actions]
    for index, before in ((2, True), (0, False), (5, False)):
        now = alone.correct(observations[index], index, before)
        assert now == pytest.approx(chunks[not before][index], abs=1e-6)
    corrected.predict(observations[0])
    now = corrected.correct(observations[5], 5, False)
    assert np.abs(now - chunks[0][5]).max() > 1e-4
    assert np.array_equal(now, corrected.correct(observations[5], 5, False))
    with pytest.raises(RsdError, match="expected one of this policy, found one trained on the chunks of another"):
        CorrectedPolicy(policy, fresh, "0" * 64)
    with pytest.raises(RsdError, match=r"expected a directory with corrector\.json .*, found one without"):
        CorrectedPolicy(policy, trained, target)
    (fresh / "model.safetensors").write_bytes((fresh / "model.safetensors").read_bytes()[:-1])
    with pytest.raises(RsdError, match=r"model\.safetensors"):
        CorrectedPolicy(policy, fresh, target)
