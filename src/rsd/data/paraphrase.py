"""Other wordings of an instruction, so that a policy learns from words and not from ten fixed sentences."""

from __future__ import annotations

import itertools
import random

SYNONYMS = (
    ("pick up", ("pick up", "pick", "grab", "take", "lift", "get")),
    ("the black bowl", ("the black bowl", "the akita black bowl", "the bowl", "black bowl", "bowl")),
    ("and place it", ("and place it", "and put it", "and set it", "and place")),
    ("put the", ("put the", "set the", "move the")),
    ("the cookie box", ("the cookie box", "the cookies box", "the box of cookies", "cookie box")),
    ("from table center", ("from table center", "from the table center", "from the center of the table")),
    (
        "in the top drawer of the wooden cabinet",
        (
            "in the top drawer of the wooden cabinet",
            "inside the top drawer",
            "in the top layer of the wooden cabinet",
            "in the drawer of the cabinet",
            "out of the top drawer",
        ),
    ),
    ("open the top drawer", ("open the top drawer", "open the top layer of the drawer", "open the upper drawer")),
    ("the middle drawer of the cabinet", ("the middle drawer of the cabinet", "the middle layer of the drawer")),
    ("on the wooden cabinet", ("on the wooden cabinet", "on top of the wooden cabinet", "on the cabinet")),
    ("on top of the cabinet", ("on top of the cabinet", "on the cabinet", "on the top of the drawer")),
    ("on the stove", ("on the stove", "onto the stove", "on stove")),
    ("on the ramekin", ("on the ramekin", "atop the ramekin", "on top of the ramekin")),
    ("on the plate", ("on the plate", "onto the plate", "atop the plate")),
    ("next to", ("next to", "beside", "near")),
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
