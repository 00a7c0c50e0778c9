"""`python -m studies.NAME`: a study as a command, with help and errors as `rsd` has them."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rsd.cli import Command, dispatch

STUDIES = {
    "scaling": Command(
        "milliseconds per chunk against the size of the target",
        "studies.scaling:measure_scaling",
        "studies.config:ScalingConfig",
    ),
    "expert": Command(
        "how many tasks of whole suites the scripted expert solves, and why it fails",
        "studies.expert:count_expert",
        "CountExpertConfig",
    ),
    "deviation": Command(
        "how far every decoder's chunks are from the baseline's, on held-out frames",
        "studies.deviation:measure_deviation",
        "studies.config:DeviationConfig",
    ),
    "substitution": Command(
        "draft pull, and how often acceptance rules let right and wrong drafts stand",
        "studies.substitution:measure_substitution",
        "studies.config:SubstitutionConfig",
    ),
    "continuing": Command(
        "draft pull of a target by diffusion or flow matching that continues from wrong drafts, by the steps left",
        "studies.continuing:measure_continuing",
        "studies.config:ContinuingConfig",
    ),
    "serving": Command(
        "milliseconds that a network port adds to a chunk",
        "studies.serving:measure_serving",
        "studies.config:ServingBenchConfig",
    ),
    "throughput": Command(
        "episodes per minute of `rsd eval` against a plain loop",
        "studies.throughput:measure_throughput",
        "ThroughputConfig",
    ),
    "openvla": Command(
        "milliseconds per decision of OpenVLA 7B on random weights, beside the published way to run it",
        "studies.openvla.bench:measure_openvla",
        "studies.openvla.config:OpenVlaBenchConfig",
    ),
    "legacy": Command(
        "read the original experiment's checkpoints", "studies.legacy:import_legacy", "studies.config:LegacyConfig"
    ),
    "tokenizers": Command(
        "compare action tokenizers at matched bits",
        "studies.tokenizers.study:bench",
        "studies.tokenizers.config:BenchConfig",
    ),
}


CONFIGS = {
    "archive": "",
    "delay_page": "DelayPageConfig",
    "expert_page": "ExpertPageConfig",
    "modes": "ModesConfig",
    "permuted_page": "PermutedPageConfig",
    "permuted_suites_page": "PermutedSuitesPageConfig",
    "readme_table": "ReadmeTableConfig",
    "scaling_page": "ScalingPageConfig",
    "shipped_page": "ShippedPageConfig",
}
# what writes pages of results has its options beside it, and loads torch for its help
PAGES = {name: Command("", f"studies.{name}:main", config) for name, config in CONFIGS.items()}


def run_study(name: str, arguments: Sequence[str]) -> int:
    """Run a study with the options in `arguments`; returns the exit status."""
    return dispatch(list(arguments), {**STUDIES, **PAGES}[name], f"python -m studies.{name}")


def main(name: str) -> None:
    sys.exit(run_study(name, sys.argv[1:]))
