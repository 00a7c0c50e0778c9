"""Names of before, which stored files still hold: mapped where they are read, refused on a command line."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

DECODERS = {"rsd-ahead": "draft-first", "light-alone": "drafter-only", "draft": "coarse-only"}  # old -> new
PARTS = {"main": "target", "draft": "feature_drafter", "light": "visual_drafter"}  # of a checkpoint: weights, sizes
FIELDS = {"main_passes": "target_passes"}  # of an episode's record
STAGES = {"main": "target", "follow-up": "verify-pending"}  # of latencies
RECORDED = {**DECODERS, "light": "draft-first"}  # of results; that one is older still
RULE = ("skip_threshold_mm", "max_skips", "memory_chunks")
COMMANDS = {"train draft": "rsd train drafter", "tokenizer bench": "python -m studies.tokenizers"} | {
    f"bench {old}": f"python -m studies.{new}"
    for old, new in {"eval": "throughput", **{n: n for n in ("scaling", "deviation", "serving", "openvla")}}.items()
}
OPTIONS = {"--policy.main": "--policy.target", "--policy.draft": "--policy.feature-drafter"} | {
    "--policy.light": "--policy.visual-drafter"
}
DECODING = ("--decode", "--decoders", "--drafts")  # options whose values are decoders
KINDS = {"draft": "feature", "light": "visual"}  # of `rsd train drafter`


def decoder(name: str) -> str:
    """A decoder's present name."""
    return DECODERS.get(name, name)


def weight(name: str) -> str:
    """A weight's present name, `light.trunk.norm` -> `visual_drafter.trunk.norm`."""
    first, dot, rest = name.partition(".")
    return PARTS.get(first, first) + dot + rest


def parts(policy: dict[str, Any]) -> dict[str, Any]:
    """The part `policy` of a checkpoint's config.json by present names."""
    return {PARTS.get(name, name): value for name, value in policy.items()}


def record(values: dict[str, Any]) -> dict[str, Any]:
    """An episode's or a run's record, or a file of latencies, by present names."""
    found = {FIELDS.get(name, name): value for name, value in values.items()}
    if isinstance(name := found.get("decode"), str):
        found["decode"] = RECORDED.get(name, name)
    if isinstance(stages := found.get("latency_ms"), dict):
        found["latency_ms"] = {STAGES.get(name, name): value for name, value in stages.items()}
    if isinstance(by_decoder := found.get("milliseconds"), dict):
        found["milliseconds"] = {decoder(name): _stages(stages) for name, stages in by_decoder.items()}
    if isinstance(work := found.get("work"), dict):
        found["work"] = {decoder(name): cost for name, cost in work.items()}
    if isinstance(config := found.get("config"), dict):
        found["config"] = _options(config)
    return found


def _options(config: dict[str, Any]) -> dict[str, Any]:
    """A run's options: the decoder by its present name; the rule of `rsd-skip` left out where -1 meant that."""
    threshold = config.get("skip_threshold_mm")
    unused = RULE if isinstance(threshold, float | int) and threshold < 0 else ()
    found = {name: value for name, value in config.items() if name not in unused}
    if isinstance(name := found.get("decode"), str):
        found["decode"] = RECORDED.get(name, name)
    return found


def _stages(stages: Any) -> Any:
    return {STAGES.get(name, name): value for name, value in stages.items()} if isinstance(stages, dict) else stages


def former_path(path: Path) -> Path | None:
    """A path inside an archive as it was called when it was packed; None where that is no other."""
    parts = list(path.parts)
    for old, new in DECODERS.items():
        parts = [part.replace(new, old) for part in parts]
    former = Path(*parts)
    return former if former != path else None


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
