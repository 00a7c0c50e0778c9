"""Other wordings of an instruction, so that a policy learns from words and not from ten fixed sentences."""

from __future__ import annotations

import itertools
import random

SYNONYMS = (
    ("pick up", ("pick up", "pick", "grab", "take", "lift")),
    ("the black bowl", ("the black bowl", "the akita black bowl", "the bowl", "black bowl")),
    ("and place it on", ("and place it on", "and put it on", "and set it on", "and place it onto")),
    ("the cookie box", ("the cookie box", "the cookies box", "the box of cookies")),
    ("from table center", ("from table center", "from the table center", "from the center of the table")),
    ("in the top drawer of", ("in the top drawer of", "inside the top drawer of", "in the top layer of")),
    ("next to", ("next to", "beside")),
)


def paraphrases(instruction: str, limit: int) -> list[str]:
    """Up to `limit` wordings, the original first; the rest are a sample of all combinations, always the same."""
    found = [(phrase, options) for phrase, options in SYNONYMS if phrase in instruction]
    texts = []
    for choice in itertools.product(*(options for _, options in found)):
        text = instruction
        for (phrase, _), option in zip(found, choice, strict=True):
            text = text.replace(phrase, option)
        texts.append(text)
    if len(texts) > limit:  # drawn, for a stride that shares a factor with a phrase's wordings skips some of them
        texts = random.Random(0).sample(texts, limit)
    return list(dict.fromkeys([instruction, *texts]))[:limit]
