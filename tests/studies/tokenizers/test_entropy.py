import numpy as np
import pytest

from studies.tokenizers.entropy import fixed_length_bits, variable_length_bits


def test_independent_uniform_symbols_cost_their_logarithm() -> None:
    rng = np.random.default_rng(0)
    train, held_out = rng.integers(0, 8, (20_000, 3)), rng.integers(0, 8, (5_000, 3))
    order_0, order_1 = fixed_length_bits(train, held_out)
    assert np.allclose(order_0, 3.0, atol=0.01)
    assert np.allclose(order_1, 3.0, atol=0.02)


def test_a_copy_costs_nothing_where_one_symbol_may_be_the_context() -> None:
    rng = np.random.default_rng(0)
    train, held_out = (np.repeat(rng.integers(0, 8, (size, 1)), 3, axis=1) for size in (20_000, 5_000))
    order_0, order_1 = fixed_length_bits(train, held_out)
    assert np.allclose(order_0, 3.0, atol=0.01)
    assert order_1[0] == order_0[0]
    assert (order_1[1:] < 0.01).all()
    assert np.array_equal(fixed_length_bits(train, held_out, order=0)[1], order_0)


def test_held_out_chunks_pay_for_what_training_did_not_show() -> None:
    """A code whose symbols change between the halves must not look cheap: cross entropy, not entropy."""
    train, held_out = np.zeros((1000, 1), np.int64), np.full((1000, 1), 5)
    assert fixed_length_bits(train, held_out)[0][0] > 10


def test_sequences_are_charged_by_their_tokens() -> None:
    rng = np.random.default_rng(0)
    train = [list(rng.integers(0, 4, rng.integers(1, 6))) for _ in range(5_000)]
    held_out = [list(rng.integers(0, 4, rng.integers(1, 6))) for _ in range(2_000)]
    mean_length = np.mean([len(sequence) for sequence in held_out])
    order_0, order_1 = variable_length_bits(train, held_out, 4)
    assert order_0 == pytest.approx(2 * mean_length, rel=0.01)
    assert order_1 <= order_0


def test_a_token_that_tells_the_next_makes_it_free() -> None:
    rng = np.random.default_rng(0)
    train, held_out = ([[int(t), 7 - int(t)] for t in rng.integers(0, 8, size)] for size in (5_000, 1_000))
    order_0, order_1 = variable_length_bits(train, held_out, 8)
    assert order_0 == pytest.approx(6.0, abs=0.05)
    assert order_1 == pytest.approx(3.0, abs=0.1)
