"""Names of before: checkpoints that hold them are read, command lines that use them are told the present one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from rsd import former, manifest
from rsd.checkpoint import CONFIG_FILE, WEIGHTS_FILE, facts_of, load_model, parse_config, read_content, read_weights
from rsd.cli import COMMANDS, dispatch
from rsd.decoding.decoders import DECODERS
from rsd.manifest import file_sha256
from rsd.models.bundle import PolicyConfig
from rsd.options import DecodeOptions, resolve
from rsd.tokenizer.action_tokenizer import ActionTokenizer
from rsd.types import RsdError

BEFORE = {now: name for name, now in former.PARTS.items()}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("eval --decode rsd-ahead", "rsd eval: error: --decode rsd-ahead: it is called draft-first now"),
        ("eval --decode=rsd-ahead", "rsd eval: error: --decode rsd-ahead: it is called draft-first now"),
        ("eval --decode light-alone", "rsd eval: error: --decode light-alone: it is called drafter-only now"),
        ("eval --decode draft", "rsd eval: error: --decode draft: it is called coarse-only now"),
        (
            "train policy --policy.light.dim 8",
            "rsd train policy: error: --policy.light.dim: it is called --policy.visual-",
        ),
        (
            "train policy --policy.main.dim 8",
            "rsd train policy: error: --policy.main.dim: it is called --policy.target.",
        ),
        (
            "train policy --policy.draft.dim 8",
            "rsd train policy: error: --policy.draft.dim: it is called --policy.feat",
        ),
        ("train drafter --kind light", "rsd train drafter: error: --kind light: it is called visual now"),
        ("train tokenizer --data x", "rsd: error: 'train tokenizer': it is called `rsd tokenizer fit` now"),
        ("train draft --kind visual", "rsd: error: 'train draft': it is called `rsd train drafter` now"),
        ("bench eval", "rsd: error: 'bench eval': it is called `python -m studies.throughput` now"),
        ("import-legacy --head x", "rsd: error: 'import-legacy': it is called `python -m studies.legacy` now"),
        ("tokenizer bench", "rsd: error: 'tokenizer bench': it is called `python -m studies.tokenizers` now"),
    ],
)
def test_a_former_name_on_the_command_line_is_told_the_present_one(
    line: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert dispatch(line.split()) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(message)
    assert printed.err.count("\n") == 1


def test_what_is_said_to_be_the_present_name_is_one() -> None:
    assert set(former.DECODERS.values()) <= set(DECODERS)
    assert not former.DECODERS.keys() & set(DECODERS)
    assert not former.COMMANDS.keys() & set(COMMANDS)
    assert {name.removeprefix("rsd ") for name in former.COMMANDS.values() if name.startswith("rsd ")} <= set(COMMANDS)
    assert set(former.PARTS.values()) <= PolicyConfig.__dataclass_fields__.keys()


@pytest.mark.parametrize("name", former.DECODERS)
def test_a_former_decoder_is_refused_in_python_too(name: str, checkpoint: Path) -> None:
    facts = facts_of(checkpoint, read_content(checkpoint))
    with pytest.raises(RsdError, match=f"it is called {former.DECODERS[name]} now"):
        resolve(facts, DecodeOptions(decode=name))


def test_the_weights_and_sizes_of_a_checkpoint_are_read_by_present_names(checkpoint: Path) -> None:
    now = json.loads((checkpoint / CONFIG_FILE).read_text())
    renamed = {}
    for name, value in load_file(checkpoint / WEIGHTS_FILE).items():
        part, dot, rest = name.partition(".")
        renamed[BEFORE[part] + dot + rest] = value
    assert {name.partition(".")[0] for name in renamed} == {"main", "draft", "light"}  # else this tests nothing
    save_file(renamed, checkpoint / WEIGHTS_FILE)
    stored = {**now, "policy": {BEFORE.get(name, name): value for name, value in now["policy"].items()}}
    stored["sha256"][WEIGHTS_FILE] = file_sha256(checkpoint / WEIGHTS_FILE)
    (checkpoint / CONFIG_FILE).write_text(json.dumps(stored))
    manifest.seal(checkpoint)
    weights = read_weights(checkpoint / WEIGHTS_FILE)
    assert {name.partition(".")[0] for name in weights} == {"target", "feature_drafter", "visual_drafter"}
    content = read_content(checkpoint)
    config = parse_config(checkpoint, content, PolicyConfig)
    assert config == parse_config(checkpoint, stored, PolicyConfig)  # as `rsd checkpoint seal` reads it
    assert config.target.image_size == stored["policy"]["main"]["image_size"]
    assert facts_of(checkpoint, content).visual_drafter
    model, _ = load_model(checkpoint, content, ActionTokenizer.load(checkpoint))
    assert model.state_dict().keys() == weights.keys()
