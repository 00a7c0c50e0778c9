"""From rollouts to a calibration in the checkpoint, with a tiny random policy and the scripted simulator."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from scripted import SCRIPTED, episode

from rsd import manifest
from rsd.checkpoint import weights_hash
from rsd.decoding.calibration import FILE_NAME, SkipCalibration
from rsd.evaluation.backend import describe_checkpoint, worker_policy
from rsd.evaluation.calibrate import SCORE, CalibrateConfig, calibrate, chunk_stat, deviations, fit
from rsd.evaluation.config import EvalConfig
from rsd.evaluation.evaluate import evaluate
from rsd.evaluation.results import EPISODES_FILE, EpisodeResult, read_episodes
from rsd.locks import exclusive
from rsd.models.bundle import PolicyConfig, RsdModel
from rsd.policy import RsdPolicy
from rsd.tokenizer.action_tokenizer import ActionTokenizer
from rsd.types import RsdError

BACKEND = replace(SCRIPTED, make_policy=worker_policy, describe_policy=describe_checkpoint)


@pytest.fixture(scope="module")
def checkpoint(
    make_model: Callable[[int], RsdModel],
    tokenizer: ActionTokenizer,
    tiny_config: PolicyConfig,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    model = make_model(3)
    assert model.visual_drafter is not None
    for gripper in (model.target.gripper_head, model.visual_drafter.levels.gripper_head):
        gripper.bias.data.fill_(-100.0)  # open throughout
    folder = tmp_path_factory.mktemp("calibrate") / "checkpoint"
    RsdPolicy.of(model, tokenizer, tiny_config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def config(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> CalibrateConfig:
    return CalibrateConfig(
        policy=str(checkpoint),
        num_trials=6,
        alpha=0.3,
        delta=0.3,
        epsilon_mm=10_000.0,
        tried_mm=10_000.0,
        max_skips=2,
        num_workers="2",
        overwrite=True,
        output=tmp_path_factory.mktemp("rollouts"),
    )


def test_a_calibration_has_its_folder_for_itself(config: CalibrateConfig, tmp_path: Path) -> None:
    with exclusive(tmp_path), pytest.raises(RsdError, match="another run is writing here"):
        calibrate(replace(config, output=tmp_path), BACKEND)
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_that_cannot_be_written_to_is_found_before_the_rollouts(
    config: CalibrateConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: str(path) != config.policy)
    with pytest.raises(RsdError, match=r"calibrate: not permitted to write into .*; calibrate a copy of it"):
        calibrate(replace(config, output=tmp_path / "out"), BACKEND)
    assert not list(tmp_path.iterdir())


def test_a_calibration_is_written_used_and_checked(checkpoint: Path, config: CalibrateConfig, tmp_path: Path) -> None:
    with pytest.raises(RsdError, match=r"needs a skip_calibration.json, found none; make it with `rsd calibrate`"):
        RsdPolicy.from_pretrained(checkpoint, decode="rsd-skip")

    calibration = calibrate(config, BACKEND)
    assert SkipCalibration.load(checkpoint) == calibration
    assert calibration.weights_sha256 == weights_hash(checkpoint)
    assert (calibration.episodes, calibration.execute) == (36, 8)
    assert calibration.threshold > 0  # nothing deviates by ten metres
    assert calibration.empirical_risk == 0

    run = EvalConfig(
        policy=str(checkpoint), decode="rsd-skip", num_trials=2, audit=True, num_workers="1", output=str(tmp_path)
    )
    evaluate(run, backend=BACKEND)
    for result in read_episodes(tmp_path / EPISODES_FILE).values():
        skipped, scores = (chunk_stat(result, name) for name in ("skipped", SCORE))
        assert result.prefills == result.chunks - skipped.sum()
        assert not (skipped[:-2] * skipped[1:-1] * skipped[2:]).any()  # the target looks after two at the latest
        assert (scores[skipped == 1] < calibration.threshold).all()
        assert len(chunk_stat(result, "deviation_mm")) == result.chunks
    assert any(sum(chunk_stat(r, "skipped")) for r in read_episodes(tmp_path / EPISODES_FILE).values())

    mine = calibration.weights_sha256
    replace(calibration, weights_sha256="0" * 64).save(checkpoint)
    with pytest.raises(RsdError, match="skip calibration: made for weights 000000000000, found"):
        RsdPolicy.from_pretrained(checkpoint, decode="rsd-skip")
    replace(calibration, weights_sha256=mine).save(checkpoint)


def test_other_promises_need_no_new_rollouts(config: CalibrateConfig, checkpoint: Path) -> None:
    rolled = calibrate(config, BACKEND)
    lines = (config.output / EPISODES_FILE).read_text()
    strict = calibrate(replace(config, epsilon_mm=1e-6), BACKEND)
    assert (config.output / EPISODES_FILE).read_text() == lines
    assert strict.threshold == 0 < rolled.threshold
    rolled.save(checkpoint)


def test_a_checkpoint_keeps_the_calibration_that_it_has_unless_it_may_be_replaced(
    config: CalibrateConfig, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = calibrate(config, BACKEND)
    before = (checkpoint / FILE_NAME).read_bytes()
    other = calibrate(replace(config, epsilon_mm=1e-6, overwrite=False), BACKEND)
    assert (checkpoint / FILE_NAME).read_bytes() == before
    assert other.threshold < own.threshold
    assert SkipCalibration.load(config.output) == other
    assert "keeps its own, which --overwrite replaces" in capsys.readouterr().out
    (checkpoint / FILE_NAME).unlink()
    manifest.seal(checkpoint)
    calibrate(replace(config, overwrite=False), BACKEND)
    assert (checkpoint / FILE_NAME).read_bytes() == before


def test_a_rollout_that_errs_costs_itself_and_many_of_them_the_calibration(
    config: CalibrateConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calibrate(config, BACKEND)
    found = read_episodes(config.output / EPISODES_FILE)
    for errors in (1, 3):
        broken = {key: replace(found[key], success=False, failure="error: diverged") for key in list(found)[:errors]}
        summary = SimpleNamespace(errors=errors, episodes=len(found))
        monkeypatch.setattr("rsd.evaluation.calibrate.evaluate", lambda *_, summary=summary, **__: summary)
        monkeypatch.setattr("rsd.evaluation.calibrate.read_episodes", lambda _, broken=broken: {**found, **broken})
        if errors == 1:
            assert calibrate(config, BACKEND).episodes == len(found) - 1
            assert "1 of 36 rollouts ended in an error and are left out" in capsys.readouterr().out
        else:
            with pytest.raises(RsdError, match="3 of 36 rollouts ended in an error, see"):
                calibrate(config, BACKEND)


def test_a_wrong_promise_is_refused_before_any_rollout(config: CalibrateConfig, tmp_path: Path) -> None:
    for change in ({"alpha": 1.5}, {"max_skips": 0}, {"test": "t"}):
        with pytest.raises(RsdError, match=r"^(alpha|max_skips|test): expected"):
            calibrate(replace(config, output=tmp_path / "none", **change), BACKEND)
    with pytest.raises(RsdError, match="expected a checkpoint directory to write into, found 'some/body'"):
        calibrate(replace(config, policy="some/body"), BACKEND)
    assert not (tmp_path / "none").exists()


def test_tasks_of_little_risk_do_not_vouch_for_the_others() -> None:
    """Task after task, betting would promise what a random order does not (true mean risk 0.25, promised 0.1)."""
    rollouts = [
        episode(
            task_id=task,
            init_state=trial,
            chunks=1,
            chunk_stats={SCORE: [1.0], "deviation_mm": [100.0 if task >= 15 else 0.0], "forced": [0.0]},
        )
        for task in range(20)
        for trial in range(10)
    ]
    calibration = fit(rollouts, CalibrateConfig(epsilon_mm=50.0), "0" * 64)
    assert calibration.threshold == 0.0


def test_the_promise_is_kept_in_every_suite_by_itself(
    config: CalibrateConfig, checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Together, easy rollouts vouch for the hard ones: every chunk of them all might go without the target."""

    def rollouts(suite: str, count: int, hard: int) -> list[EpisodeResult]:
        return [
            episode(
                suite=suite,
                init_state=trial,
                chunks=2,
                acceptance="residual",
                chunk_stats={
                    SCORE: [1.0, 3.0],
                    "deviation_mm": [0.0, 100.0 if trial < hard else 0.0],
                    "forced": [0.0, 0.0],
                    "skipped": [1.0, 1.0],
                },
            )
            for trial in range(count)
        ]

    easy, hard = rollouts("libero_goal", 150, 0), rollouts("libero_10", 40, 20)
    promise = replace(config, alpha=0.1, delta=0.1, epsilon_mm=50.0)
    strict, loose, pooled = (
        fit(episodes, promise, "0" * 64) for episodes in (hard, easy, [replace(e, suite="both") for e in easy + hard])
    )
    assert 1.0 < strict.threshold <= 3.0 < loose.threshold == pooled.threshold
    monkeypatch.setattr("rsd.evaluation.calibrate.evaluate", lambda *_, **__: SimpleNamespace(errors=0, episodes=190))
    monkeypatch.setattr("rsd.evaluation.calibrate.read_episodes", lambda _: {e.key: e for e in easy + hard})
    asked = replace(promise, task_suite="libero_goal,libero_10", num_trials=6, output=config.output / "suites")
    found = calibrate(asked, BACKEND)
    assert (found.suites, found.threshold, found.acceptance) == (asked.task_suite, strict.threshold, "residual")
    assert (found.episodes, found.chunks) == (40, 80)
    said = capsys.readouterr().out
    assert "libero_goal: 150 rollouts, 300 chunks; threshold 3.0 mm (no threshold failed): 100.0%" in said
    assert "by that: libero_goal 50.0%, libero_10 50.0%" in said
    policy = RsdPolicy.from_pretrained(checkpoint, decode="rsd-skip")  # as it was calibrated
    assert policy.acceptance == "residual"
    with pytest.raises(RsdError, match="residual and fine regress, found acceptance margin; leave it out"):
        RsdPolicy.from_pretrained(checkpoint, decode="rsd-skip", acceptance="margin")
    assert RsdPolicy.from_pretrained(checkpoint, decode="rsd-fused").acceptance == "margin"


