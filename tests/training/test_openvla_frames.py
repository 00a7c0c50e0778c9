"""Frames as OpenVLA's own pipeline gives them, in batches of one prompt length, dealt to processes."""

from pathlib import Path

import numpy as np
import pytest
import torch

from openvla_checkpoint import write_checkpoint, write_heads
from rsd.data.demonstrations import load_demonstrations
from rsd.models.target import state_features
from rsd.models.text import word_ids
from rsd.targets.openvla.policy import OpenVlaPolicy, read_normalisation
from rsd.targets.openvla.prompt import Prompt
from rsd.targets.openvla.rsd_policy import OpenVlaRsdConfig
from rsd.targets.openvla.statistics import Statistics
from rsd.tokenizer.action_tokenizer import ActionTokenizer
from rsd.training.dataset import Augmentation
from rsd.training.openvla import OpenVlaFrames, pick, survey
from rsd.training.policy import episode_numbers
from rsd.types import Observation, RsdError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_heads(write_checkpoint(tmp_path_factory.mktemp("base")))


@pytest.fixture(scope="module")
def frames(base: Path, openvla_demonstrations: Path) -> OpenVlaFrames:
    statistics = Statistics.load(base)
    found = statistics.state(statistics.key(None))
    sizes = OpenVlaRsdConfig(state_low=tuple(found.low.tolist()), state_high=tuple(found.high.tolist()))
    chosen = pick([openvla_demonstrations], range(4))
    return OpenVlaFrames(chosen, 8, CPU, sizes, Prompt(base), read_normalisation(base))


def test_a_batch_is_what_the_policy_would_see(frames: OpenVlaFrames, base: Path, openvla_demonstrations: Path) -> None:
    episode = list(load_demonstrations(openvla_demonstrations))[2]
    assert episode.images is not None
    observation = Observation(episode.images[5], episode.state[5], episode.instruction)
    batch = frames.batch(torch.tensor([2 * 24 + 5]))
    policy = OpenVlaPolicy.from_pretrained(base)
    torch.testing.assert_close(batch.images, policy._pixels(observation.images), rtol=0, atol=1e-6)
    torch.testing.assert_close(batch.state[:, :8], policy._state(observation, None), rtol=0, atol=1e-6)
    torch.testing.assert_close(batch.state[:, 8:], state_features(torch.from_numpy(observation.state[None])))
    assert torch.equal(batch.words[:, :32], word_ids([observation.instruction]))
    assert batch.words[0, 32:].tolist() == policy.prompt.ids(observation.instruction)
    np.testing.assert_array_equal(batch.chunk[0].numpy(), episode.labels[5:13])


def test_the_prompts_of_a_batch_are_of_one_length_and_all_are_drawn(frames: OpenVlaFrames) -> None:
    torch.manual_seed(0)
    drawn = set()
    for _ in range(20):
        batch = frames.batch(*frames.draw(4, 3), augment=Augmentation())
        drawn.add(batch.words.shape[1])
        assert batch.paired
        assert batch.images.shape == (4, 2, 6, 224, 224)
    assert drawn == {32 + len(ids) for ids in frames.prompts}
    assert len(drawn) == 2
    parts = frames.spread(20, 3)
    assert sum(map(len, parts)) == 20
    assert all(len(part) <= 3 and len(frames.length[part].unique()) == 1 for part in parts)


def test_augmentation_moves_the_crop_and_the_colours(frames: OpenVlaFrames) -> None:
    """The demonstrations' images are of one grey but for a corner, so the middle shows the colours alone."""
    frame = torch.tensor([3])
    plain = frames.batch(frame).images
    still = frames.batch(frame, augment=Augmentation(0, 0.0, 0.0, 0.0, 0.0))
    torch.testing.assert_close(still.images, plain, rtol=0, atol=1e-5)
    other = frames.batch(frame, augment=Augmentation(0, 0.2, 0.0, 0.0, 0.5))
    assert (other.images - plain)[..., 100:120, 100:120].abs().min() > 0
    assert not torch.equal(other.state, still.state)


def test_every_demonstration_goes_to_one_process_or_is_held_out() -> None:
    dealt = [episode_numbers(11, 5, rank, 3) for rank in range(3)]
    assert all(held_out == [4, 9] for _, held_out in dealt)
    assert sorted(number for mine, _ in dealt for number in mine) == [0, 1, 2, 3, 5, 6, 7, 8, 10]
    assert [len(mine) for mine, _ in dealt] == [3, 3, 3]
    with pytest.raises(RsdError, match="2 demonstrations for 3 processes; start fewer"):
        episode_numbers(3, 40, 0, 3)


def test_a_survey_reads_no_images(openvla_demonstrations: Path, states_only: Path, tokenizer: ActionTokenizer) -> None:
    seen = survey([openvla_demonstrations, states_only], tokenizer)
    assert seen.frames == [24] * 10
    assert seen.states.shape == (240, 8)
    assert len(seen.instructions) == 2
