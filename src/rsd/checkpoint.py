"""A policy's checkpoint directory: find it, read it, check that its files belong together, write it.

It holds `config.json` (sizes, decoding defaults, provenance), `model.safetensors` (large matrices and convolutions
int8, the rest fp16), `tokenizer.json`, `manifest.json` with the hash of every file and, for `rsd-skip`,
`skip_calibration.json`. Loading is strict: a file that is not what the manifest names, a value of another type,
weights that are missing, misshapen, not finite or of another precision are an error.
"""

from __future__ import annotations

import importlib
import json
import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from rsd import former, hub, manifest
from rsd.checks import Checked, Rules, Sha256, Where, told
from rsd.decoding.acceptance import acceptance_rule
from rsd.decoding.calibration import FILE_NAME as CALIBRATION_FILE
from rsd.decoding.calibration import SkipCalibration
from rsd.json_files import from_json, read_versioned, section, write_atomically
from rsd.manifest import file_sha256
from rsd.models.bundle import PolicyConfig, RsdModel
from rsd.models.config import OwnDecoding
from rsd.options import Checkpoint, DecodeOptions, resolve
from rsd.pt_files import save_tensors
from rsd.tokenizer.action_tokenizer import FILE_NAME as TOKENIZER_FILE
from rsd.tokenizer.action_tokenizer import ActionTokenizer
from rsd.tokenizer.config import RfsqConfig
from rsd.tokenizer.files import WEIGHTS_FILE as MATRIX_FILE
from rsd.tokenizer.files import read_tokenizer_json
from rsd.types import RsdError

FORMAT_VERSION = 1
CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
BACKBONE, OPENVLA = "backbone", "openvla"  # in config.json; the compact target where it is absent
# its module, read only if needed, has `load` (docs/architecture.md), `check_files` and `parts`
BACKBONES = {OPENVLA: "rsd.targets.openvla.rsd_policy"}
LARGE = 2**14  # numbers in a weight; smaller ones are not worth rounding
SCALE = ".scale"  # after the name of a weight that is stored as int8
PRECISIONS = (torch.float16, torch.float32)  # of what is not int8
LOG = logging.getLogger(__name__)

Config = TypeVar("Config")
FileName = Annotated[str, Where(re.compile(r"\w[\w.-]*(/\w[\w.-]*)?").fullmatch, "that is the name of a file there")]


@dataclass(frozen=True)
class Content(Checked):
    """config.json. sha256: of the files that a policy cannot do without. base: path and fingerprint of the OpenVLA
    model beneath, where there is one."""

    policy: dict[str, Any]
    sha256: dict[FileName, Sha256]
    provenance: dict[str, Any] = field(default_factory=dict)
    backbone: str = OPENVLA
    base: dict[str, str] = field(default_factory=dict)

    def rules(self) -> Rules:
        expected = f"no {BACKBONE} or {', '.join(BACKBONES)} (another takes a newer rsd-vla)"
        yield self.backbone in BACKBONES, expected, self.backbone


def locate_checkpoint(path_or_hub_id: str | Path) -> Path:
    """A local directory as it is; otherwise `owner/name` on the Hugging Face hub, downloaded to its cache."""
    files = [CONFIG_FILE, WEIGHTS_FILE, TOKENIZER_FILE, MATRIX_FILE, CALIBRATION_FILE]
    files += [manifest.MANIFEST_FILE, "lora_adapter/*"]  # an adapter where the target is OpenVLA
    return hub.locate(path_or_hub_id, "policy", "a checkpoint directory", files)


def checkpoint_hash(path_or_hub_id: str | Path) -> str:
    """SHA-256 of a checkpoint's config.json, which holds the hashes of its other files."""
    return file_sha256(locate_checkpoint(path_or_hub_id) / CONFIG_FILE)


def weights_hash(path_or_hub_id: str | Path) -> str:
    """SHA-256 of a checkpoint's weights file."""
    return file_sha256(locate_checkpoint(path_or_hub_id) / WEIGHTS_FILE)


