"""A checkpoint directory: what is written is what is read, and what is damaged is refused."""

import json
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from refusals import tree
from rsd import manifest
from rsd.checkpoint import (
    CONFIG_FILE,
    LARGE,
    WEIGHTS_FILE,
    gate_of,
    load_weights,
    read_content,
    schedule_of,
    seal,
)
from rsd.cli import dispatch
from rsd.decoding.calibration import FILE_NAME as CALIBRATION_FILE
from rsd.decoding.gate import SkipRule
from rsd.json_files import from_json
from rsd.models.bundle import PolicyConfig, RsdModel
from rsd.policy import RsdPolicy
from rsd.tokenizer.action_tokenizer import FILE_NAME as TOKENIZER_FILE
from rsd.tokenizer.action_tokenizer import ActionTokenizer
from rsd.types import Observation, RsdError

MakeObservation = Callable[..., Observation]
Damage = Callable[[Path], object]


def test_half_precision_on_disk_costs_little(
    policy: RsdPolicy, checkpoint: Path, make_observation: MakeObservation
) -> None:
    original = RsdPolicy.of(policy.model, policy.tokenizer, policy.config, decode="l1")
    loaded = RsdPolicy.from_pretrained(checkpoint, decode="l1")
    before, after = (p.predict(make_observation()).actions for p in (original, loaded))
    assert np.abs(before - after).max() < 5e-3


def test_weights_that_are_not_finite_are_not_saved(policy: RsdPolicy, tmp_path: Path) -> None:
    policy.model.target.level_head.weight.data[0, 0, 0] = 1e6  # beyond fp16
    with pytest.raises(RsdError, match=r"target.level_head.weight is not finite as float16; .* nothing was saved"):
        policy.save_pretrained(tmp_path / "new")
    assert not list((tmp_path / "new").glob("*"))


@pytest.mark.parametrize("name", ["episodes.jsonl", "training_state.pt", "drafter.json", "corrector.json", "a.hdf5"])
def test_a_checkpoint_does_not_come_among_files_of_something_else(name: str, policy: RsdPolicy, tmp_path: Path) -> None:
    (tmp_path / name).touch()
    (tmp_path / "config.json").write_text("somebody's")
    before = tree(tmp_path)
    with pytest.raises(RsdError, match=f"expected a checkpoint, or nothing yet, found {name} in it"):
        policy.save_pretrained(tmp_path)
    assert tree(tmp_path) == before


def test_defaults_come_with_the_checkpoint(policy: RsdPolicy, tmp_path: Path) -> None:
    config = replace(policy.config, acceptance="agreement(0.5)", fine="sequential")
    RsdPolicy.of(policy.model, policy.tokenizer, config).save_pretrained(tmp_path)
    loaded = RsdPolicy.from_pretrained(tmp_path)
    assert (loaded.acceptance, loaded.core.decoding.fine) == ("agreement(0.5)", "sequential")
    loaded = RsdPolicy.from_pretrained(tmp_path, acceptance="exact", fine="regress")
    assert (loaded.acceptance, loaded.core.decoding.fine) == ("exact", "regress")


def test_a_checkpoint_may_skip_by_a_schedule(policy: RsdPolicy, tmp_path: Path) -> None:
    RsdPolicy.of(policy.model, policy.tokenizer, replace(policy.config, max_skips=3)).save_pretrained(tmp_path)
    assert gate_of(tmp_path) == {"skip_schedule": 3}
    assert RsdPolicy.from_pretrained(tmp_path, decode="rsd-skip").core.decoding.skip == SkipRule.schedule(3)
    held = replace(policy.config, max_skips=3, max_skips_held=1)
    RsdPolicy.of(policy.model, policy.tokenizer, held).save_pretrained(tmp_path / "held")
    assert gate_of(tmp_path / "held") == {"skip_schedule": 3, "skip_schedule_held": 1}
    assert RsdPolicy.from_pretrained(tmp_path / "held", decode="rsd-skip").core.decoding.skip.max_skips_held == 1
    assert "3 chunks in a row without the target (1 while" in schedule_of(read_content(tmp_path / "held"))
    with pytest.raises(RsdError, match="expected max_skips_held of at most max_skips, None, found 1"):
        replace(policy.config, max_skips_held=1)
    (tmp_path / CALIBRATION_FILE).write_text("{}")  # a damaged one is not passed over
    manifest.seal(tmp_path)
    with pytest.raises(RsdError, match=CALIBRATION_FILE):
        RsdPolicy.from_pretrained(tmp_path, decode="rsd-skip")


