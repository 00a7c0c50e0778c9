"""`rsd train policy`: the compact policy, or with --backbone openvla residual tokens on a published checkpoint."""

from __future__ import annotations

from collections.abc import Sequence

from rsd.cli import Command
from rsd.cli.parsing import UsageError, check_choice

OPTION = "--backbone"
BACKBONES = {
    "compact": Command("", "rsd.training.policy:train_policy", "rsd.training.config:TrainPolicyConfig"),
    "openvla": Command("", "rsd.training.openvla:train_openvla", "rsd.training.config:TrainOpenVlaConfig"),
}


def run(arguments: Sequence[str], prog: str) -> int:
    backbone, rest = take_backbone(arguments)
    return BACKBONES[backbone].run(rest, f"{prog} {OPTION} {backbone}")


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
