"""`rsd tokenizer inspect` replaces its own pictures and nothing else; what it draws is in tests/studies/tokenizers."""

from pathlib import Path

import numpy as np
import pytest
import torch

from rsd.reporting.config import SUFFIXES
from rsd.reporting.tokenizer_plots import InspectConfig, draw, inspect_tokenizer, level_statistics
from rsd.tokenizer.action_tokenizer import ActionTokenizer
from rsd.types import RsdError


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_an_earlier_picture_is_replaced_and_another_file_is_not(
    suffix: str, tmp_path: Path, tokenizer: ActionTokenizer, chunks: np.ndarray
) -> None:
    config = InspectConfig(str(tmp_path / "no-tokenizer"), output=tmp_path / f"picture{suffix}")
    config.output.write_text("something else")
    with pytest.raises(RsdError, match="exists already; choose another --output, or --overwrite"):
        inspect_tokenizer(config)
    assert config.output.read_text() == "something else"
    some = torch.from_numpy(chunks[:50])
    draw(tokenizer, some[:1], level_statistics(tokenizer, some), 0, config.output)
    with pytest.raises(RsdError, match="no-tokenizer"):  # which it comes to now
        inspect_tokenizer(config)
