"""What of a wrong draft is inherited, on a target of which that is known."""

import json
from pathlib import Path

import numpy as np
import pytest

from rsd.data.demonstrations import Demonstration
from rsd.targets.black_box import Drafter
from rsd.targets.custom import CustomPolicy
from rsd.types import RsdError
from studies import continuing as study
from studies.config import ContinuingConfig
from studies.continuing import doubled, measure_continuing, pull_by_steps
from studies.substitution import INSTRUCTION, OWN, Moment
from targets.conftest import drafter  # noqa: F401
from two_ways import HERE, SEEN, STEPS, WAY, inherited

TWO_WAYS = f"{HERE}:TwoWays"


def test_the_pull_is_what_the_two_ways_give_up(drafter: Drafter) -> None:  # noqa: F811
    pulls = pull_by_steps(CustomPolicy(TWO_WAYS), drafter, [(SEEN, WAY)], (1, 5, 8, STEPS), range(400))
    for pull in pulls:
        assert pull.pairs == 400
        assert pull.draft_pull == pytest.approx(inherited(pull.steps), abs=0.08)
        assert pull.own_spread == pytest.approx(pull.apart, rel=0.15)  # each is half of what WAY and -WAY differ by
    assert pulls[-1].moved == 0.0


def test_the_command_measures_it_on_demonstrations(
    drafter: Drafter,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    frame = {OWN: Moment(SEEN), INSTRUCTION: Moment(SEEN).asking("open the drawer")}
    monkeypatch.setattr(study, "load_demonstrations", lambda folder, max_per_task: list[Demonstration]())
    monkeypatch.setattr(study, "spread_frames", lambda demonstrations, count, before: [frame] * 3)
    config = ContinuingConfig(TWO_WAYS, tmp_path / "drafter", (tmp_path,), output=tmp_path / "found.json")
    record = measure_continuing(config)
    assert [pull.steps for pull in record.pulls] == doubled(STEPS) == [1, 2, 4, 8, STEPS]
    assert record.pulls[-1].draft_pull == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert (found["frames"], found["in_full"], found["pulls"][0]["pairs"]) == (3, STEPS, 6)
    measure_continuing(config)  # its own file is replaced
    for policy, steps, expected in (
        (f"{HERE}:OneWay", (), "expected one that continues"),
        (TWO_WAYS, (11,), "expected at most 10"),
    ):
        with pytest.raises(RsdError, match=expected):
            measure_continuing(ContinuingConfig(policy, tmp_path / "drafter", (tmp_path,), steps=steps))
    assert np.isfinite(record.pulls[0].draft_pull)
