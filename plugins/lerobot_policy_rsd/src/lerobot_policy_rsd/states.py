"""`python -m lerobot_policy_rsd.states FOLDER`: LIBERO's initial states as LeRobot reads them, torch files.

The LIBERO that comes with RSD-VLA has them as arrays; LIBERO_CONFIG_PATH makes it look in the folder instead, for
LeRobot only: `rsd` would find no arrays there.
"""

import argparse
import sys
from pathlib import Path

import torch
import yaml
from libero.libero import benchmark

from rsd.output import writing
from rsd.types import RsdError

SUITES = ("libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90")


def main() -> int:
    parser = argparse.ArgumentParser("python -m lerobot_policy_rsd.states", description=__doc__)
    parser.add_argument("folder", type=Path, help="what to write, 13 MB")
    folder = parser.parse_args().folder.resolve()
    try:
        with writing(folder):
            write(folder)
    except RsdError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"LIBERO_CONFIG_PATH={folder} lerobot-eval --env.type=libero")
    return 0


def write(folder: Path) -> None:
    suites = benchmark.get_benchmark_dict()
    for suite in (suites[name]() for name in SUITES):
        for number, task in enumerate(suite.tasks):
            path = folder / "init_files" / task.problem_folder / task.init_states_file
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(suite.get_task_init_states(number), path)
    (folder / "config.yaml").write_text(yaml.safe_dump({"init_states": str(folder / "init_files")}))


if __name__ == "__main__":
    sys.exit(main())
