"""FAST (arXiv 2501.09747), built from its description: DCT over time, one scale, rounding, byte-pair encoding.

Coefficients are written frequency by frequency as characters, and merged by BPE, so that a sequence's length varies
and a sequence decodes only if it spells exactly H * M characters.
"""

from __future__ import annotations

import numpy as np
from scipy.fft import dct, idct
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from rsd.types import RsdError
from studies.tokenizers.codecs import Motion

FIRST_CHARACTER = 0x100
SURROGATES = range(0xD800, 0xE000)  # numbers in Unicode that are no characters
CHARACTERS = 0x110000 - FIRST_CHARACTER - len(SURROGATES)
BPE_CHUNKS = 40_000  # what the merges are learned from


class Fast:
    """alphabet: BPE's vocabulary (1024 in the paper); factor: coefficients are multiplied by it before rounding."""

    levels = 1

    def __init__(self, train: Motion, factor: float, vocabulary: int = 1024) -> None:
        self.factor, self.shape = factor, train.shape[1:]
        numbers = self._round(train)
        self.lowest, self.highest = int(numbers.min()), int(numbers.max())
        if self.highest - self.lowest >= CHARACTERS:
            expected = f"coefficients within a range of {CHARACTERS}, found {self.lowest} to {self.highest}"
            raise RsdError(f"FAST, scale {factor:g}: expected {expected}; leave `fast` out of --methods")
        characters = self._text(np.arange(self.lowest, self.highest + 1)[:, None])
        self.bpe = Tokenizer(BPE())
        trainer = BpeTrainer(
            vocab_size=max(vocabulary, len(characters)),
            initial_alphabet=characters,
            show_progress=False,
            special_tokens=[],
        )
        some = numbers[:: max(1, len(numbers) // BPE_CHUNKS)]
        self.bpe.train_from_iterator(self._text(some), trainer)
        self.alphabet = self.bpe.get_vocab_size()
        self.pieces = [self.bpe.id_to_token(token) or "" for token in range(self.alphabet)]

    def _round(self, motion: Motion) -> np.ndarray:
        return np.round(dct(motion, axis=1, norm="ortho") * self.factor).astype(int).reshape(len(motion), -1)

    def _text(self, numbers: np.ndarray) -> list[str]:
        codes = numbers.clip(self.lowest, self.highest) - self.lowest + FIRST_CHARACTER
        codes = np.where(codes < SURROGATES.start, codes, codes + len(SURROGATES)).astype("<u4")
        return [row.tobytes().decode("utf-32-le") for row in codes]

    def encode(self, motion: Motion) -> list[list[int]]:
        return [encoding.ids for encoding in self.bpe.encode_batch(self._text(self._round(motion)))]

    def decode(self, codes: list[list[int]], levels: int) -> Motion:
        return np.stack([self.decode_one(tokens) for tokens in codes])

    def decode_one(self, tokens: list[int]) -> Motion:
        """Raises ValueError for a sequence that does not spell a chunk."""
        text = "".join([self.pieces[token] for token in tokens])
        codes = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
        numbers = np.where(codes < SURROGATES.start, codes, codes - len(SURROGATES)).astype(np.float32)
        if len(numbers) != self.shape[0] * self.shape[1]:
            raise ValueError(f"{len(numbers)} characters")
        coefficients = (numbers - FIRST_CHARACTER + self.lowest).reshape(self.shape) / self.factor
        return idct(coefficients, axis=0, norm="ortho").astype(np.float32)

    def tokens(self, codes: list[list[int]], levels: int) -> list[list[int]]:
        return codes

    symbols = tokens

    def undecodable_share(self, codes: list[list[int]], seed: int = 0) -> float:
        """Share of sequences that decode no more after ONE token was replaced by another: a policy's single mistake."""
        rng, failures = np.random.default_rng(seed), 0
        for tokens in codes:
            wrong = list(tokens)
            place = rng.integers(len(wrong))
            wrong[place] = (wrong[place] + rng.integers(1, self.alphabet)) % self.alphabet
            try:
                self.decode_one(wrong)
            except ValueError:
                failures += 1
        return failures / len(codes)
