"""`rsd train policy`: the compact policy, or with --backbone openvla residual tokens on a published checkpoint."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from rsd.cli.parsing import UsageError, check_choice, parse

OPTION = "--backbone"
BACKBONES = {
    "compact": ("rsd.training.policy", "train_policy", "TrainPolicyConfig"),
    "openvla": ("rsd.training.openvla", "train_openvla", "TrainOpenVlaConfig"),
}


def run(arguments: Sequence[str], prog: str) -> int:
    backbone, rest = take_backbone(arguments)
    module, function, config = BACKBONES[backbone]
    loaded = importlib.import_module(module)
    getattr(loaded, function)(parse(getattr(loaded, config), rest, f"{prog} {OPTION} {backbone}"))
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
