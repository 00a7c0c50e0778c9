"""How long a full-size checkpoint takes from disk to device, in a process of its own, and how much memory it takes."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

from rsd.targets.openvla.loading import load_openvla, slots
from rsd.targets.openvla.model import OpenVlaConfig, OpenVlaModel
from rsd.targets.openvla.published import CONFIG_FILE
from studies.openvla.bench_cases import full_config, random_model

if TYPE_CHECKING:
    from studies.openvla.bench import Bench

SHARD_BYTES = 5 << 30  # published shards hold up to 7 GB
MEASURE = "import sys, studies.openvla.bench_load as load; print(load.measure(sys.argv[1], sys.argv[2]))"


def run_load(bench: Bench, dtype: torch.dtype) -> None:
    """Write a random checkpoint in the published format, drop it from the page cache, load it, delete it."""
    from studies.openvla.bench import Row  # which imports this module

    directory, device = bench.config.checkpoint, bench.config.device
    row = Row("load", "checkpoint", 0, 0)
    bench.rows.append(row)
    if directory.exists():  # what is not ours is never deleted
        row.error = f"RsdError: --checkpoint {directory} exists; name a directory that does not"
        return
    try:
        model = random_model(full_config(bench.config.size), device, dtype)
        begin = time.perf_counter()
        written = write_checkpoint(model, directory)
        seconds = round(time.perf_counter() - begin, 1)
        del model
        bench.free()
        run = subprocess.run(
            [sys.executable, "-c", MEASURE, str(directory), device], capture_output=True, text=True, check=False
        )
        if run.returncode:
            row.error = f"loading ended with status {run.returncode}: {run.stderr.strip()[-300:]}"
            return
        found: dict[str, Any] = json.loads(run.stdout.strip().splitlines()[-1])
        bench.notes["load"] = {**found, "bytes": written, "written_in_s": seconds}
    except Exception as error:
        row.error = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def write_checkpoint(model: OpenVlaModel, directory: Path) -> int:
    """config.json and sharded safetensors under their published names; -> bytes written and synchronised."""
    directory.mkdir(parents=True)
    write_config(model.config, directory / CONFIG_FILE)
    shards: list[dict[str, torch.Tensor]] = [{}]
    size = total = 0
    for name, slot in slots(model).items():
        value = slot.view().detach()
        bytes_ = value.numel() * value.element_size()
        if size + bytes_ > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = value
        size, total = size + bytes_, total + bytes_
    index = {}
    for number, shard in enumerate(shards, 1):
        path = directory / f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file({name: value.cpu().contiguous() for name, value in shard.items()}, path)
        index.update(dict.fromkeys(shard, path.name))
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # reading is to come from the disk
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return total


def write_config(config: OpenVlaConfig, path: Path) -> None:
    llama = config.llama
    text = {
        "model_type": "llama",
        "vocab_size": llama.vocab_size,
        "hidden_size": llama.dim,
        "num_hidden_layers": llama.layers,
        "num_attention_heads": llama.heads,
        "intermediate_size": llama.mlp_dim,
    }
    content = {
        "model_type": "openvla",
        "vision_backbone_id": "dinosiglip-vit-so-224px",
        "image_resize_strategy": "resize-naive",
        "text_config": text,
        "timm_model_kwargs": [asdict(vit) for vit in config.vision],
    }
    path.write_text(json.dumps(content))


def measure(directory: str, device: str) -> str:
    """Load once; seconds and the host's peak resident memory (mapped pages of the files included), as JSON."""
    begin = time.perf_counter()
    model = load_openvla(Path(directory), device=device)
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - begin
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return json.dumps({"seconds": round(seconds, 2), "peak_host_gib": round(peak, 2), "parameters": parameters})
