"""`python -m lerobot_policy_rsd CHECKPOINT DIRECTORY`: a checkpoint of RSD-VLA as a LeRobot policy's directory."""

import argparse
import sys
from pathlib import Path

from rsd.types import RsdError


def main() -> int:
    parser = argparse.ArgumentParser("python -m lerobot_policy_rsd", description=__doc__)
    parser.add_argument("checkpoint", help="directory or hub id, as of `rsd eval --policy`")
    parser.add_argument("directory", type=Path, help="what to write; --policy.path of lerobot-eval")
    given = parser.parse_args()
    try:
        from lerobot_policy_rsd.modeling_rsd import export  # seconds, which --help need not wait for

        export(given.checkpoint, given.directory)
    except RsdError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"lerobot-eval --policy.path={given.directory} --env.type=libero --env.task=libero_spatial")
    return 0


if __name__ == "__main__":
    sys.exit(main())
