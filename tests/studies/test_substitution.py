import json
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from goldens.golden_cases import episodes
from rsd.data.demonstrations import Demonstration
from rsd.policy import RsdPolicy
from rsd.sim.suites import suite_tasks
from rsd.types import EAGER, RsdError
from studies import substitution as study
from studies.config import SubstitutionConfig
from studies.substitution import (
    ALL,
    INSTRUCTION,
    LOOK_ALIKE,
    OWN,
    RULES,
    SCENE,
    WHOLE_RULES,
    Columns,
    Judgement,
    Moment,
    judge_all,
    judgement,
    spread_frames,
)

CHECKPOINT = Path(__file__).parents[2] / "checkpoints" / "libero"


JUDGED = ("blind(0.95)", "blind(0.95,moving)", "agreement(0.7)")


class Found(NamedTuple):
    """own_stand, wrong_stand: shares of the tokens that stand of the own drafts and of those for other instructions."""

    judgement: Judgement
    own_stand: float
    wrong_stand: float


@pytest.fixture(scope="module")
def found() -> dict[str, Found]:
    """What the shipped policy makes by each rule of drafts for other instructions; by "" by its own rule."""
    observations = [observation for episode in episodes() for observation in episode]
    sentences = [task.language for task in suite_tasks("libero_spatial")]
    others = [
        next(s for s in sentences[i % len(sentences) :] + sentences if s != observation.instruction)
        for i, observation in enumerate(observations)
    ]
    policy = RsdPolicy.from_pretrained(CHECKPOINT, decode="rsd-fused", engine=EAGER)
    pairs = zip(map(Moment, observations), others, strict=True)
    frames = [{OWN: own, INSTRUCTION: own.asking(other)} for own, other in pairs]
    rules = {*JUDGED, policy.acceptance}
    judged = {
        rule: Found(judgement(of[INSTRUCTION], 0.0), *(float(of[kind].tokens.mean()) for kind in (OWN, INSTRUCTION)))
        for rule, of in judge_all(policy.core, frames, rules, len(frames)).items()
    }
    return {**judged, "": judged[policy.acceptance]}


@pytest.mark.parametrize(("rule", "most"), [("blind(0.95)", 0.10), ("blind(0.95,moving)", 0.08)])
def test_a_wrong_draft_hardly_moves_what_a_verifying_rule_executes(
    rule: str, most: float, found: dict[str, Found]
) -> None:
    assert found[rule].judgement.draft_pull <= most
    assert found[rule].judgement.apart > 0.1  # the drafts are wrong indeed
    assert found[rule].own_stand > found[rule].wrong_stand


def test_the_default_rule_of_the_shipped_policy_verifies(found: dict[str, Found]) -> None:
    assert found[""].judgement.draft_pull <= 0.10


def test_a_rule_that_executes_what_it_was_told_is_found_out(found: dict[str, Found]) -> None:
    assert found["agreement(0.7)"].judgement.draft_pull > 0.10  # a training with wrong drafts leaves this much of 0.66
    assert found["agreement(0.7)"].wrong_stand > 0.9


def demonstration(number: int, thing: str, asked: tuple[str, ...], every: int = 4) -> Demonstration:
    rng = np.random.default_rng(number)
    images = rng.integers(0, 255, (10, 2, 32, 32, 3), dtype=np.uint8)
    actions = rng.uniform(-1, 1, (10 * every, 7)).astype(np.float32)
    state = rng.normal(0, 0.3, (10 * every, 8)).astype(np.float32)
    asks = tuple((f"pick up the {each}", f"{each}_1") for each in asked)
    names = {"task": "t", "episode": f"demo_{number}", "instruction": f"pick up the {thing}", "source": Path("d.hdf5")}
    return Demonstration(
        **names, images=images, state=state, actions=actions, labels=actions, success_step=9,
        target_object=f"{thing}_1", placement_seed=number, image_every=every, asks=asks,
    )  # fmt: skip


SOME = (demonstration(0, "milk", ("milk", "orange_juice", "butter")), demonstration(1, "ketchup", ("ketchup", "milk")))


def test_drafts_are_made_for_what_the_scene_and_its_neighbour_have() -> None:
    frames = spread_frames(SOME, 1000, steps_before=8)
    assert len(frames) == 20
    first, third, of_ketchup = frames[0], frames[2], frames[12]
    assert first[OWN].before is None  # the target had not looked before an episode's second chunk
    assert third[OWN].before is not None
    assert np.array_equal(third[OWN].before.images, first[OWN].now.images)
    assert {frame[INSTRUCTION].now.instruction for frame in frames[:10]} == {
        "pick up the orange_juice",
        "pick up the butter",
    }
    assert third[LOOK_ALIKE] == third[OWN].asking("pick up the orange_juice")
    assert LOOK_ALIKE not in of_ketchup
    assert of_ketchup[SCENE].now.instruction == "pick up the milk"
    assert np.array_equal(of_ketchup[SCENE].now.images, third[OWN].now.images)
    without = [replace(each, asks=()) for each in SOME]  # of a stock suite: what the others ask for
    assert spread_frames(without, 1, 0)[0][INSTRUCTION].now.instruction == "pick up the ketchup"
    with pytest.raises(RsdError, match="expected images of every n-th step with n a divisor of 6, found every 4"):
        spread_frames(SOME, 1, steps_before=6)
    with pytest.raises(RsdError, match="states only, without images; run `rsd demos render`"):
        spread_frames([replace(SOME[0], images=None)], 1, 0)


def test_right_and_wrong_drafts_are_counted_apart() -> None:
    columns = Columns(
        apart=torch.tensor([0.1, 0.3, 0.4]),
        draft_mm=torch.tensor([10.0, 90.0, 200.0]),
        moved=torch.tensor([0.0, 0.1, 0.1]),
        executed_mm=torch.tensor([0.0, 80.0, 20.0]),
        tokens=torch.tensor([1.0, 0.9, 0.5]),
        whole=torch.tensor([True, False, False]),
    )
    found = judgement(columns, epsilon_mm=75.0)
    assert found.draft_pull == pytest.approx(0.25)
    assert (found.right.drafts, found.right.chunks_stand, found.right.executed_beyond) == (1, 1.0, 0.0)
    assert (found.wrong.drafts, found.wrong.chunks_stand, found.wrong.executed_beyond) == (2, 0.0, 0.5)
    assert found.wrong.tokens_stand == pytest.approx(0.7)


def test_the_command_judges_every_rule_on_every_kind_of_draft(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(study, "load_demonstrations", lambda folder, max_per_task: SOME)
    config = SubstitutionConfig((tmp_path,), str(checkpoint), frames=6, batch=4, output=tmp_path / "found.json")
    record = study.measure_substitution(config)
    assert tuple(record.judged) == (*WHOLE_RULES, *RULES)
    for kinds in record.judged.values():
        assert tuple(kinds) == (OWN, INSTRUCTION, LOOK_ALIKE, SCENE, ALL)
        assert [one.right.drafts + one.wrong.drafts for one in kinds.values()] == [6, 6, 3, 6, 15]
    assert json.loads((tmp_path / "found.json").read_text())["judged"]["margin"][ALL]["draft_pull"] >= 0
    assert "draft pull, 6 frames of 2 demonstrations; right: within 75 mm of own" in capsys.readouterr().out
    study.measure_substitution(config)  # its own file may be replaced
    (tmp_path / "found.json").write_text("{}")
    with pytest.raises(RsdError, match="exists already"):
        study.measure_substitution(config)
