"""Our code with what no policy uses: networks, a refiner, a budget of bits."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rsd.tokenizer.action_tokenizer import ActionTokenizer, TokenizerConfig
from rsd.tokenizer.rfsq import Rfsq, RfsqConfig
from rsd.types import RsdError
from studies.tokenizers.extended import AUTOENCODERS, BudgetRfsq, Extension, fit
from studies.tokenizers.learned import LearnConfig, train

SMALL = LearnConfig(hidden=64, steps=300, batch_size=128)


def test_the_refiner_lowers_every_prefixes_error_on_other_chunks(chunks: np.ndarray, other_chunks: np.ndarray) -> None:
    plain = ActionTokenizer.fit(chunks, TokenizerConfig(levels=4))
    refined = fit(chunks, TokenizerConfig(levels=4), Extension(refine=True, learn=SMALL))
    others = torch.from_numpy(other_chunks)
    tokens = plain.encode(others)
    assert torch.equal(refined.encode(others).motion, tokens.motion)
    for level in range(1, 4):
        error = [float(((each.decode(tokens, level) - others) ** 2).mean()) for each in (plain, refined)]
        assert error[1] < 0.95 * error[0]
    z_hat = plain.rfsq.dequantise(tokens.motion)
    assert refined.refiner is not None
    moved = (refined.refiner(z_hat, 4) - z_hat).abs().max()
    assert moved <= 0.5 * plain.rfsq.step(4) + 1e-6
    assert torch.equal(refined.decode(tokens, 0), plain.decode(tokens, 0))
    assert torch.equal(refined.decode(tokens), refined.forward(others)[1])


@pytest.mark.parametrize("transform", AUTOENCODERS)
def test_autoencoders_decode_every_prefix(chunks: np.ndarray, other_chunks: np.ndarray, transform: Any) -> None:
    tokenizer = fit(chunks, TokenizerConfig(levels=3, rho=3.0), Extension(transform, channels=8, learn=SMALL))
    others = torch.from_numpy(other_chunks)
    tokens, seen = tokenizer.forward(others)
    assert tokens.motion.shape == (300, 3, 8 * 8)
    assert tokenizer.motion_dim == 8
    assert torch.equal(tokenizer.decode(tokens), seen)
    errors = [float((tokenizer.decode(tokens, level) - others)[..., :-1].square().mean()) for level in range(4)]
    assert errors == sorted(errors, reverse=True)
    assert errors[3] < 0.25 * errors[0]


def test_a_fit_can_be_repeated_and_leaves_the_random_state_alone(chunks: np.ndarray) -> None:
    config, extension = TokenizerConfig(levels=2), Extension(refine=True, learn=LearnConfig(hidden=16, steps=5))
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    first = fit(chunks, config, extension)
    assert torch.equal(torch.rand(1), expected)
    second = fit(chunks, config, extension)
    batch = torch.from_numpy(chunks[:5])
    assert torch.equal(first.forward(batch)[1], second.forward(batch)[1])


def test_a_budget_is_kept_and_well_spent(chunks: np.ndarray) -> None:
    batch, errors = torch.from_numpy(chunks), []
    for bits in (30.0, 60.0, 120.0):
        tokenizer = fit(chunks, TokenizerConfig(symbols=3, rho=3.0, levels=6), Extension(bits=bits))
        assert 0.8 * bits < tokenizer.token_count * math.log2(3) <= bits
        tokens, decoded = tokenizer.forward(batch)
        assert tokenizer.active is not None
        assert (tokens.motion[:, tokenizer.active == 0] == 1).all()
        errors.append(float(((decoded - batch) / 1).square().mean()))
    assert errors[0] > 2 * errors[1] > 4 * errors[2]


def test_scalars_without_a_token_at_a_level_pass_it_by() -> None:
    code = RfsqConfig(3, 3, 3.0)
    active = torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0], [1.0, 1.0, 0.0]])
    rfsq = BudgetRfsq(Rfsq(code), active)
    x = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
    symbols, z_hat = rfsq.quantise(x)
    assert (symbols[:, active == 0] == code.half).all()
    assert torch.equal(rfsq.dequantise(symbols), z_hat)
    reach = rfsq.reach()
    assert isinstance(reach, Tensor)
    assert reach.tolist() == pytest.approx([1 + 1 / 3 + 1 / 9 + 1 / 18, 1 / 3 + 1 / 9 + 1 / 18, float("inf")])
    inside = (x.abs() <= reach)[:, :2]
    assert ((z_hat - x).abs()[:, :2][inside] <= 1 / 18 + 1e-6).all()
    assert ((z_hat - x).abs()[:, :2][~inside] > 1 / 18).all()


def test_what_cannot_be_is_refused(chunks: np.ndarray) -> None:
    with pytest.raises(RsdError, match="refine with a linear transform"):
        Extension("step-autoencoder", refine=True)
    with pytest.raises(RsdError, match="channels: expected an integer from 1 to 1024, found 0"):
        Extension(channels=0)
    with pytest.raises(RsdError, match=r"expected at least 2.81, one token of 7 symbols"):
        fit(chunks, TokenizerConfig(), Extension(bits=1.0))


def test_a_learning_that_diverges_is_an_error() -> None:
    net = torch.nn.Linear(2, 2)
    with pytest.raises(RsdError, match="diverged"):
        train(net, torch.ones(10, 2), lambda sample, _: net(sample).sum() * float("nan"), LearnConfig(steps=2))
