"""`rsd doctor`: what an evaluation needs, what is there, what to do."""

from __future__ import annotations

from collections.abc import Sequence

from rsd.cli.parsing import parse


def run(arguments: Sequence[str], prog: str) -> int:
    from rsd.evaluation.doctor import DoctorConfig, run_doctor

    return run_doctor(parse(DoctorConfig, arguments, prog, writes=False))  # it tells of outputs itself
