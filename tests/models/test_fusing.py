"""What may be compiled: every strategy's pieces are taken whole by PyTorch's compiler and give the same."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from rsd.decoding.decoders import DECODERS
from rsd.models.bundle import PolicyConfig, RsdModel
from rsd.models.fusing import fusible, fusing
from rsd.policy import RsdPolicy
from rsd.tokenizer.action_tokenizer import ActionTokenizer
from rsd.types import EAGER, Observation


class Captured:
    """A compiler that runs what it is given as it is, and counts the operations: those given, and those run."""

    def __init__(self) -> None:
        self.operations = self.run = 0

    def __call__(self, module: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., object]:
        count = sum(node.op.startswith("call") for node in module.graph.nodes)
        self.operations += count

        def run(*args: object) -> object:
            self.run += count
            return module.forward(*args)

        return run


@pytest.fixture(scope="module")
def compiler() -> Captured:
    """One for all decoders: what they share is compiled once."""
    return Captured()


@pytest.fixture(scope="module")
def model(make_model: Callable[[int], RsdModel]) -> RsdModel:
    return make_model(0)


@pytest.mark.parametrize("acceptance", ["margin", "residual"])
@pytest.mark.parametrize("decode", DECODERS)
def test_a_strategy_of_compiled_pieces_acts_as_written(
    model: RsdModel,
    compiler: Captured,
    tokenizer: ActionTokenizer,
    tiny_config: PolicyConfig,
    make_observation: Callable[..., Observation],
    decode: str,
    acceptance: str,
) -> None:
    if acceptance == "residual" and not DECODERS[decode].drafts:
        pytest.skip("accepts nothing")
    config, before = replace(tiny_config, acceptance=acceptance), compiler.run
    plain, pieces = (RsdPolicy.of(model, tokenizer, config, decode=decode, engine=EAGER) for _ in range(2))
    for seed in range(2):
        expected = plain.predict(make_observation(seed))
        with fusing(compiler):
            found = pieces.predict(make_observation(seed))
        assert np.array_equal(found.actions, expected.actions)
        assert found.stats.num_accepted_tokens == expected.stats.num_accepted_tokens
    assert compiler.run - before > 200


def test_outside_of_fusing_nothing_is_compiled_and_within_it_shapes_that_are_known_are_not_compiled_again() -> None:
    compiler = Captured()

    @fusible
    def double(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    double(torch.ones(3))
    assert compiler.operations == 0
    with fusing(compiler):
        assert double(torch.ones(3)).sum() == 6
        double(torch.zeros(3))
        assert compiler.operations == 1
        double(torch.ones(4))
        assert compiler.operations == 2
    double(torch.ones(5))
    assert compiler.operations == 2


def test_what_decides_by_a_tensors_content_is_no_piece() -> None:
    @fusible
    def decides(x: torch.Tensor) -> torch.Tensor:
        return x * 2 if x.sum() > 0 else x

    with fusing(Captured()), pytest.raises(RuntimeError, match="Data-dependent"):
        decides(torch.ones(3))
    assert decides(torch.ones(3)).sum() == 6
