from dataclasses import replace
from pathlib import Path

import torch

from rsd.data.demonstrations import load_demonstrations
from rsd.evaluation.distil_config import DistilConfig
from rsd.models.bundle import code_sizes
from rsd.models.config import DrafterConfig, StandaloneDrafterConfig, VisualDrafterConfig
from rsd.models.standalone_drafter import StandaloneDrafter
from rsd.tokenizer.action_tokenizer import ActionTokenizer
from rsd.training.config import LossConfig
from rsd.training.dataset import FrameDataset
from rsd.training.standalone_drafter import losses_of, validate


def test_the_forecast_of_a_distilled_drafter_is_learnt_on_episodes_that_its_drafts_are_not(
    demonstrations: Path, tokenizer: ActionTokenizer
) -> None:
    dataset = FrameDataset(load_demonstrations(demonstrations), 8, torch.device("cpu"), paired=False)
    rows = dataset.batch(torch.arange(0, len(dataset), 13))
    levels = DrafterConfig(levels=2, dim=16, layers=1, heads=2)
    visual = VisualDrafterConfig(1, (16, 16, 16, 16), dim=16, layers=1, heads=2, levels=levels, depth=1)
    torch.manual_seed(0)
    model = StandaloneDrafter(StandaloneDrafterConfig(rows.images.shape[-1], 16, visual), *code_sizes(tokenizer))
    assert DistilConfig("ws://nowhere:1").loss.forecast_every == 5

    def learns(episode: int, every: int) -> set[str]:
        """The parts of the drafter that a batch of that episode moves."""
        batch = replace(rows, episode=torch.full((len(rows.chunk),), episode))
        model.zero_grad()
        losses_of(model, tokenizer, batch, LossConfig(forecast_every=every))[0]["total"].backward()
        moved = {name for name, weight in model.named_parameters() if weight.grad is not None and weight.grad.any()}
        return {"forecast" if "deviation_head" in name else "drafts" for name in moved}

    assert learns(1, 0) == {"drafts", "forecast"}
    assert learns(1, 5) == {"drafts"}
    assert learns(10, 5) == {"forecast"}
    every_row = validate(model, tokenizer, dataset, LossConfig())
    assert every_row["frames"] == 288
    assert validate(model, tokenizer, dataset, LossConfig(forecast_every=5)) == every_row
