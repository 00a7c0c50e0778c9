"""`rsd train policy`: the compact policy, or with --backbone openvla residual tokens on a published checkpoint."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from rsd.cli.parsing import UsageError, check_choice, parse
from rsd.training.config import TrainOpenVlaConfig, TrainPolicyConfig

OPTION = "--backbone"
BACKBONES: dict[str, tuple[str, str, type]] = {
    "compact": ("rsd.training.policy", "train_policy", TrainPolicyConfig),
    "openvla": ("rsd.training.openvla", "train_openvla", TrainOpenVlaConfig),
}


def run(arguments: Sequence[str], prog: str) -> int:
    backbone, rest = take_backbone(arguments)
    module, function, config = BACKBONES[backbone]
    options: object = parse(config, rest, f"{prog} {OPTION} {backbone}")  # before the module, which loads torch
    getattr(importlib.import_module(module), function)(options)
    return 0


def take_backbone(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """(backbone, the other arguments); it decides which options there are, so it is read first."""
    backbone, rest = "compact", list(arguments)
    for index, argument in enumerate(rest):
        name, equals, value = argument.partition("=")
        if name == OPTION:
            if not equals and index + 1 == len(rest):
                raise UsageError(f"{OPTION}: expected one of {', '.join(BACKBONES)}")
            backbone = value if equals else rest[index + 1]
            del rest[index : index + (1 if equals else 2)]
            check_choice(OPTION, backbone, BACKBONES)
            break
    return backbone, rest
