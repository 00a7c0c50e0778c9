"""The engine's decoders: captured or not, and against the model's own passes."""

import pytest
import torch

from rsd.decoding.timing import Stopwatch
from rsd.targets.openvla.policy import PROMPT_LENGTHS, Engine
from rsd.targets.openvla.published import DECODERS
from studies.openvla.bench_cases import Inputs, full_config, generate, random_model


@pytest.mark.parametrize("decode", DECODERS)
@torch.inference_mode()
def test_a_decision_is_what_the_models_passes_give(decode: str) -> None:
    model = random_model(full_config("tiny"), "cpu", torch.float32)
    inputs = Inputs(model, 2, 3, 9)
    decision = Engine(model, decode)(*inputs.all(), Stopwatch(model.device))
    prefix = model.embed_prefix(model.embed_images(inputs.pixels), inputs.prompt, inputs.state)
    if decode == "ar":
        expected, passes = model.token_values(generate(model, prefix)).unflatten(1, (1, 7)), 6
    else:
        hidden, passes = model.action_hidden(prefix), 0
        torch.testing.assert_close(decision.hidden, hidden)
        tokens = model.language_model.logits(hidden).argmax(-1)
        expected = model.head(hidden) if decode == "l1" else model.token_values(tokens).unflatten(1, (8, 7))
    torch.testing.assert_close(decision.actions, expected)
    assert decision.passes == passes


@pytest.mark.gpu
@pytest.mark.parametrize("decode", DECODERS)
@torch.inference_mode()
def test_graphs_change_nothing_for_any_prompt_length(decode: str) -> None:
    model = random_model(full_config("tiny"), "cuda", torch.float32)
    plain, captured = Engine(model, decode, graphs=False), Engine(model, decode)
    watch = Stopwatch(model.device)
    for length in (9, 12, 9, *range(13, 14 + PROMPT_LENGTHS), 9):
        inputs = Inputs(model, 2, 1, length).all()
        one, other = plain(*inputs, watch), captured(*inputs, watch)
        torch.testing.assert_close(one.actions, other.actions, rtol=0, atol=1e-5)
        torch.testing.assert_close(one.hidden, other.hidden, rtol=0, atol=1e-4)
    assert len(captured._lengths) <= PROMPT_LENGTHS
