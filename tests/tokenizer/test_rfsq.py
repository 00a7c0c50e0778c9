from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rsd.tokenizer.rfsq import Rfsq, RfsqConfig
from rsd.types import RsdError

CODES = [
    RfsqConfig(8, 7, 2.0),
    RfsqConfig(5, 7, 3.0),
    RfsqConfig(4, 7, 4.0),
    RfsqConfig(3, 7, 7.0),
    RfsqConfig(6, 5, 2.5),
    RfsqConfig(1, 3, 3.0),
]
codes = st.sampled_from(CODES)
first_steps = st.floats(2.0**-10, 10.0, width=32)
scalars = st.lists(st.floats(-1.0, 1.0, width=32), min_size=1, max_size=6)
SLACK = 1e-5  # float32 rounding, in first steps


def quantiser(code: RfsqConfig, first_step: float = 1.0) -> Rfsq:
    return Rfsq(code, first_step)


def grid(code: RfsqConfig) -> Tensor:
    """Scalars that the first digit rounds without clamping, ties among them."""
    edge = code.half + 0.5
    noise = torch.randn(500, generator=torch.Generator().manual_seed(0))
    return torch.cat([torch.linspace(-edge, edge, 2801), noise.clamp(-edge, edge)])


@given(codes, first_steps, st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=6))
def test_the_tokens_decode_to_the_reconstruction_bit_for_bit(
    code: RfsqConfig, first_step: float, values: list[float]
) -> None:
    rfsq = quantiser(code, first_step)
    symbols, z_hat = rfsq.quantise(torch.tensor(values))
    assert torch.equal(rfsq.dequantise(symbols), z_hat)
    assert symbols.min() >= 0
    assert symbols.max() < code.symbols


@given(codes, first_steps, scalars)
def test_error_within_half_the_last_step_inside_the_span(
    code: RfsqConfig, first_step: float, shares: list[float]
) -> None:
    x = torch.tensor(shares) * code.span() * first_step
    error = (quantiser(code, first_step).quantise(x)[1] - x).abs().max()
    assert error <= first_step * (0.5 * code.weight(code.levels) + SLACK)


