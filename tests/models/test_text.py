from typing import Any

import numpy as np
import pytest
import torch

from rsd.models.text import TextEncoder, word_ids
from rsd.types import RsdError
from rsd.words import FLAGS, MAX_WORDS, word_flags


def test_case_punctuation_and_spaces_do_not_matter() -> None:
    plain, shouted, spaced = word_ids(
        ["pick up the black bowl", "Pick up, the BLACK bowl!", "  pick\tup the   black\nbowl. "]
    )
    assert torch.equal(plain, shouted)
    assert torch.equal(plain, spaced)
    assert torch.equal(plain, word_ids(["\u201cpick\u201d up \u2014 the bl\u00e4ck bowl\u2026\u00a0"])[0])


@pytest.mark.parametrize("sign", ["\U0001f963", "\ud83d", "\u2192", "\u200d", "\u20ac", "\u4e2d", "\x00"])
def test_signs_that_may_mean_something_are_not_dropped(sign: str) -> None:
    with pytest.raises(RsdError, match="instruction: expected words of the letters a to z and digits, found"):
        word_ids([f"pick up {sign} the bowl"])


def test_words_their_order_and_their_number_matter() -> None:
    texts = ["open the drawer", "close the drawer", "the drawer open", "open the drawer drawer", "open"]
    rows = {tuple(row) for row in word_ids(texts).tolist()}
    assert len(rows) == len(texts)


def test_flags_say_which_words_are_there() -> None:
    near, far = (word_flags(f"pick up the bowl {where} the stove") for where in ("next to", "on"))
    assert near.shape == (FLAGS,)
    assert (near.sum(), far.sum(), abs(near - far).sum()) == (7, 6, 3)
    np.testing.assert_array_equal(near, word_flags("Pick up the BOWL, the bowl next to the stove!"))
    with pytest.raises(RsdError, match="found 0"):
        word_flags("!")


def test_the_same_in_every_process() -> None:
    """Python's own `hash` of a text changes from process to process; a checkpoint's embeddings do not."""
    assert word_ids(["pick up"])[0, :3].tolist() == [3334, 2051, 0]


@pytest.mark.parametrize("texts", ["pick up", [None], [b"pick up"], [7]])
def test_anything_but_a_list_of_texts_is_refused(texts: Any) -> None:
    with pytest.raises(RsdError, match="instructions: expected a list of texts, found"):
        word_ids(texts)


@pytest.mark.parametrize("text", ["", " ?! ", "word " * (MAX_WORDS + 1)])
def test_no_words_or_too_many_are_refused(text: str) -> None:
    with pytest.raises(RsdError, match="expected 1 to 32 words"):
        word_ids([text])
    assert word_ids(["word " * MAX_WORDS]).shape == (1, MAX_WORDS)


@torch.no_grad()
def test_an_encoding_does_not_depend_on_the_batch() -> None:
    torch.manual_seed(0)
    encoder = TextEncoder(dim=32, tokens=4).eval()
    ids = word_ids(["pick up the bowl", "open", "put the cream cheese in the bowl and push it back"])
    tokens, condition = encoder(ids)
    assert tokens.shape == (3, 4, 32)
    for index in range(3):
        alone = encoder(ids[index : index + 1])
        assert torch.allclose(alone[0][0], tokens[index], atol=1e-5)
        assert torch.allclose(alone[1][0], condition[index], atol=1e-5)
    assert not torch.allclose(tokens[0], tokens[1], atol=1e-2)


@torch.no_grad()
def test_padding_is_not_read() -> None:
    torch.manual_seed(0)
    encoder = TextEncoder(dim=32, tokens=4).eval()
    ids = word_ids(["pick up the bowl"])
    before = encoder(ids)
    encoder.position[4:] += torch.randn(MAX_WORDS - 4, 32)
    for found, expected in zip(encoder(ids), before, strict=True):
        assert torch.allclose(found, expected, atol=1e-5)
    encoder.position[3] += torch.randn(32)
    assert not torch.allclose(encoder(ids)[1], before[1], atol=1e-3)


def test_accents_are_taken_off_and_other_letters_refused() -> None:
    """ "bläck" was read as "bl ck", which moved the actions by 0.137."""
    plain = word_ids(["pick up the black bowl"])
    for text in ("pick up the bläck bowl", "PICK UP THE BLA\u0308CK BOWL", "pick up \u2013 the “black” bowl…"):
        assert torch.equal(word_ids([text]), plain)
    assert torch.equal(word_ids(["straße nr \uff12"]), word_ids(["strasse nr 2"]))
    for text, odd in (("拿起碗", "拿碗起"), ("pick up the bøwl", "ø"), ("щётка", "ш|щ"), ("take ² or ٣", "٣")):
        with pytest.raises(RsdError, match=rf"instruction: expected words of the letters a to z .* found '.*({odd})"):
            word_ids([text])