def test_rules_that_take_steps_are_refused(config: CalibrateConfig) -> None:
    with pytest.raises(RsdError, match="acceptance 'exact' decodes the fine levels one after another"):
        calibrate(replace(config, acceptance="exact"), BACKEND)


def test_too_few_rollouts_are_noticed_before_they_are_made(config: CalibrateConfig, tmp_path: Path) -> None:
    asked = replace(config, alpha=0.01, num_trials=6, output=tmp_path / "none")
    with pytest.raises(RsdError, match=r"takes \d+ rollouts of each suite, libero_spatial would have 36; raise"):
        calibrate(asked, BACKEND)
    assert not (tmp_path / "none").exists()


def test_rollouts_by_two_rules_are_refused() -> None:
    rollouts = [episode(init_state=i, acceptance=rule) for i, rule in enumerate(("margin", "residual"))]
    with pytest.raises(RsdError, match=r"expected rollouts of one suite by one acceptance rule, found 2 of"):
        fit(rollouts, CalibrateConfig(), "0" * 64)


def test_another_gripper_symbol_is_a_deviation() -> None:
    stats = {"deviation_mm": [1.0, 2.0], "gripper_differs": [0.0, 1.0]}
    assert deviations(episode(chunks=2, chunk_stats=stats)).tolist() == [1.0, 1e6]


def test_rollouts_without_the_statistics_are_refused() -> None:
    with pytest.raises(RsdError, match="has no deviation_mm of every chunk; roll out with rsd-skip and --audit"):
        chunk_stat(episode(chunk_stats={"deviation_mm": [None]}), "deviation_mm")


def test_the_calibration_names_a_run(checkpoint: Path, config: CalibrateConfig) -> None:
    calibrate(config, BACKEND)
    assert FILE_NAME in {path.name for path in checkpoint.iterdir()}
    described = describe_checkpoint(EvalConfig(policy=str(checkpoint), decode="rsd-skip"))
    assert described["skip_calibration"] == SkipCalibration.load(checkpoint).to_json()
    assert "skip_calibration" not in describe_checkpoint(EvalConfig(policy=str(checkpoint), decode="rsd-fused"))