def sign(checkpoint: Path) -> None:
    """Make all digests those of the files as they are now, whether they load or not."""
    content = json.loads((checkpoint / CONFIG_FILE).read_text())
    for name in (WEIGHTS_FILE, TOKENIZER_FILE):
        content["sha256"][name] = manifest.file_sha256(checkpoint / name)
    (checkpoint / CONFIG_FILE).write_text(json.dumps(content))
    manifest.seal(checkpoint)


def cut(checkpoint: Path, name: str) -> None:
    content = (checkpoint / name).read_bytes()
    (checkpoint / name).write_bytes(content[: len(content) // 2])


def edited_weights(change: Callable[[dict[str, Tensor]], object]) -> Damage:
    def damage(checkpoint: Path) -> None:
        weights = load_file(checkpoint / WEIGHTS_FILE)
        change(weights)
        save_file(weights, checkpoint / WEIGHTS_FILE)

    return damage


def edited_config(change: Callable[[dict[str, Any]], object]) -> Damage:
    def damage(checkpoint: Path) -> None:
        content = json.loads((checkpoint / CONFIG_FILE).read_text())
        change(content)
        (checkpoint / CONFIG_FILE).write_text(json.dumps(content))

    return damage


HEAD = "target.gripper_head.weight"
WEIGHT_DAMAGE: dict[str, tuple[Damage, str]] = {
    "truncated": (lambda c: cut(c, WEIGHTS_FILE), "not readable as safetensors"),
    "missing": (edited_weights(lambda w: w.pop(HEAD)), rf"missing \['{HEAD}'\]"),
    "unknown": (edited_weights(lambda w: w.update(surprise=torch.zeros(1))), r"unknown \['surprise'\]"),
    "wrong shape": (
        edited_weights(lambda w: w.update({HEAD: torch.zeros(2, 64)})),
        rf"{HEAD} expected \[1, 64\], found \[2, 64\]",
    ),
    "NaN": (edited_weights(lambda w: w[HEAD].fill_(float("nan"))), f"{HEAD} holds NaN"),
    "infinity": (edited_weights(lambda w: w[HEAD].fill_(float("inf"))), f"{HEAD} holds NaN or infinity"),
    "absent": (lambda c: (c / WEIGHTS_FILE).unlink(), "not found"),
    **{
        str(kind): (edited_weights(lambda w, kind=kind: w.update({HEAD: w[HEAD].to(kind)})), f"found {kind}")
        for kind in (torch.float64, torch.int32, torch.bool, torch.complex64, torch.bfloat16)
    },
    "no scale": (edited_weights(lambda w: [v.zero_() for k, v in w.items() if k.endswith(".scale")]), "above 0"),
}


@pytest.mark.parametrize("damage", WEIGHT_DAMAGE)
def test_damaged_weights_are_refused(checkpoint: Path, policy: RsdPolicy, damage: str) -> None:
    change, message = WEIGHT_DAMAGE[damage]
    change(checkpoint)
    with pytest.raises(RsdError, match=message):
        load_weights(policy.model, checkpoint / WEIGHTS_FILE)
    # a checkpoint says so first by its digest, and by the weights where the digest was made to fit
    for sealed in (True, False):
        if not sealed:
            manifest.seal(checkpoint)
        with pytest.raises(RsdError, match="not found" if damage == "absent" else "sha256 differs"):
            RsdPolicy.from_pretrained(checkpoint)
    if damage != "absent":
        sign(checkpoint)
        with pytest.raises(RsdError, match=message):
            RsdPolicy.from_pretrained(checkpoint)


def other_step(checkpoint: Path) -> None:
    content = json.loads((checkpoint / TOKENIZER_FILE).read_text())
    content["first_step"] *= 2
    (checkpoint / TOKENIZER_FILE).write_text(json.dumps(content))


CHECKPOINT_DAMAGE: dict[str, tuple[Damage, str]] = {
    "no tokenizer": (lambda c: (c / TOKENIZER_FILE).unlink(), "tokenizer.json: not found"),
    "a directory": (lambda c: [(c / CONFIG_FILE).unlink(), (c / CONFIG_FILE).mkdir()], "expected a file, found a"),
    "nested": (lambda c: (c / CONFIG_FILE).write_text("[" * 10**5), "nested too deeply"),
    "NaN": (edited_config(lambda c: c.update(provenance=float("nan"))), "holds NaN"),
    "huge": (edited_config(lambda c: c["policy"]["target"].update(dim=2**40)), "field target.dim: expected an integer"),
    "wide": (
        edited_config(lambda c: c["policy"]["target"].update(dim=2**14)),
        r"model.safetensors: .* expected .*16384",
    ),
    "true": (edited_config(lambda c: c.update(format_version=True)), "expected checkpoint format 1, found True"),
    "text": (
        edited_config(lambda c: c["policy"]["target"].update(dim="64")),
        "field target.dim: expected an integer from 1 to 32768, found '64'",
    ),
    "null": (
        edited_config(lambda c: c["policy"]["target"].update(layers=None)),
        "target.layers: expected an integer from 1 to 256, found None",
    ),
    "number": (edited_config(lambda c: c["policy"].update(acceptance=3)), "field acceptance: expected text, found 3"),
    "no schedule": (edited_config(lambda c: c["policy"].update(max_skips=0)), "field max_skips: expected an integer"),
    "heads": (edited_config(lambda c: c["policy"]["target"].update(heads=3)), "field target: expected heads that divi"),
    "no channels": (edited_config(lambda c: c["policy"]["visual_drafter"].update(channels=[0] * 4)), "channels.0.: ex"),
    "no shrink": (
        edited_config(lambda c: c["policy"]["visual_drafter"].update(shrink=0)),
        "field visual_drafter.shrink: expected an integer from 1 to 64, found 0",
    ),
    "visual_drafter": (
        edited_config(lambda c: c["policy"].update(visual_drafter=True)),
        "field visual_drafter: expected .*, found True",
    ),
    "provenance": (edited_config(lambda c: c.update(provenance=[])), "field provenance: expected an object"),
    "no config": (lambda c: (c / CONFIG_FILE).unlink(), "config.json: not found"),
    "cut config": (lambda c: cut(c, CONFIG_FILE), "not valid JSON"),
    "binary config": (lambda c: (c / CONFIG_FILE).write_bytes(b"\xff\x00\xfe"), "not valid JSON"),
    "other JSON": (lambda c: (c / CONFIG_FILE).write_text("[]"), "expected a JSON object, found "),
    "other version": (edited_config(lambda c: c.update(format_version=2)), "expected checkpoint format 1, found 2"),
    "no digests": (edited_config(lambda c: c.update(sha256={})), "sha256 differs"),
    "no sizes": (edited_config(lambda c: c.pop("policy")), "unknown or missing field"),
    "unknown field": (edited_config(lambda c: c["policy"]["target"].update(width=3)), "unknown or missing field"),
    "other sizes": (
        edited_config(lambda c: c["policy"]["target"].update(layers=3)),
        "does not fit config.json; missing",
    ),
    "impossible sizes": (edited_config(lambda c: c["policy"]["target"].update(image_size=33)), "image_size"),
    "deep draft": (
        edited_config(lambda c: c["policy"]["feature_drafter"].update(levels=8)),
        "draft: expected 1 to 7 levels",
    ),
    "unknown acceptance": (
        edited_config(lambda c: c["policy"].update(acceptance="always")),
        r"config\.json: policy: acceptance 'always'",
    ),
    "more while held": (
        edited_config(lambda c: c["policy"].update(max_skips=2, max_skips_held=3)),
        r"config\.json: policy: expected max_skips_held of at most max_skips, 2, found 3",
    ),
}


@pytest.mark.parametrize("damage", CHECKPOINT_DAMAGE)
def test_damaged_checkpoints_are_refused(checkpoint: Path, damage: str) -> None:
    RsdPolicy.from_pretrained(checkpoint)
    change, message = CHECKPOINT_DAMAGE[damage]
    change(checkpoint)
    if damage not in ("no tokenizer", "a directory"):  # which are found first, and never sealed
        with pytest.raises(RsdError, match=r"not found|is not what manifest\.json names"):
            RsdPolicy.from_pretrained(checkpoint)
        manifest.seal(checkpoint)
    with pytest.raises(RsdError, match=message):
        RsdPolicy.from_pretrained(checkpoint)


def test_what_no_digest_named_before_is_sealed(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Other numbers of the right type and shape load, and act differently: only a hash can tell."""
    edits = (edited_config(lambda c: c["policy"]["target"].update(heads=4)), other_step)
    for edit, name in zip(edits, (CONFIG_FILE, TOKENIZER_FILE), strict=True):
        edit(checkpoint)
        with pytest.raises(RsdError, match=f"{name}: is not what manifest.json names .* checkpoint seal {checkpoint}"):
            RsdPolicy.from_pretrained(checkpoint)
        assert dispatch(["checkpoint", "seal", str(checkpoint)]) == 0
        assert name in capsys.readouterr().out
        RsdPolicy.from_pretrained(checkpoint)
    assert seal(checkpoint) == []
    for name in ("proven.json", CALIBRATION_FILE, "tokenizer.safetensors"):
        (checkpoint / name).write_text("{}")
        with pytest.raises(RsdError, match=f"{name}: came later than manifest.json"):
            RsdPolicy.from_pretrained(checkpoint)
        (checkpoint / name).unlink()
    (checkpoint / "README.md").write_text("for people")
    RsdPolicy.from_pretrained(checkpoint)


def step_of(size: float) -> Damage:
    def change(checkpoint: Path) -> None:
        content = json.loads((checkpoint / TOKENIZER_FILE).read_text())
        (checkpoint / TOKENIZER_FILE).write_text(json.dumps({**content, "first_step": size}))

    return change


NOT_SEALED: tuple[tuple[Damage, str], ...] = (
    (edited_weights(lambda w: w.pop(HEAD)), "does not fit config"),
    (edited_config(lambda c: c["policy"].update(fine="regres")), "fine: expected one of regress, sequential, found"),
    (edited_config(lambda c: c["policy"].update(acceptance="blind(2)")), "acceptance 'blind.2.': expected exact, marg"),
    (edited_config(lambda c: c.update(backbone="openvlaX")), "expected no backbone or openvla .*, found"),
    (edited_config(lambda c: c["policy"]["target"].update(dropout=7.0)), "target.dropout: expected a number from 0 to"),
    (step_of(1e300), "first_step: expected a number from 1e-09 to 1000000000, found 1e.300"),
    (lambda c: (c / CALIBRATION_FILE).write_text("{}"), "expected skip calibration format 3, found None"),
)


@pytest.mark.parametrize(("change", "message"), NOT_SEALED, ids=[message[:12] for _, message in NOT_SEALED])
def test_what_does_not_load_is_not_sealed(checkpoint: Path, change: Damage, message: str) -> None:
    change(checkpoint)
    before = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    with pytest.raises(RsdError, match=message):
        seal(checkpoint)
    assert {path.name: path.read_bytes() for path in checkpoint.iterdir()} == before


def test_everybody_may_read_all_of_a_checkpoint_or_nobody(policy: RsdPolicy, tmp_path: Path) -> None:
    policy.save_pretrained(tmp_path / "saved")
    assert len({path.stat().st_mode for path in (tmp_path / "saved").iterdir()}) == 1


def test_a_checkpoint_without_a_manifest_is_refused(checkpoint: Path) -> None:
    (checkpoint / manifest.MANIFEST_FILE).unlink()
    with pytest.raises(RsdError, match=f"manifest.json: not found; .* rsd checkpoint seal {checkpoint}"):
        RsdPolicy.from_pretrained(checkpoint)
    seal(checkpoint)
    RsdPolicy.from_pretrained(checkpoint)
    (checkpoint.parent / "none").mkdir()
    with pytest.raises(RsdError, match=r"config.json: not found; a checkpoint directory holds config.json"):
        RsdPolicy.from_pretrained(checkpoint.parent / "none")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "expected a JSON object"),
        ('{"format_version": true, "sha256": {}}', "expected manifest format 1, found True"),
        ('{"format_version": 1}', r"missing \['sha256'\]"),
        ('{"format_version": 1, "sha256": {"config.json": 3}}', "field sha256.config.json: expected a SHA-256 in hexa"),
        ('{"format_version": 1, "sha256": {}}', "config.json: came later"),
        ('{"format_version": 1, "sha256": {"../x.json": "' + "0" * 64 + '"}}', "x.json: not found"),
    ],
)
def test_an_odd_manifest_is_refused(checkpoint: Path, content: str, message: str) -> None:
    (checkpoint / manifest.MANIFEST_FILE).write_text(content)
    with pytest.raises(RsdError, match=message):
        RsdPolicy.from_pretrained(checkpoint)


def test_no_such_checkpoint(checkpoint: Path, tmp_path: Path, hub_folder: Path) -> None:
    for path in (tmp_path / "nowhere", "./nowhere", "nowhere", checkpoint / CONFIG_FILE):
        with pytest.raises(RsdError, match="expected a checkpoint directory or a hub id"):
            RsdPolicy.from_pretrained(path)
    with pytest.raises(RsdError, match="no such directory, and the hub answered: no such repository"):
        RsdPolicy.from_pretrained("somebody/something")


def test_to_the_hub_and_back(policy: RsdPolicy, hub_folder: Path) -> None:
    policy.push_to_hub("somebody/something", private=True)
    assert RsdPolicy.from_pretrained("somebody/something").provenance == {"data": "random weights"}
    found = {path.name for path in (hub_folder / "somebody" / "something").iterdir()}
    assert found == {CONFIG_FILE, WEIGHTS_FILE, TOKENIZER_FILE, manifest.MANIFEST_FILE}


def test_config_survives_json(tiny_config: PolicyConfig, tokenizer: ActionTokenizer, tmp_path: Path) -> None:
    policy = RsdPolicy.of(RsdModel.of(tiny_config, tokenizer), tokenizer, tiny_config)
    policy.save_pretrained(tmp_path)
    content = json.loads((tmp_path / CONFIG_FILE).read_text())
    assert from_json(PolicyConfig, content["policy"], "policy") == tiny_config


def test_a_configuration_without_its_policy_is_refused(checkpoint: Path) -> None:
    content = json.loads((checkpoint / CONFIG_FILE).read_text())
    for damaged in ({}, {"policy": None}):
        kept = {name: value for name, value in content.items() if name != "policy"}
        (checkpoint / CONFIG_FILE).write_text(json.dumps({**kept, **damaged}))
        manifest.seal(checkpoint)
        with pytest.raises(RsdError, match=r"config.json: (unknown or missing .*'policy'|field policy: expected)"):
            RsdPolicy.from_pretrained(checkpoint)


def test_matrices_and_convolutions_are_int8_within_half_a_step(policy: RsdPolicy, checkpoint: Path) -> None:
    loaded = RsdPolicy.from_pretrained(checkpoint, decode="l1").model.state_dict()
    eight = [name for name, value in load_file(checkpoint / WEIGHTS_FILE).items() if value.dtype == torch.int8]
    large = {name for name, value in loaded.items() if value.ndim in (2, 4) and value.numel() >= LARGE}
    assert set(eight) == large
    for name in eight:
        weight = policy.model.state_dict()[name]
        step = weight.flatten(1).abs().amax(1) / 127
        assert ((loaded[name] - weight).abs().flatten(1).amax(1) <= 0.5 * step + 1e-7).all(), name


def test_an_int8_weight_without_its_scale_is_refused(policy: RsdPolicy, checkpoint: Path) -> None:
    weights = load_file(checkpoint / WEIGHTS_FILE)
    name = next(name for name, value in weights.items() if value.dtype == torch.int8)
    save_file({k: v for k, v in weights.items() if k != f"{name}.scale"}, checkpoint / WEIGHTS_FILE)
    with pytest.raises(RsdError, match="is int8 and lacks its scale per row"):
        load_weights(policy.model, checkpoint / WEIGHTS_FILE)


def test_a_clone_with_other_line_ends_is_the_same(checkpoint: Path, tmp_path: Path) -> None:
    """core.autocrlf rewrote the JSON files, whose hashes then differed."""
    root, source = Path(__file__).parents[1], tmp_path / "source"
    source.mkdir()
    shutil.copytree(checkpoint, source / "policy")
    shutil.copy(root / ".gitattributes", source)
    own = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(source)]
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "policy"]):
        subprocess.run([*own, *command], check=True)
    clone = ["git", "-c", "core.autocrlf=true", "clone", "-q", str(source), str(tmp_path / "clone")]
    subprocess.run(clone, check=True)
    for path in checkpoint.iterdir():
        assert (tmp_path / "clone" / "policy" / path.name).read_bytes() == path.read_bytes()
    RsdPolicy.from_pretrained(tmp_path / "clone" / "policy")
