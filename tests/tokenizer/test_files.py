"""A tokenizer on disk, and on the hub."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from rsd.tokenizer.action_tokenizer import FILE_NAME, ActionTokenizer, TokenizerConfig
from rsd.tokenizer.files import WEIGHTS_FILE
from rsd.types import RsdError

CONFIGS = {
    "default": TokenizerConfig(),
    "identity": TokenizerConfig(transform="identity", levels=5, rho=3.0, normalisation="minmax"),
    "pca": TokenizerConfig(transform="pca"),
    "gripper first": TokenizerConfig(binary=(0,)),
    "gripper of 0 and 1": TokenizerConfig(),
    "radians": TokenizerConfig(limit=0.0),
}
Edit = Callable[[dict[str, Any]], str]


def same(first: ActionTokenizer, second: ActionTokenizer, chunks: np.ndarray) -> None:
    batch = torch.tensor(chunks)
    (tokens, actions), (other_tokens, other_actions) = first.forward(batch), second.forward(batch)
    assert torch.equal(tokens.motion, other_tokens.motion)
    assert torch.equal(tokens.gripper, other_tokens.gripper)
    assert torch.equal(actions, other_actions)
    assert torch.equal(first.decode(tokens, 1), second.decode(tokens, 1))


def of_that_robot(name: str, chunks: np.ndarray) -> np.ndarray:
    if name == "gripper first":
        return np.roll(chunks, 1, axis=2)
    if name == "gripper of 0 and 1":
        return np.concatenate([chunks[..., :6], (chunks[..., 6:] + 1) / 2], axis=2)
    return chunks * np.float32([3, 3, 3, 3, 3, 3, 1]) if name == "radians" else chunks


@pytest.mark.parametrize("name", CONFIGS)
def test_save_and_load_change_nothing(name: str, chunks: np.ndarray, tmp_path: Path) -> None:
    chunks = of_that_robot(name, chunks)
    tokenizer = ActionTokenizer.fit(chunks, CONFIGS[name])
    tokenizer.save(tmp_path)
    loaded = ActionTokenizer.load(tmp_path)
    assert loaded.config == tokenizer.config
    assert loaded.first_step == tokenizer.first_step
    assert loaded.calibration == tokenizer.calibration
    assert torch.equal(loaded.low, tokenizer.low)
    assert torch.equal(loaded.high, tokenizer.high)
    assert (tmp_path / WEIGHTS_FILE).exists() == (name == "pca")
    same(tokenizer, loaded, chunks)
    before = (tmp_path / FILE_NAME).read_bytes()
    loaded.save(tmp_path)
    assert (tmp_path / FILE_NAME).read_bytes() == before


def test_saving_leaves_no_weights_of_another_tokenizer(chunks: np.ndarray, tmp_path: Path) -> None:
    ActionTokenizer.fit(chunks, CONFIGS["pca"]).save(tmp_path)
    ActionTokenizer.fit(chunks).save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]
    ActionTokenizer.load(tmp_path)


def edited(**changes: Any) -> Edit:
    return lambda content: json.dumps({**content, **changes})


def configured(**changes: Any) -> Edit:
    return lambda content: json.dumps({**content, "config": {**content["config"], **changes}})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (edited(format_version=3), "expected tokenizer format 2, found 3"),
        (edited(format_version=None), "expected tokenizer format 2, found None"),
        (edited(format_version=1), "expected tokenizer format 2, found 1; fit it again"),
        (lambda content: json.dumps(content)[:60], "not valid JSON"),
        (lambda content: "", "not valid JSON"),
        (lambda content: "[1, 2]", "expected a JSON object"),
        (lambda content: json.dumps({k: v for k, v in content.items() if k != "low"}), "missing ..low"),
        (edited(config={"levels": 8, "colour": 3}), "unknown or missing field of config"),
        (configured(rho=9.0), "field config: expected rho of at most 7, the symbols, found 9.0"),
        (configured(transform="wavelet"), "field config.transform: expected one of dct, identity, pca, found"),
        (configured(transform="pca"), "the matrix of transform pca: expected a tensor or an array"),
        (configured(transform="chunk-autoencoder"), "field config.transform: expected one of"),
        (configured(refine=True), "unknown or missing field of config: .* unknown ..refine"),
        (configured(bits=60.0), "unknown or missing field of config: .* unknown ..bits"),
        (configured(binary=[7]), "distinct dimensions within 7"),
        (edited(high=[float("nan")] * 6), "holds NaN"),
        (edited(high=[1e300] * 6), r"field high\[0\]: expected a number from -1000000000 to 1000000000, found 1e\+300"),
        (edited(high=[-9.0] * 6), "expected low <= high"),
        (edited(format_version=True), "expected tokenizer format 2, found True"),
        (configured(rho=True), "field config.rho: expected a number above 1, at most 1023, found True"),
        (configured(binary=-1), "field config.binary: expected a list"),
        (configured(levels=10**6), "field config.levels: expected an integer from 1 to 1024, found 1000000"),
        (configured(levels=7.5), "field config.levels: expected an integer from 1 to 1024, found 7.5"),
        (edited(low=0.0), "field low: expected a list"),
        (edited(high=[1.0] * 7), r"tokenizer range, high: expected \[6\], found \[7\]"),
        (edited(low=["zero"] * 6), r"field low\[0\]: expected a number from"),
        (edited(first_step=0.0), "field first_step: expected a number from 1e-09 to 1000000000, found 0.0"),
        (edited(first_step=1e300), r"field first_step: expected a number from 1e-09 to 1000000000, found 1e\+300"),
        (edited(first_step="fine"), "field first_step: expected a number"),
        (edited(active=["1" * 48] * 8), "unknown or missing field of StoredTokenizer: .* unknown ..active"),
        (edited(calibration={"chunks": -1, "clipped_chunks": 0, "clipped_coefficients": []}), "calibration.chunks"),
        (edited(calibration={"chunks": 3}), "unknown or missing field of calibration"),
        (edited(sha256="0" * 64), f"{WEIGHTS_FILE}: not found"),
    ],
)
def test_odd_files_are_refused(tokenizer: ActionTokenizer, tmp_path: Path, text: Edit, message: str) -> None:
    (tmp_path / FILE_NAME).write_text(text(tokenizer.to_json()))
    with pytest.raises(RsdError, match=message):
        ActionTokenizer.load(tmp_path)


def test_other_missing_or_binary_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RsdError, match="not found"):
        ActionTokenizer.load(tmp_path)
    (tmp_path / FILE_NAME).write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(RsdError, match="not valid JSON"):
        ActionTokenizer.load(tmp_path)


def test_weights_of_another_tokenizer_are_refused(chunks: np.ndarray, tmp_path: Path) -> None:
    ActionTokenizer.fit(chunks, CONFIGS["pca"]).save(tmp_path)
    weights = tmp_path / WEIGHTS_FILE
    tensors = load_file(weights)
    save_file({"matrix": tensors["matrix"].flip(0)}, weights)
    with pytest.raises(RsdError, match="sha256 differs"):
        ActionTokenizer.load(tmp_path)


def test_weights_that_hold_something_else_are_refused(chunks: np.ndarray, tmp_path: Path) -> None:
    import hashlib

    ActionTokenizer.fit(chunks, CONFIGS["pca"]).save(tmp_path)
    weights, path = tmp_path / WEIGHTS_FILE, tmp_path / FILE_NAME
    matrix = load_file(weights)["matrix"]
    for tensors, message in (
        ({"matrix": matrix * float("nan")}, "matrix of transform pca: expected finite numbers"),
        ({"matrix": matrix[:5].clone()}, r"expected \[48, 48\], found \[5, 48\]"),
        ({"matrix": matrix.double()}, "expected torch.float32, found torch.float64"),
        ({"matrix": matrix, "more": matrix[0].clone()}, "expected the tensor matrix, found matrix, more"),
    ):
        save_file(tensors, weights)
        content = json.loads(path.read_text())
        path.write_text(json.dumps({**content, "sha256": hashlib.sha256(weights.read_bytes()).hexdigest()}))
        with pytest.raises(RsdError, match=message):
            ActionTokenizer.load(tmp_path)
    weights.write_bytes(b"no tensors at all")
    path.write_text(json.dumps({**content, "sha256": hashlib.sha256(weights.read_bytes()).hexdigest()}))
    with pytest.raises(RsdError, match="not readable as safetensors"):
        ActionTokenizer.load(tmp_path)


def test_to_the_hub_and_back(chunks: np.ndarray, tmp_path: Path, hub_folder: Path) -> None:
    tokenizer = ActionTokenizer.fit(chunks, CONFIGS["pca"])
    tokenizer.push_to_hub("someone/code", private=True)
    same(tokenizer, ActionTokenizer.from_pretrained("someone/code"), chunks)
    same(tokenizer, ActionTokenizer.from_pretrained(hub_folder / "someone" / "code"), chunks)
    with pytest.raises(RsdError, match=r"tokenizer 'someone/else': .* the hub answered: no such repository"):
        ActionTokenizer.from_pretrained("someone/else")
    for odd in ("no-such-folder", "./a/b", str(tmp_path / "nothing")):
        with pytest.raises(RsdError, match=f"expected a directory with {FILE_NAME} or a hub id like owner/name"):
            ActionTokenizer.from_pretrained(odd)
