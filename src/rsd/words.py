"""What of an instruction counts: its words, without case, accents and punctuation. Needs no torch."""

from __future__ import annotations

import re
import string
import unicodedata
import zlib

import numpy as np
from numpy.typing import NDArray

from rsd.checks import shown
from rsd.types import RsdError

MAX_WORDS = 32
KNOWN = {*string.ascii_letters, *string.digits, *string.punctuation}
FLAGS = 731  # of `word_flags`: no two words of LIBERO share one, and a width that no state of a robot has


def word_flags(instruction: str) -> NDArray[np.float32]:
    """Which words an instruction has, without their order: [FLAGS], 1 where one is hashed to. Errors as `word_ids`."""
    flags = np.zeros(FLAGS, np.float32)
    flags[[zlib.crc32(word.encode()) % FLAGS for word in words_of(instruction)]] = 1
    return flags


def words_of(text: str) -> list[str]:
    # accents off, as in "bläck": the vocabulary is of English words
    plain = "".join(c for c in unicodedata.normalize("NFKD", text.casefold()) if not unicodedata.combining(c))
    if odd := sorted({c for c in plain if not (c in KNOWN or c.isspace() or unicodedata.category(c)[0] in "PZ")}):
        found = f"{''.join(odd[:20])!r} in {shown(text)}"
        raise RsdError(f"instruction: expected words of the letters a to z and digits, found {found}")
    words = re.findall(r"[a-z0-9]+", plain)
    if not 0 < len(words) <= MAX_WORDS:
        raise RsdError(f"instruction: expected 1 to {MAX_WORDS} words, found {len(words)} in {shown(text)}")
    return words