def read_content(directory: Path) -> dict[str, Any]:
    """config.json, of this format and with the files that belong to it, all of them as the manifest names them."""
    if not (directory / CONFIG_FILE).exists():
        _read_config(directory)  # says what is lacking
    sealed = manifest.verify(directory)
    raw, content = _read_config(directory)
    for name in _names(content):
        if not (directory / name).is_file():
            raise RsdError(f"{directory / name}: not found; the checkpoint is incomplete, copy it again")
        if sealed.sha256.get(name) != content.sha256.get(name):
            expected = f"does not belong to this {CONFIG_FILE} (sha256 differs)"
            raise RsdError(f"{directory / name}: {expected}; {manifest.REMEDY} {directory}")
    return {**raw, "policy": former.parts(content.policy)}


def _read_config(directory: Path) -> tuple[dict[str, Any], Content]:
    """config.json as it is, and its parts."""
    path = directory / CONFIG_FILE
    raw = read_versioned(path, "checkpoint", FORMAT_VERSION, "use the rsd-vla that wrote it, or train again")
    content = from_json(Content, raw, str(path), ignore=("format_version",))
    if BACKBONE in raw and not {"path", "fingerprint"} <= content.base.keys():
        raise RsdError(f"{path}: unknown or missing field of base: expected path and fingerprint, found {content.base}")
    return raw, content


def _names(content: Content) -> Iterable[str]:
    """The files that config.json names."""
    return dict.fromkeys([WEIGHTS_FILE, TOKENIZER_FILE, *content.sha256])


def seal(directory: Path) -> list[str]:
    """Make config.json and the manifest name a checkpoint's files as they are -> those that had changed.

    `RsdError`, and nothing written, if the files would not load.
    """
    raw, content = _read_config(directory)
    tokenizer = ActionTokenizer.load(directory)
    hashes = {name: file_sha256(directory / name) for name in _names(content)}
    if BACKBONE in raw:
        read_weights(directory / WEIGHTS_FILE)  # its loader needs the base, too
    else:
        load_model(directory, raw, tokenizer)
    if (directory / CALIBRATION_FILE).exists():
        # may be of other weights: the next step then is to calibrate these
        for caution in long_memory(raw, SkipCalibration.load(directory).memory_chunks):
            LOG.warning("%s: %s", directory / CALIBRATION_FILE, caution)
    settled = {**raw, "policy": former.parts(content.policy), "sha256": hashes}
    resolve(facts_of(directory, settled), DecodeOptions())
    before = manifest.read_manifest(directory)
    known = content.sha256 if before is None else before.sha256
    if hashes != content.sha256:
        write_atomically(directory / CONFIG_FILE, json.dumps({**raw, "sha256": hashes}, indent=1) + "\n")
    sealed = manifest.seal(directory).sha256
    return sorted(name for name in sealed.keys() | known.keys() if sealed.get(name) != known.get(name))


def backbone_of(content: dict[str, Any]) -> Any:
    """The module of a checkpoint's backbone, None for the compact target; content: its config.json."""
    return importlib.import_module(BACKBONES[content[BACKBONE]]) if BACKBONE in content else None


def parse_config(directory: Path, content: dict[str, Any], kind: type[Config]) -> Config:
    """The policy's configuration, a dataclass; content: config.json, which had no visual drafter before there were
    any."""
    policy = former.parts(content["policy"])
    return from_json(kind, {"visual_drafter": None, **policy}, f"{directory / CONFIG_FILE}: policy")


def load_model(directory: Path, content: dict[str, Any], tokenizer: ActionTokenizer) -> tuple[RsdModel, PolicyConfig]:
    """A compact policy's models, on the CPU, and their configuration; content: its config.json."""
    config, path = parse_config(directory, content, PolicyConfig), directory / WEIGHTS_FILE
    with NoDraws(), torch.device("meta"):
        model = RsdModel.of(config, tokenizer)
    model.load_state_dict(fitting(read_weights(path), model, path), assign=True)
    return model, config


class NoDraws(TorchFunctionMode):
    """For modules that are made on the device "meta": drawing their weights there, or scaling them, which changes no
    shape, would import torch's compiler and sympy, 0.7 s."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given, name = kwargs or {}, getattr(func, "__name__", "")
        if name == "mul" or name.endswith(("uniform_", "normal_")):
            return args[0] if args else given["tensor"]
        return (torch.empty if name == "randn" else func)(*args, **given)


def load_weights(model: nn.Module, path: Path) -> None:
    """Strict: names and shapes must be the model's own, values finite. fp16 or int8 on disk, float32 in memory."""
    model.load_state_dict(fitting(read_weights(path), model, path))


