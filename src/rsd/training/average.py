"""The mean of the weights of several policies that were trained on from the same one ("model soups", Wortsman et al.,
arXiv 2203.05482): what each training learnt anew stays, what each forgot or learnt by chance is averaged away."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from rsd.checkpoint import (
    BACKBONE,
    TOKENIZER_FILE,
    checkpoint_hash,
    load_model,
    locate_checkpoint,
    read_content,
    save_checkpoint,
)
from rsd.json_files import section
from rsd.tokenizer.action_tokenizer import ActionTokenizer
from rsd.types import RsdError

DECODING = ("acceptance", "fine", "execute", "max_skips")  # of a policy's config: the last one's are taken


def average(policies: Sequence[str | Path], output: Path) -> Path:
    """Write a checkpoint whose weights are the mean of those policies'; one that is named twice counts twice.

    All have to be compact, of the same sizes and with the same tokenizer, else `RsdError`; how it decodes is the last
    one's. A calibration or what was proven of one of them is not of the mean: measure that anew.
    """
    if len(policies) < 2:
        raise RsdError(f"average: expected two policies or more, found {len(policies)}")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise RsdError(f"{output}: expected a new or an empty folder, found files; choose another one")
    directories = [locate_checkpoint(policy) for policy in policies]
    contents = [read_content(directory) for directory in directories]
    for directory, content in zip(directories, contents, strict=True):
        for what, found in alike(content).items():
            if found != alike(contents[0])[what]:
                expected = f"expected the {what} of {directories[0]}, found {found}"
                raise RsdError(f"{directory}: {expected}; only policies that continue the same one have a mean")
    if BACKBONE in contents[0]:
        raise RsdError(f"{directories[0]}: expected a compact policy, found one on {contents[0][BACKBONE]}")
    tokenizer = ActionTokenizer.load(directories[-1])
    model, config = load_model(directories[-1], contents[-1], tokenizer)
    total = {name: value.double() for name, value in model.state_dict().items()}
    for directory, content in zip(directories[:-1], contents[:-1], strict=True):
        for name, value in load_model(directory, content, tokenizer)[0].state_dict().items():
            total[name] += value
    model.load_state_dict({name: (value / len(policies)).to(torch.float32) for name, value in total.items()})
    save_checkpoint(model, tokenizer, config, provenance_of(directories, contents), output)
    return output


def alike(content: dict[str, Any]) -> dict[str, Any]:
    """What members have to have in common; content: a config.json."""
    sizes = {name: value for name, value in content["policy"].items() if name not in DECODING}
    return {"target": content.get(BACKBONE, "compact"), "sizes": sizes, "tokenizer": content["sha256"][TOKENIZER_FILE]}


def provenance_of(directories: Sequence[Path], contents: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of a mean: its members' whole records, and their data together as any policy's record has it."""
    records = [section(content, "provenance") for content in contents]
    data = [section(record, "data") for record in records]
    remembered = [int(section(record, "training").get("remembered_chunks") or 0) for record in records]
    hashes = [checkpoint_hash(directory) for directory in directories]
    members = [{"config_sha256": of, "provenance": record} for of, record in zip(hashes, records, strict=True)]
    return {
        "data": {"sources": distinct(data, "sources"), "instructions": sorted(distinct(data, "instructions"))},
        "training": {"remembered_chunks": min(remembered)} if all(remembered) else {},
        "average_of": once(members, "average_of", {}),
    }


def distinct(records: Sequence[dict[str, Any]], name: str) -> list[Any]:
    """What the lists of that name hold together, each once."""
    found = [value for record in records for value in record.get(name, [])]
    return [value for at, value in enumerate(found) if value not in found[:at]]


def once(told: Any, place: str, known: dict[str, str]) -> Any:
    """A record without those in it that were told before: members begin with the same policy, whose history is long.
    known: records that have been told, as JSON, and where; what is told here is added."""
    if isinstance(told, list):
        return [once(part, f"{place}.{at}", known) for at, part in enumerate(told)]
    if not isinstance(told, dict):
        return told
    if {"data", "training"} <= told.keys() and (first := known.setdefault(json.dumps(told), place)) != place:
        return {"same_as": first}
    return {name: once(part, f"{place}.{name}", known) for name, part in told.items()}
