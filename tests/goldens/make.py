"""Freeze the goldens anew: `python tests/goldens/make.py`, two minutes on one core; `--observations`: render, too;
`--cases rsd-skip rsd-fused`: these of the decoders alone, everything else stays as it is.

Do it only where a difference is meant, and say in the commit which one and why.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from golden_cases import (
    CASES,
    CHECKPOINT,
    CHUNKS,
    CHUNKS_PER_EPISODE,
    OBSERVATIONS,
    STATISTICS,
    TASKS,
    TRAINING,
    decode_case,
    train_tiny,
    write,
)

from rsd.policy import RsdPolicy
from rsd.sim.libero import LiberoEnv
from rsd.types import EAGER


def render() -> None:
    """Two episodes acted out by `l1`, seen at the policy's size before every chunk."""
    policy = RsdPolicy.from_pretrained(CHECKPOINT, decode="l1", engine=EAGER)
    seen = []
    for task in TASKS:
        env = LiberoEnv("libero_spatial", task, image_size=policy.image_size)
        env.reset(options={"init_state": 0})
        for _ in range(CHUNKS_PER_EPISODE):
            seen.append(env.observation())
            env.step_chunk(policy.predict(seen[-1]).actions)
        env.close()
    images, states = np.stack([o.images for o in seen]), np.stack([o.state for o in seen])
    np.savez_compressed(
        OBSERVATIONS, images=images, states=states, instructions=np.array([o.instruction for o in seen])
    )


def decode(cases: list[str]) -> None:
    """Freeze these; the others keep every bit of what is frozen."""
    arrays, statistics = {}, {}
    if others := CASES.keys() - cases:
        with np.load(CHUNKS) as frozen:
            arrays = {key: frozen[key] for key in frozen.files if key.split("/")[0] in others}
        stored = json.loads(STATISTICS.read_text())
        statistics = {key: values for key, values in stored.items() if key.split("/")[0] in others}
    for name in cases:
        found = decode_case(CASES[name], EAGER)
        arrays[f"{name}/actions"] = np.stack([decoding.actions for decoding in found])
        for key in found[0].statistics:
            statistics[f"{name}/{key}"] = [decoding.statistics[key] for decoding in found]
        for index, decoding in enumerate(found):
            if decoding.tokens is not None:  # a decoder may give some for one chunk and none for another
                arrays[f"{name}/{index}/tokens"] = decoding.tokens
        print(name, flush=True)
    order = list(CASES)
    np.savez_compressed(CHUNKS, **arrays)
    write(STATISTICS, dict(sorted(statistics.items(), key=lambda entry: order.index(entry[0].split("/")[0]))))


def target() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--observations", action="store_true", help="render the observations first (simulator)")
    parser.add_argument("--cases", nargs="+", choices=CASES, metavar="CASE", help="freeze only these decoders")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.observations:
        render()
    decode(options.cases or list(CASES))
    if options.cases:
        return
    with tempfile.TemporaryDirectory() as run:
        runs = {f"whole_block={whole}": train_tiny(Path(run) / f"{whole}", whole) for whole in (False, True)}
    write(TRAINING, runs)


if __name__ == "__main__":
    target()
