"""Names of before: of checkpoints mapped where they are read, on a command line refused."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # start-up time: a command line's names need no torch
    from torch import Tensor

DECODERS = {"rsd-ahead": "draft-first", "light-alone": "drafter-only", "draft": "coarse-only"}  # old -> new
PARTS = {"main": "target", "draft": "feature_drafter", "light": "visual_drafter"}  # of a checkpoint: weights, sizes
COMMANDS = {
    "train draft": "rsd train drafter",
    "train tokenizer": "rsd tokenizer fit",
    "import-legacy": "python -m studies.legacy",
    "tokenizer bench": "python -m studies.tokenizers",
} | {
    f"bench {old}": f"python -m studies.{new}"
    for old, new in {"eval": "throughput", **{n: n for n in ("scaling", "deviation", "serving", "openvla")}}.items()
}
OPTIONS = {"--policy.main": "--policy.target", "--policy.draft": "--policy.feature-drafter"} | {
    "--policy.light": "--policy.visual-drafter"
}
DECODING = ("--decode", "--decoders", "--drafts")  # options whose values are decoders
KINDS = {"draft": "feature", "light": "visual"}  # of `rsd train drafter`


def weight(name: str) -> str:
    """A weight's present name, `light.trunk.norm` -> `visual_drafter.trunk.norm`."""
    first, dot, rest = name.partition(".")
    return PARTS.get(first, first) + dot + rest


def stem(weight: Tensor, expected: Tensor) -> Tensor:
    """A weight as it is, but a visual drafter's first convolution [C, 3, 5, 5], which saw averages over n x n pixels,
    as the same function of the pixels [C, 3, 5 * n, 5 * n]."""
    n = expected.shape[-1] // 5 if expected.ndim == 4 else 1
    if weight.shape != (*expected.shape[:2], 5, 5) or expected.shape[2:] != (5 * n, 5 * n):
        return weight
    return weight.repeat_interleave(n, -1).repeat_interleave(n, -2) / n**2


def parts(policy: dict[str, Any]) -> dict[str, Any]:
    """The part `policy` of a checkpoint's config.json by present names."""
    return {PARTS.get(name, name): value for name, value in policy.items()}


def refusal(arguments: Iterable[str]) -> str | None:
    """What to say of a command line that uses a former name; None where it does not."""
    option = ""
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if argument.startswith("--"):
            option = name
            for old, new in OPTIONS.items():
                if name == old or name.startswith(f"{old}."):
                    return f"{name}: it is called {new}{name.removeprefix(old)} now"
            argument = value if equals else ""
        if option in DECODING and argument in DECODERS:
            return f"{option} {argument}: it is called {DECODERS[argument]} now"
        if option == "--kind" and argument in KINDS:
            return f"{option} {argument}: it is called {KINDS[argument]} now"
    return None
