"""A tiny drafter of somebody else's policy."""

from pathlib import Path

import pytest
import torch

from rsd.models.bundle import code_sizes
from rsd.models.config import DrafterConfig, StandaloneDrafterConfig, VisualDrafterConfig
from rsd.models.standalone_drafter import StandaloneDrafter
from rsd.targets.black_box import Drafter, load_drafter
from rsd.targets.drafter_files import StoredDrafter, save_models
from rsd.tokenizer.action_tokenizer import ActionTokenizer


@pytest.fixture
def drafter(tokenizer: ActionTokenizer, tmp_path: Path) -> Drafter:
    levels = DrafterConfig(levels=2, dim=16, layers=1, heads=2)
    visual = VisualDrafterConfig(1, (16, 16, 16, 16), dim=16, layers=1, heads=2, levels=levels, depth=1)
    config = StandaloneDrafterConfig(32, 16, visual)
    torch.manual_seed(0)
    model = StandaloneDrafter(config, *code_sizes(tokenizer))
    save_models(model, tokenizer, StoredDrafter(config, {"metadata": {}}, 1e5), tmp_path / "drafter")
    return load_drafter(tmp_path / "drafter")