def read_weights(path: Path) -> dict[str, Tensor]:
    """Name -> float32, finite; `RsdError` for what `save_checkpoint` would not have written."""
    try:
        stored = {former.weight(name): value for name, value in load_file(path).items()}
    except FileNotFoundError:
        raise RsdError(f"{path}: not found") from None
    except (SafetensorError, OSError) as error:
        raise RsdError(f"{path}: not readable as safetensors ({told(error)}); it is cut off or damaged") from None
    weights, scales = {}, {name + SCALE for name, value in stored.items() if value.dtype == torch.int8}
    for name, value in stored.items():
        scale = stored.get(name + SCALE)
        if value.dtype == torch.int8:
            if scale is None or list(scale.shape) != list(value.shape[:1]) or scale.dtype not in PRECISIONS:
                raise RsdError(f"{path}: {name} is int8 and lacks its scale per row; copy the checkpoint again")
            if not (scale > 0).all():
                raise RsdError(f"{path}: {name + SCALE} expected numbers above 0; copy the checkpoint again")
            weights[name] = value.float() * scale.view(-1, *[1] * (value.ndim - 1))
        elif value.dtype not in PRECISIONS:
            expected = "torch.float16, torch.float32, or torch.int8 with a scale"
            raise RsdError(f"{path}: {name} expected {expected}, found {value.dtype}")
        elif name not in scales:
            weights[name] = value.to(torch.float32, copy=True)  # not the file's own memory
    for name, value in weights.items():
        if not torch.isfinite(value).all():
            raise RsdError(f"{path}: {name} holds NaN or infinity")
    return weights


def fitting(stored: Mapping[str, Tensor], model: nn.Module, path: Path) -> dict[str, Tensor]:
    """The weights for the model; `RsdError` unless names and shapes are its own; path: of the weights."""
    expected = model.state_dict()
    weights = {name: former.stem(value, expected.get(name, value)) for name, value in stored.items()}
    missing, unknown = sorted(expected.keys() - weights.keys()), sorted(weights.keys() - expected.keys())
    if missing or unknown:
        raise RsdError(f"{path}: does not fit config.json; missing {missing[:5]}, unknown {unknown[:5]}")
    for name, value in weights.items():
        if value.shape != expected[name].shape:
            raise RsdError(f"{path}: {name} expected {list(expected[name].shape)}, found {list(value.shape)}")
    return weights


def load_calibration(directory: Path, weights_sha256: str | None = None) -> SkipCalibration:
    """The skip calibration of a checkpoint directory; `RsdError` without one, or if it is of other weights, whose hash
    may be known."""
    if not (directory / CALIBRATION_FILE).exists():
        raise RsdError(f"{directory}: rsd-skip needs a {CALIBRATION_FILE}, found none; make it with `rsd calibrate`")
    calibration = SkipCalibration.load(directory)
    calibration.check_belongs(weights_sha256 or file_sha256(directory / WEIGHTS_FILE))
    return calibration


def long_memory(content: dict[str, Any], asked: int) -> list[str]:
    """A sentence where `rsd-skip` would let the drafter attend to what is older than anything it was trained to
    remember. content: config.json; asked: chunks."""
    trained = section(content, "provenance", "training").get("remembered_chunks")
    if not isinstance(trained, int) or asked <= trained:
        return []
    return [f"its drafter was trained to remember 1 to {trained} chunks, asked to remember {asked}"]


def gate_of(directory: Path) -> dict[str, Any]:
    """What a record says of how `rsd-skip` decides unless it is told a threshold: `skip_calibration`, or
    `skip_schedule`, chunks in a row; `RsdError` where the checkpoint has neither."""
    facts = facts_of(directory, read_content(directory))
    if isinstance(facts.calibration, str):
        raise RsdError(facts.calibration)
    if facts.calibration is None:
        held = {} if facts.max_skips_held is None else {"skip_schedule_held": facts.max_skips_held}
        return {"skip_schedule": facts.max_skips, **held}
    return {"skip_calibration": facts.calibration.to_json()}