@given(codes, st.floats(0.0, 100.0), st.booleans())
def test_outside_the_span_the_error_is_the_distance_to_the_codes_end(
    code: RfsqConfig, beyond: float, negative: bool
) -> None:
    size = code.span() + beyond
    x = torch.tensor([-size if negative else size])
    error = float((quantiser(code).quantise(x)[1] - x).abs())
    assert error == pytest.approx(size - code.tail_reach(0), rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("code", CODES)
def test_every_prefix_of_levels_decodes_to_within_half_its_last_step(code: RfsqConfig) -> None:
    rfsq, x = quantiser(code), grid(code)
    symbols, _ = rfsq.quantise(x)
    assert torch.equal(rfsq.dequantise(symbols[:0]), torch.zeros_like(x))
    means = [x.abs().mean()]
    for level in range(1, code.levels + 1):
        error = (rfsq.dequantise(symbols[:level]) - x).abs()
        # a redundant code can leave the edge of the first digits' range to the levels below
        assert error.max() <= 0.5 * code.weight(level) + SLACK
        means.append(error.mean())
    assert all(fine < coarse for coarse, fine in pairwise(means))


@given(codes, st.data())
def test_decoded_values_are_their_own_best_approximation(code: RfsqConfig, data: st.DataObject) -> None:
    digits = st.lists(st.integers(0, code.symbols - 1), min_size=code.levels, max_size=code.levels)
    symbols = torch.tensor(data.draw(digits)).unsqueeze(-1)
    rfsq = quantiser(code)
    value = rfsq.dequantise(symbols)
    canonical, again = rfsq.quantise(value)
    if float(code.rho).is_integer():  # the values are then multiples of the last step
        assert (again - value).abs().max() <= SLACK
    if code.rho in (2.0, 4.0):  # arithmetic without rounding: the canonical tokens are a fixed point
        assert torch.equal(rfsq.quantise(again)[0], canonical)


def continued(rfsq: Rfsq, x: Tensor, symbols: Tensor) -> Tensor:
    """Symbols for the levels below a given prefix: x [N], symbols [k, N] -> [L-k, N]."""
    residual, found = x - rfsq.dequantise(symbols), [symbols[:0]]
    for level in range(len(symbols) + 1, rfsq.config.levels + 1):
        digit = rfsq.digit(residual, level)
        residual = residual - digit * rfsq.step(level)
        found.append(digit.long()[None] + rfsq.config.half)
    return torch.cat(found)


@pytest.mark.parametrize("code", CODES)
def test_going_on_from_ones_own_prefix_is_quantise(code: RfsqConfig) -> None:
    rfsq = quantiser(code)
    x = torch.randn(2000, generator=torch.Generator().manual_seed(0))
    symbols, _ = rfsq.quantise(x)
    for level in range(code.levels + 1):
        rest = continued(rfsq, x, symbols[:level])
        assert rest.shape == (code.levels - level, len(x))
        assert torch.equal(rest, symbols[level:])


def recovered_error(code: RfsqConfig, level: int, error: int) -> Tensor:
    """|x - decoded| after the digit of `level` was wrong by `error`, for all x whose wrong digit exists."""
    rfsq, x = quantiser(code), grid(code)
    symbols, _ = rfsq.quantise(x)
    wrong = symbols[level - 1] + error
    possible = (wrong >= 0) & (wrong < code.symbols)
    prefix = torch.cat([symbols[: level - 1], wrong.unsqueeze(0)])[:, possible]
    whole = torch.cat([prefix, continued(rfsq, x[possible], prefix)])
    return (rfsq.dequantise(whole) - x[possible]).abs()


@pytest.mark.parametrize("rho", [1.8, 2.0, 2.18, 2.5, 3.0, 4.0])  # 2.18: 2 with little to spare
@pytest.mark.parametrize("levels", [4, 8])
def test_finer_levels_take_out_any_digit_error_within_the_margin_and_no_more(rho: float, levels: int) -> None:
    code = RfsqConfig(levels, 7, rho)
    half_last_step = 0.5 * code.weight(levels)
    for level in range(1, levels + 1):
        margin = code.margin(level)
        for error in range(-margin, margin + 1):
            assert recovered_error(code, level, error).max() <= half_last_step + SLACK
        assert recovered_error(code, level, margin + 1).max() > half_last_step + SLACK


@pytest.mark.parametrize(
    ("rho", "margins"),
    [(2.0, [2, 2, 2, 2, 2, 1, 1, 0]), (3.0, [0] * 8), (4.0, [0] * 8), (7.0, [0] * 8)],
)
def test_margins_of_eight_levels_of_seven_symbols(rho: float, margins: list[int]) -> None:
    code = RfsqConfig(8, 7, rho)
    assert [code.margin(level) for level in range(1, 9)] == margins


def test_rho_three_takes_out_an_error_of_one_up_to_one_and_a_half_last_steps() -> None:
    """Hence its margin of 0: the levels below reach one last step less far than an error of 1 can need."""
    code = RfsqConfig(5, 7, 3.0)
    for level in range(1, 5):
        worst = max(float(recovered_error(code, level, error).max()) for error in (-1, 1))
        assert worst == pytest.approx(1.5 * code.weight(5), rel=0.05)


@pytest.mark.parametrize(
    "fields",
    [{"levels": 0}, {"symbols": 6}, {"symbols": 1}, {"rho": 1.0}, {"rho": 7.5}, {"rho": float("nan")}],
)
def test_impossible_codes_are_refused(fields: dict[str, float]) -> None:
    with pytest.raises(RsdError, match=r"(levels|symbols|rho)(:| of) .*found"):
        RfsqConfig(**fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("step", [0.0, -1.0, float("nan"), float("inf")])
def test_impossible_steps_are_refused(step: float) -> None:
    with pytest.raises(RsdError, match="positive finite step"):
        quantiser(CODES[0], step)


def test_tokens_that_are_no_tokens_are_refused() -> None:
    rfsq = quantiser(CODES[0])
    rfsq.check(torch.tensor([[0, 6]]))
    for symbol in (-1, 7):
        with pytest.raises(RsdError, match="tokens: expected numbers from 0 to 6, found"):
            rfsq.check(torch.tensor([[0, symbol]]))
    with pytest.raises(RsdError, match="at most 8 levels, found 9"):
        rfsq.dequantise(torch.zeros(9, 1, dtype=torch.long))
