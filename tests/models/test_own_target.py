"""A target of one's own, as docs/architecture.md says that it is written: three methods, and every decoder runs."""

import pytest
import torch
from torch import Tensor, nn

from rsd.decoding.acceptance import acceptance_rule
from rsd.decoding.decoders import DECODERS
from rsd.decoding.primitives import Primitives
from rsd.decoding.state import EpisodeState, PolicyInput
from rsd.models.feature_drafter import DrafterConfig, FeatureDrafter
from rsd.models.target import STATE_FEATURES, BlockTarget
from rsd.models.trunk import KVCache, Trunk
from rsd.tokenizer.rfsq import RfsqConfig

DIM, HORIZON, MOTION, CODE = 32, 4, 3, RfsqConfig(levels=4)


class StateTarget(BlockTarget):
    """It acts by the robot's state alone."""

    def __init__(self) -> None:
        super().__init__(CODE, HORIZON, MOTION)
        self.state_in = nn.Linear(STATE_FEATURES, DIM)
        self._add_blocks(DIM, lambda: Trunk(DIM, layers=2, heads=2))

    def encode_text(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        return ids.float(), ids.float()

    def embed_prefix(self, images: Tensor, state: Tensor, text: tuple[Tensor, Tensor]) -> Tensor:
        return self.state_in(self.normalise(state)).unsqueeze(1)

    def _prefill(self, prefix: Tensor, queries: Tensor, apart: bool = False) -> tuple[list[Tensor], KVCache]:
        cache = KVCache()
        self.trunk(prefix, cache)
        own = self._block_mask(queries.shape[1] // HORIZON, prefix.device, apart)
        mask = torch.cat([own.new_ones(len(own), prefix.shape[1]), own], dim=1)
        return list(self.trunk(queries, cache, mask).split(HORIZON, dim=1)), cache


def decoded(decode: str, rule: str, fine: str, seed: int) -> tuple[Tensor | None, Tensor]:
    torch.manual_seed(seed)
    target = StateTarget().double()
    drafter = FeatureDrafter(DrafterConfig(levels=2, dim=32), CODE, HORIZON, MOTION, DIM)
    nn.init.normal_(target.level_head.weight)  # fresh ones say nearly the same of everything
    seen = PolicyInput(torch.zeros(1), torch.randn(1, STATE_FEATURES, dtype=torch.float64), (torch.zeros(1, 1),) * 2)
    ops = Primitives(target.eval(), drafter.double().eval(), acceptance_rule(rule, CODE), fine)
    with torch.inference_mode():
        result = DECODERS[decode].decode(ops, seen, EpisodeState())
    ops.check()
    return result.motion, result.value


@pytest.mark.parametrize("seed", range(3))
def test_exact_speculation_gives_the_tokens_of_ar(seed: int) -> None:
    expected, found = decoded("ar", "exact", "sequential", seed)[0], decoded("rsd", "exact", "sequential", seed)[0]
    assert expected is not None
    assert found is not None
    assert torch.equal(found, expected)
    assert len(expected.unique()) > 2


@pytest.mark.parametrize("decode", [name for name, entry in DECODERS.items() if not entry.visual])
def test_every_decoder_without_a_visual_drafter_runs(decode: str) -> None:
    assert decoded(decode, "margin", "regress", 0)[1].shape == (1, HORIZON * MOTION)


def test_what_a_target_has_to_have_of_its_own_is_said_where_it_lacks() -> None:
    with pytest.raises(TypeError, match=r"_prefill.*embed_prefix.*encode_text"):
        BlockTarget(CODE, HORIZON, MOTION)  # type: ignore[abstract]
