"""The model of the decoders' equivalences."""

from collections.abc import Callable, Iterator

import pytest
import torch

from rsd.models.bundle import RsdModel


@pytest.fixture(scope="module")
def model(make_model: Callable[[int], RsdModel]) -> RsdModel:
    model = make_model(1).double()
    with torch.no_grad():  # fresh weights say nearly the same of every observation, step and level
        for block in (model.target.block, model.feature_drafter.block):
            block.position *= 20
            block.level *= 20
        for layer in model.target.trunk.layers:
            layer.qkv.weight *= 4
            layer.project.weight *= 4
        model.target.level_head.weight *= 10
        model.feature_drafter.level_head.weight *= 10
        model.target.residual_head[2].weight *= 10
    return model


@pytest.fixture
def whole(model: RsdModel) -> Iterator[RsdModel]:
    """The model as one whose target is trained to judge a whole draft in the place of block 1."""
    model.target.whole_block = True
    yield model
    model.target.whole_block = False
