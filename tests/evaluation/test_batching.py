"""What batching changes in a prediction, and what it refuses."""

from collections.abc import Callable

import numpy as np
import pytest

from rsd.evaluation.batching import BatchedRsdPolicy
from rsd.policy import PolicyConfig, RsdModel, RsdPolicy
from rsd.tokenizer.action_tokenizer import ActionTokenizer
from rsd.types import Observation, RsdError


@pytest.fixture
def make_policy(
    make_model: Callable[[int], RsdModel], tokenizer: ActionTokenizer, tiny_config: PolicyConfig
) -> Callable[..., RsdPolicy]:
    return lambda **options: RsdPolicy(make_model(0), tokenizer, tiny_config, **options)


@pytest.mark.parametrize("decode", ["ar", "l1", "rsd", "parallel", "draft"])
def test_a_row_does_not_depend_on_its_batch(
    decode: str, make_policy: Callable[..., RsdPolicy], make_observation: Callable[..., Observation]
) -> None:
    policy = make_policy(decode=decode)
    batched = BatchedRsdPolicy(policy, 4)
    seen = [make_observation(seed, instruction=f"task {seed}") for seed in range(4)]
    together = batched.predict_batch(seen)
    for row, observation in enumerate(seen):
        (alone,) = batched.predict_batch([observation])
        others = batched.predict_batch([seen[row - 1], observation])[1]
        assert np.abs(alone.actions - together[row].actions).max() < 1e-5
        assert np.abs(others.actions - together[row].actions).max() < 1e-5
        single = policy.predict(observation)
        # another shape of the matrices rounds otherwise; a token on the edge of two may even fall the other way
        assert np.abs(single.actions - together[row].actions).mean() < 1e-3
        assert alone.stats.num_accepted_tokens == together[row].stats.num_accepted_tokens
        assert (single.stats.main_passes, single.stats.num_draft_tokens) == (
            together[row].stats.main_passes,
            together[row].stats.num_draft_tokens,
        )


def test_what_cannot_be_batched_is_refused(make_policy: Callable[..., RsdPolicy]) -> None:
    with pytest.raises(RsdError, match=r"--acceptance exact .* leave --batch out"):
        BatchedRsdPolicy(make_policy(decode="rsd", acceptance="exact"), 4)
    policy = make_policy(decode="rsd")
    policy.decode = "rsd-remembers"
    with pytest.raises(RsdError, match="--decode rsd-remembers may keep state from chunk to chunk"):
        BatchedRsdPolicy(policy, 4)


def test_a_batch_has_a_size(
    make_policy: Callable[..., RsdPolicy], make_observation: Callable[..., Observation]
) -> None:
    batched = BatchedRsdPolicy(make_policy(), 2)
    for count in (0, 3):
        with pytest.raises(RsdError, match=f"expected 1 to 2 observations, found {count}"):
            batched.predict_batch([make_observation(i) for i in range(count)])