def schedule_of(content: dict[str, Any]) -> str:
    """What `rsd-skip` does where nothing is calibrated, "" where it needs that; content: config.json."""
    most, held = (content["policy"].get(name) for name in ("max_skips", "max_skips_held"))
    closed = "" if held is None else f" ({held} while the gripper is closed)"
    return f"at most {most} chunks in a row without the target{closed}, nothing promised" if most else ""


def gate_memory(gate: dict[str, Any]) -> int:
    """`gate_of` -> for how many chunks the drafter attends to what the target left."""
    return gate["skip_calibration"]["memory_chunks"] if "skip_calibration" in gate else gate["skip_schedule"]


def facts_of(directory: Path, content: dict[str, Any]) -> Checkpoint:
    """What of a checkpoint decides how it may decode; content: its config.json, checked."""
    policy: dict[str, Any] = content["policy"]
    sizes = policy.keys() - {each.name for each in fields(OwnDecoding)}  # are checked where the weights are read
    own = from_json(OwnDecoding, policy, where := f"{directory / CONFIG_FILE}: policy", ignore=sizes)
    try:
        acceptance_rule(own.acceptance, RfsqConfig())
    except RsdError as error:
        raise RsdError(f"{where}: {error}") from None
    calibration: SkipCalibration | str | None = None
    if own.max_skips is None or (directory / CALIBRATION_FILE).exists():
        try:
            calibration = load_calibration(directory, content["sha256"][WEIGHTS_FILE])
        except RsdError as error:  # to be raised where `rsd-skip` is asked for
            calibration = str(error)
    return Checkpoint(
        visual_drafter=bool(policy.get("visual_drafter")),
        calibration=calibration,
        compact=BACKBONE not in content,
        horizon=read_tokenizer_json(directory / TOKENIZER_FILE).config.horizon,
        **vars(own),
    )


def save_checkpoint(
    model: RsdModel, tokenizer: ActionTokenizer, config: PolicyConfig, provenance: dict[str, Any], directory: Path
) -> None:
    """Write `config.json`, `model.safetensors` and `tokenizer.json` into `directory`."""
    halves = finite_halves(model, directory)
    weights: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        half = halves[name]
        if half.ndim in (2, 4) and half.numel() >= LARGE:  # stacks of matrices have no row to scale
            weights[name], weights[name + SCALE] = quantise_rows(value.detach().float().cpu())
        else:
            weights[name] = half
    save_tensors(weights, directory / WEIGHTS_FILE)
    tokenizer.save(directory)
    write_content(directory, {"policy": asdict(config)}, (WEIGHTS_FILE, TOKENIZER_FILE), provenance)


def finite_halves(model: nn.Module, directory: Path) -> dict[str, Tensor]:
    """Its weights in fp16, for a folder that is made; `RsdError` unless all are finite."""
    directory.mkdir(parents=True, exist_ok=True)
    halves = {name: value.detach().half().cpu().contiguous() for name, value in model.state_dict().items()}
    require_finite(halves, directory)
    return halves


def require_finite(weights: Mapping[str, Tensor], directory: Path) -> None:
    """Raise unless all are finite in the precision that they are given in: call it before anything is written."""
    for name, value in weights.items():
        if not torch.isfinite(value).all():
            found = f"{name} is not finite as {str(value.dtype).removeprefix('torch.')}"
            raise RsdError(f"{directory}: {found}; the training diverged, nothing was saved")


def quantise_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """float [n, ...] -> int8 [n, ...] and a float32 scale per row [n]: weight = int8 * scale, within half a scale."""
    scale = weight.flatten(1).abs().amax(1).clamp_min(1e-12) / 127
    shape = (-1, *[1] * (weight.ndim - 1))
    return torch.round(weight / scale.view(shape)).to(torch.int8).contiguous(), scale


def write_content(directory: Path, fields: dict[str, Any], files: Iterable[str], provenance: dict[str, Any]) -> None:
    """config.json, of the fields and the hashes of the files that belong to it, written before; and the manifest."""
    content = {
        "format_version": FORMAT_VERSION,
        **fields,
        "sha256": {name: file_sha256(directory / name) for name in files},
        "provenance": provenance,
    }
    (directory / CONFIG_FILE).write_text(json.dumps(content, indent=1) + "\n")
    manifest.seal(directory)
