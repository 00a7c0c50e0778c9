"""The instruction as OpenVLA was trained to read it, as token ids."""

from __future__ import annotations

from pathlib import Path

from rsd.checks import told
from rsd.extras import extra
from rsd.types import RsdError

with extra("openvla"):
    from tokenizers import Tokenizer

TOKENIZER_FILE = "tokenizer.json"
START_TOKEN = 1
MAX_TOKENS = 512  # LIBERO's instructions have 30; every position costs time and memory of the whole model
EMPTY_TOKEN, EMPTY_PIECE = 29871, "▁"
"""Llama's empty piece. In training the action followed it, so every prompt ends in it: without it the first action
token is predicted from a place the model has never predicted one from."""


class Prompt:
    """tokenizer.json of a checkpoint -> ids of an instruction's prompt."""

    def __init__(self, directory: Path) -> None:
        path = directory / TOKENIZER_FILE
        if not path.is_file():
            raise RsdError(
                f"{path}: not found; copy it from the published checkpoint, or, where only tokenizer.model is there, "
                "write it with transformers' AutoTokenizer.from_pretrained(...).save_pretrained(...)"
            )
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise RsdError(f"{path}: not readable as a tokenizer ({told(error)}); copy it again") from None
        found = self._tokenizer.token_to_id(EMPTY_PIECE)
        if found != EMPTY_TOKEN:
            raise RsdError(f"{path}: expected Llama-2's vocabulary, {EMPTY_PIECE!r} as {EMPTY_TOKEN}, found {found}")

    def ids(self, instruction: str) -> list[int]:
        """Begins with the start token and ends in token 29871. RsdError for more than MAX_TOKENS."""
        text = f"In: What action should the robot take to {instruction.lower()}?\nOut:"
        ids = [START_TOKEN, *self._tokenizer.encode(text, add_special_tokens=False).ids]
        if len(ids) > MAX_TOKENS:
            found = f"{len(ids)} in {instruction!r:.150}"
            raise RsdError(f"instruction: expected at most {MAX_TOKENS} tokens, found {found}")
        return ids if ids[-1] == EMPTY_TOKEN else [*ids, EMPTY_TOKEN]
