"""The mean of several policies: of their weights, with all that they were taught in its record."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from refusals import tree
from rsd import manifest
from rsd.checkpoint import save_checkpoint
from rsd.cli import dispatch
from rsd.evaluation.cautions import trained_on
from rsd.models.bundle import PolicyConfig, RsdModel
from rsd.policy import RsdPolicy
from rsd.tokenizer.action_tokenizer import ActionTokenizer
from rsd.training.average import average, once
from rsd.types import RsdError

Member = Callable[..., Path]


@pytest.fixture
def member(
    make_model: Callable[[int], RsdModel], tokenizer: ActionTokenizer, tiny_config: PolicyConfig, tmp_path: Path
) -> Member:
    """Saves a policy of that seed that was taught this suite."""

    def make(seed: int, suite: str = "libero_goal", remembered: int = 4, config: Any = tiny_config) -> Path:
        directory = tmp_path / f"member-{seed}"
        model = make_model(1) if config == tiny_config else RsdModel.of(config, tokenizer)
        for weight in model.parameters():  # as if trained on from the same one
            weight.data += 0.1 * (seed - 1) * torch.randn_like(weight) * weight.abs().mean()
        data = {"sources": [{"settings": {"suite": suite}}], "instructions": [f"task of {suite}"]}
        made = {"data": data, "training": {"remembered_chunks": remembered}}
        save_checkpoint(model, tokenizer, config, made, directory)
        return directory

    return make


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return RsdPolicy.from_pretrained(directory, decode="ar").model.state_dict()


def test_the_mean_is_of_the_weights_and_counts_twice_what_is_named_twice(member: Member, tmp_path: Path) -> None:
    one, two = member(1), member(2)
    mean, others = weights(average([one, one, two], tmp_path / "mean")), weights(two)
    for name, value in weights(one).items():
        expected = (2 * value + others[name]) / 3
        assert torch.allclose(mean[name], expected, atol=float(expected.abs().max()) / 100 + 1e-6), name


def test_members_from_before_a_part_was_known_have_a_mean_with_later_ones(member: Member, tmp_path: Path) -> None:
    before, later = member(1), member(2)
    content = json.loads((before / "config.json").read_text())
    del content["policy"]["target"]["committed"]
    (before / "config.json").write_text(json.dumps(content))
    manifest.seal(before)
    assert weights(average([before, later], tmp_path / "mean"))


def test_its_record_holds_what_every_member_was_taught(member: Member, tmp_path: Path) -> None:
    members = [member(1, "libero_goal", 6), member(2, "libero_10", 3)]
    content = json.loads((average(members, tmp_path / "mean") / "config.json").read_text())
    suites, instructions, _ = trained_on(content)
    assert suites == {"libero_goal", "libero_10"}
    assert len(instructions) == 2
    assert content["provenance"]["training"] == {"remembered_chunks": 3}
    records = [each["provenance"] for each in content["provenance"]["average_of"]]
    assert records == [json.loads((each / "config.json").read_text())["provenance"] for each in members]


def test_a_history_that_members_share_is_told_once() -> None:
    begin, first = ({"data": name, "training": {}} for name in "ba")
    second = {**first, "init": begin}
    members: list[Any] = [second, {"data": "c", "training": {}, "init": second}, {"of": [begin]}]
    told = once(members, "average_of", {})
    assert told[0] == members[0]
    assert told[1]["init"] == {"same_as": "average_of.0"}
    assert told[2] == {"of": [{"same_as": "average_of.0.init"}]}


def test_what_has_no_mean_is_refused_and_nothing_written(
    member: Member,
    make_model: Callable[[int], RsdModel],
    tokenizer: ActionTokenizer,
    tiny_config: PolicyConfig,
    tmp_path: Path,
) -> None:
    one, other = member(1), member(2, config=replace(tiny_config, visual_drafter=None))
    with pytest.raises(RsdError, match=r"expected the sizes of .*member-1, found .*continue the same one"):
        average([one, other], tmp_path / "mean")
    save_checkpoint(make_model(7), tokenizer, tiny_config, {}, tmp_path / "unrelated")
    with pytest.raises(RsdError, match=r"near their mean, found \d+% of its size off; only"):
        average([one, tmp_path / "unrelated"], tmp_path / "mean")
    with pytest.raises(RsdError, match="two policies or more, found 1"):
        average([one], tmp_path / "mean")
    before = tree(one)
    with pytest.raises(RsdError, match="expected a new or an empty folder, found files"):
        average([one, other], one)
    assert tree(one) == before
    assert not (tmp_path / "mean").exists()


def test_the_command_says_what_it_made(member: Member, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["checkpoint", "average", str(member(1)), str(member(2)), "--output", str(tmp_path / "mean")]
    assert dispatch(command) == 0
    assert capsys.readouterr().out.strip() == f"{tmp_path / 'mean'}: the mean of 2 policies"
    assert dispatch([*command[:3], "--output", str(tmp_path / "other")]) == 2
    assert "two policies or more, found 1" in capsys.readouterr().err
