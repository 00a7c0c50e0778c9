"""The mean of the weights of several policies that were trained on from the same one ("model soups", Wortsman et al.,
arXiv 2203.05482): what each training learnt anew stays, what each forgot or learnt by chance is averaged away."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, fields
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
from rsd.models.config import OwnDecoding, TargetConfig
from rsd.tokenizer.action_tokenizer import ActionTokenizer
from rsd.types import RsdError

FAR = 0.5  # from their mean, as a share of its size: 0.06 of the policies of two trainings, some 1 of unrelated ones
ALIKE = "only policies that continue the same one have a mean"


def average(policies: Sequence[str | Path], output: Path) -> Path:
    """Write a checkpoint whose weights are the mean of those policies'; one that is named twice counts twice.

    All have to be compact, of the same sizes and with the same tokenizer, else `RsdError`; how it decodes is the last
    one's. What was calibrated of one of them is not of the mean: measure that anew.
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
                raise RsdError(f"{directory}: expected the {what} of {directories[0]}, found {found}; {ALIKE}")
    if BACKBONE in contents[0]:
        raise RsdError(f"{directories[0]}: expected a compact policy, found one on {contents[0][BACKBONE]}")
    tokenizer = ActionTokenizer.load(directories[-1])
    loaded = [load_model(*each, tokenizer) for each in zip(directories, contents, strict=True)]
    states = [model.state_dict() for model, _ in loaded]
    mean = {name: torch.stack([state[name] for state in states]).double().mean(0) for name in states[0]}
    size = sum(float(value.square().sum()) for value in mean.values())
    for directory, state in zip(directories, states, strict=True):
        apart = (sum(float((state[name] - mean[name]).square().sum()) for name in mean) / size) ** 0.5
        if apart > FAR:
            raise RsdError(f"{directory}: expected weights near their mean, found {apart:.0%} of its size off; {ALIKE}")
    model, config = loaded[-1]
    model.load_state_dict(mean)
    save_checkpoint(model, tokenizer, config, provenance_of(directories, contents), output)
    return output


def alike(content: dict[str, Any]) -> dict[str, Any]:
    """What members have to have in common; content: a config.json."""
    decoding = {each.name for each in fields(OwnDecoding)}  # is the last one's
    sizes = {name: value for name, value in content["policy"].items() if name not in decoding}
    if isinstance(target := sizes.get("target"), dict):  # a checkpoint of before may lack a field
        sizes["target"] = {**asdict(TargetConfig()), **target}
    return {"target": content.get(BACKBONE, "compact"), "sizes": sizes, "tokenizer": content["sha256"][TOKENIZER_FILE]}


def provenance_of(directories: Sequence[Path], contents: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of a mean: its members' whole records, and their data together as any policy's record has it."""
    records = [section(content, "provenance") for content in contents]
    sources = {json.dumps(each): each for record in records for each in section(record, "data").get("sources", [])}
    told = {text for record in records for text in section(record, "data").get("instructions", [])}
    remembered = [int(section(record, "training").get("remembered_chunks") or 0) for record in records]
    pairs = zip(directories, records, strict=True)
    members = [{"config_sha256": checkpoint_hash(directory), "provenance": record} for directory, record in pairs]
    return {
        "data": {"sources": list(sources.values()), "instructions": sorted(told)},
        "training": {"remembered_chunks": min(remembered)} if all(remembered) else {},
        "average_of": once(members, "average_of", {}),
    }


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
