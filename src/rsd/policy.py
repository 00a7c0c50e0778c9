"""The policy: observation in, action chunk out; and its checkpoint directory.

A checkpoint holds `config.json` (sizes, decoding defaults, provenance), `model.safetensors` (fp16, the light draft's
matrices int8), `tokenizer.json` and, for `rsd-skip`, `skip_calibration.json`. Loading is strict: weights that are
missing, misshapen or not finite are an error.
"""

from __future__ import annotations

import hashlib
import json
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rsd.decoding.acceptance import acceptance_rule
from rsd.decoding.calibration import FILE_NAME as CALIBRATION_FILE
from rsd.decoding.calibration import SkipCalibration, fingertip_deviation
from rsd.decoding.recorded import RecordedStrategy
from rsd.decoding.sampling import Sampler
from rsd.decoding.steps import Decoded, Decoder, EpisodeMemory, Proposal, Scene, SkipRule, Stopwatch
from rsd.decoding.strategies import LIGHT, STRATEGIES, Strategy, check_sampling, in_prefill
from rsd.json_files import read_versioned
from rsd.models.draft import DraftConfig, DraftModel
from rsd.models.light_draft import LightDraft, LightDraftConfig, Memory
from rsd.models.main import MainConfig, MainModel, state_features
from rsd.models.text import word_ids
from rsd.tokenizer.action_tokenizer import FILE_NAME as TOKENIZER_FILE
from rsd.tokenizer.action_tokenizer import ActionTokenizer
from rsd.types import BEST, ActionChunk, ChunkStats, Observation, RsdError

FORMAT_VERSION = 1
CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
BACKBONE = "backbone"  # in config.json: the compact main where it is absent, or "openvla"
SCALE = ".scale"  # after the name of a weight that is stored as int8
TEXT_CACHE = 64  # instructions whose encoding is kept
LOG = logging.getLogger(__name__)
FOLLOW_UP = "follow-up"  # the stage of what is done while the chunk is executed
JUDGED = (  # statistics of a chunk that its follow-up knows
    *("prefills", "main_passes", "num_draft_tokens", "num_accepted_tokens", "accepted_levels"),
    *("gripper_acceptance", "skipped"),
)


@dataclass(frozen=True)
class PolicyConfig:
    """Sizes and decoding defaults. fine: `regress` or `sequential` (see `decoding.strategies.rsd`); without a light
    draft the decoders that need one are refused."""

    main: MainConfig = field(default_factory=MainConfig)
    draft: DraftConfig = field(default_factory=DraftConfig)
    light: LightDraftConfig | None = field(default_factory=LightDraftConfig)
    acceptance: str = "margin"
    fine: str = "regress"

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> PolicyConfig:
        main = dict(content["main"], channels=tuple(content["main"]["channels"]))
        found = content.get("light")  # absent in checkpoints of before there was one
        light = LightDraftConfig.from_json(found) if found else None
        rest = {k: v for k, v in content.items() if k not in ("main", "draft", "light")}
        return cls(MainConfig(**main), DraftConfig(**content["draft"]), light, **rest)


class RsdModel(nn.Module):
    """Main and drafts under one roof, so that one file holds their weights."""

    def __init__(self, config: PolicyConfig, tokenizer: ActionTokenizer) -> None:
        super().__init__()
        check_code(tokenizer)
        code, horizon, motion = tokenizer.config.rfsq, tokenizer.config.horizon, tokenizer.motion_dim
        self.main = MainModel(config.main, code, horizon, motion)
        self.draft = DraftModel(config.draft, code, horizon, motion, config.main.dim)
        self.light = LightDraft(config.light, code, horizon, motion, config.main) if config.light else None


def check_code(tokenizer: ActionTokenizer) -> None:
    """Raise unless the models can learn the code: linear, every digit of every level in use, one gripper."""
    parts, config = tokenizer.parts, tokenizer.config
    odd = [name for name in ("autoencoder", "refiner", "active") if getattr(parts, name) is not None]
    if odd or len(config.binary) != 1:
        found = ", ".join(odd) or f"{len(config.binary)} binary dimensions"
        raise RsdError(f"policy: expected a linear tokenizer without a bit budget and with one gripper, found {found}")


class RsdPolicy:
    """A loaded policy. `predict` is the whole path of a control decision."""

    def __init__(
        self,
        model: RsdModel,
        tokenizer: ActionTokenizer,
        config: PolicyConfig,
        *,
        decode: str = BEST,
        acceptance: str | None = None,
        fine: str | None = None,
        temperature: float = 0.0,
        skip: SkipRule | None = None,
        cuda_graphs: bool = True,
        audit: bool = False,
        provenance: dict[str, Any] | None = None,
    ) -> None:
        """temperature: draw the motion tokens from softmax(logits / temperature), see `reset`; 0 takes the likeliest.
        skip: when `rsd-skip` leaves the main idle (never without one). audit: know of every chunk how far the light
        draft's led away from the main's; beside a skipped one the main is run for that, outside the latencies."""
        if decode == BEST:
            decode = choose_decode(model.light is not None, temperature, skip).decode
        check_decode(decode, model.light is not None)
        check_sampling(temperature, decode, acceptance, fine)
        # drawn tokens have no greedy choice to be near to: only the rule that keeps a distribution can judge them
        rule = acceptance_rule(acceptance or ("exact" if temperature else config.acceptance), tokenizer.config.rfsq)
        # `exact` promises the tokens of `ar`; regressed fine levels would break that promise
        fine = fine or ("sequential" if rule.name == "exact" else config.fine)
        if fine not in ("regress", "sequential"):
            raise RsdError(f"fine {fine!r}: expected regress or sequential")
        self.model, self.config = model.eval(), config
        self.tokenizer = tokenizer.to(self.device)
        self.provenance = provenance or {}
        self.decode, self.temperature, self.audit = decode, temperature, audit
        self.acceptance = rule.name if decode.startswith("rsd") else ""
        sampler = Sampler(temperature, torch.Generator(self.device).manual_seed(0)) if temperature else None
        self.decoder = Decoder(model.main, model.draft, rule, fine, model.light, skip or SkipRule(), sampler)
        self._strategy: Strategy = STRATEGIES[decode]
        # drawn tokens are not recorded: a graph would have to know of the generator, and `rsd` decides on the host
        if cuda_graphs and self.device.type == "cuda" and fine == "regress" and sampler is None:
            self._strategy = RecordedStrategy(decode)
        self._memory = EpisodeMemory()
        self._to_do: Callable[[], None] | None = None
        self._turn = threading.RLock()  # `follow_up` may come from another thread
        self._texts: dict[str, tuple[Tensor, Tensor]] = {}

    @property
    def image_size(self) -> int:
        return self.config.main.image_size

    @property
    def cameras(self) -> int:
        """How many of an observation's cameras are looked at, the first ones."""
        return 2

    @property
    def device(self) -> torch.device:
        return self.model.main.state_mean.device

    # observation -> chunk

    def reset(self, seed: int | None = None) -> None:
        """Forget the episode so far; call it before an episode's first observation.

        seed: of what is drawn from now on at a temperature; without one the random numbers go on where they were
        (in a new policy: as from seed 0).
        """
        with self._turn:
            self._memory, self._to_do = EpisodeMemory(), None
        if seed is not None and self.decoder.sampler is not None:
            self.decoder.sampler.generator.manual_seed(seed)

    def swap_memory(self, memory: Any = None) -> Any:
        """Turn to another episode: what an earlier call returned of it, or None at its start -> this episode's."""
        with self._turn:
            self.follow_up()
            mine, self._memory = self._memory, memory or EpisodeMemory()
        if mine.main is not None:
            # copies: a CUDA graph's next run, of the other episode, writes where these stand
            mine.main = Memory(*([tensor.clone() for tensor in tensors] for tensors in mine.main))
        return mine

    @torch.inference_mode()
    def predict(self, observation: Observation) -> ActionChunk:
        """Observation -> chunk float32 [H, 7], environment-ready; non-finite output raises `RsdError`.

        The decoders with a light draft remember the chunks since `reset`; to the others every observation is new.
        What `rsd-ahead` has left to do is done first, unless `follow_up` has been called since.
        """
        watch = Stopwatch(self.device)
        with self._turn, self._forgetting_errors(), watch.stage("total"):
            self.follow_up()
            with watch.stage("preprocess"):
                scene = Scene(*self._preprocess([observation]), self._memory)
            decoded = self._strategy(self.decoder, scene, watch)
            self.decoder.check()
            actions = self._to_actions(decoded.value, decoded.gripper)
        stats = self._stats(decoded, watch)
        if decoded.follow_up:
            self._to_do = partial(self._follow_up, decoded.follow_up, stats)
        elif self.audit and decoded.proposal is not None:
            stats.deviation_mm, stats.gripper_differs = self._deviation(scene, decoded, decoded.proposal)
        return ActionChunk(actions[0], stats)

    def follow_up(self) -> None:
        """With `rsd-ahead`: the main's pass for the last chunk, whose statistics get what it finds.

        Call it while that chunk is executed, from any thread; otherwise the next prediction begins with it. The other
        decoders leave nothing to do.
        """
        with self._turn, self._forgetting_errors(), torch.inference_mode():
            to_do, self._to_do = self._to_do, None
            if to_do is not None:
                to_do()

    def _follow_up(self, look: Callable[[Stopwatch], Decoded], stats: ChunkStats) -> None:
        watch = Stopwatch(self.device)
        with watch.stage(FOLLOW_UP):
            decoded = look(Stopwatch(self.device))
            self.decoder.check()
        found = self._stats(decoded, watch)
        for name in JUDGED:
            setattr(stats, name, getattr(found, name))
        stats.latency_ms[FOLLOW_UP] = watch.ms[FOLLOW_UP]
        if self.audit and decoded.proposal is not None:
            stats.deviation_mm, stats.gripper_differs = self._deviation(None, decoded, decoded.proposal)

    @contextmanager
    def _forgetting_errors(self) -> Iterator[None]:
        """What a failed prediction leaves in the memory must not reach the next one."""
        try:
            yield
        except RsdError:
            self.reset()
            raise

    def _preprocess(self, observations: list[Observation]) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """-> images [B, 2, 3, S, S] in [-0.5, 0.5], state features [B, 11], encoded instructions."""
        size = self.image_size
        for observation in observations:
            if observation.images.shape[1:3] != (size, size):
                found = " x ".join(map(str, observation.images.shape[1:3]))
                raise RsdError(f"observation images: expected {size} x {size} pixels, found {found}")
        pixels = torch.from_numpy(np.stack([o.images for o in observations])).to(self.device)
        state = state_features(torch.from_numpy(np.stack([o.state for o in observations]))).to(self.device)
        texts = [self._encode_text(o.instruction) for o in observations]
        text = torch.cat([t for t, _ in texts]), torch.cat([c for _, c in texts])
        return pixels.permute(0, 1, 4, 2, 3).float() / 255.0 - 0.5, state, text

    def _encode_text(self, instruction: str) -> tuple[Tensor, Tensor]:
        if instruction not in self._texts:
            if len(self._texts) >= TEXT_CACHE:
                self._texts.clear()
            self._texts[instruction] = self.model.main.encode_text(word_ids([instruction]).to(self.device))
        return self._texts[instruction]

    def _to_actions(self, value: Tensor, gripper: Tensor) -> np.ndarray:
        actions = self.tokenizer.to_actions(value * self.tokenizer.first_step, gripper)
        if not torch.isfinite(actions).all():
            raise RsdError("decoding gave non-finite actions: damaged weights or an odd tokenizer range")
        return actions.float().cpu().numpy()

    def _stats(self, decoded: Decoded, watch: Stopwatch) -> ChunkStats:
        stats = ChunkStats(self.decode, self.acceptance, decoded.prefills, decoded.main_passes, latency_ms=watch.ms)
        if decoded.proposal is not None:
            stats.skipped = decoded.prefills == 0 and decoded.follow_up is None
            stats.forced = decoded.proposal.forced
            stats.expected_deviation_mm = float(decoded.proposal.expected_deviation_mm[0])
        if decoded.accepted is not None and decoded.accepted_levels is not None:
            stats.num_draft_tokens = decoded.num_draft_tokens
            stats.num_accepted_tokens = decoded.accepted[0].sum(-1).tolist()
            stats.accepted_levels = int(decoded.accepted_levels[0])
        if decoded.accepted_gripper is not None:
            stats.gripper_acceptance = float(decoded.accepted_gripper[0].float().mean())
        return stats

    def _deviation(self, scene: Scene | None, decoded: Decoded, proposal: Proposal) -> tuple[float, bool]:
        """How far the proposal leads the fingertip away from the main's chunk (mm), and whether the gripper differs.

        The main's chunk is the one it gives after reading the proposal, as when it is asked; where `decoded` is not
        the main's own, it looks at the scene for it.
        """
        main = decoded
        if decoded.prefills == 0 and scene is not None:
            beside = replace(scene, memory=EpisodeMemory())
            main = in_prefill(self.decoder, beside, proposal, Stopwatch(self.device))
            self.decoder.check()
        drafted, mains = (self._to_actions(chunk.value, chunk.gripper) for chunk in (proposal, main))
        return float(fingertip_deviation(drafted, mains)[0]), not torch.equal(proposal.gripper, main.gripper)

    # checkpoint

    def save_pretrained(self, directory: str | Path) -> None:
        """Write the checkpoint directory; a skip calibration is of one weights file, so make it anew there."""
        save_checkpoint(self.model, self.tokenizer, self.config, self.provenance, Path(directory))

    def push_to_hub(self, repo_id: str, *, private: bool = False) -> None:
        """Upload the checkpoint to the Hugging Face hub (needs a login)."""
        import tempfile

        from huggingface_hub import HfApi

        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            api = HfApi()
            api.create_repo(repo_id, private=private, exist_ok=True)
            api.upload_folder(repo_id=repo_id, folder_path=folder)

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str | Path,
        *,
        device: str = "cpu",
        decode: str = BEST,
        acceptance: str | None = None,
        fine: str | None = None,
        temperature: float = 0.0,
        skip: SkipRule | None = None,
        cuda_graphs: bool = True,
        audit: bool = False,
    ) -> RsdPolicy:
        """Load a checkpoint directory, or a hub repository of one; `RsdError` on anything missing or odd.

        decode: `best` takes the best proven decoder that the checkpoint supports (see `choose_decode`), logs why, and
        the policy's `decode` names it. acceptance, fine: None takes the checkpoint's own, or with a temperature `exact`
        and `sequential`. skip: for `rsd-skip`; None takes the checkpoint's own calibration.
        """
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise RsdError(f"device {device}: no CUDA device is visible here; use cpu")
        directory = locate_checkpoint(path_or_hub_id)
        content = read_content(directory)
        policy_class: type[RsdPolicy] = cls
        if BACKBONE in content:
            from rsd.openvla.rsd_policy import OpenVlaRsdPolicy

            policy_class = OpenVlaRsdPolicy
        if decode == BEST:
            choice = choose_decode(bool(content["policy"].get("light")), temperature, skip)
            LOG.log(logging.INFO if choice.decode == "rsd-ahead" else logging.WARNING, "%s: %s", directory, choice)
            decode = choice.decode
        check_sampling(temperature, decode, acceptance, fine)  # before the weights
        options = {"decode": decode, "acceptance": acceptance, "fine": fine, "temperature": temperature}
        options |= {"cuda_graphs": cuda_graphs, "audit": audit}
        return policy_class.load(directory, content, device, skip, options)

    @classmethod
    def load(
        cls, directory: Path, content: dict[str, Any], device: str, skip: SkipRule | None, options: dict[str, Any]
    ) -> RsdPolicy:
        """directory and its config.json, already checked; options: the constructor's."""
        config = parse_config(directory, content)
        tokenizer = ActionTokenizer.load(directory)
        model = RsdModel(config, tokenizer)
        load_weights(model, directory / WEIGHTS_FILE)
        model.to(device)
        skip = skip or stored_skip(directory, content, options)
        return cls(model, tokenizer, config, skip=skip, provenance=content.get("provenance", {}), **options)


def check_decode(decode: str, light: bool) -> None:
    """Raise unless there is such a strategy and, where it needs one, a light draft."""
    if decode not in STRATEGIES:
        raise RsdError(f"decode {decode!r}: expected one of {', '.join(STRATEGIES)}")
    if decode in LIGHT and not light:
        raise RsdError(f"decode {decode!r}: this checkpoint has no light draft; use rsd, l1 or ar, or train one")


class Choice(NamedTuple):
    """The decoder that `best` stands for, and why."""

    decode: str
    why: str

    def __str__(self) -> str:
        return f"decodes by {self.decode}: {self.why}"


def choose_decode(light: bool, temperature: float = 0.0, skip: SkipRule | None = None) -> Choice:
    """What `best` is, by what is proven in closed loop, for a checkpoint with or without a light draft."""
    if not light:
        return Choice("rsd", "the best without a light draft")
    if temperature:
        return Choice("rsd-fused", "the best that draws its tokens")
    if skip:
        return Choice("rsd-skip", "a skip threshold is given")
    return Choice("rsd-ahead", "the best")


def stored_skip(directory: Path, content: dict[str, Any], options: dict[str, Any]) -> SkipRule | None:
    """The rule of the checkpoint's own calibration if `rsd-skip` is asked for; `RsdError` where it does not hold."""
    if options["decode"] != "rsd-skip":
        return None
    acceptance, fine = options["acceptance"], options["fine"]
    own = {"acceptance": PolicyConfig.acceptance, "fine": PolicyConfig.fine, **content["policy"]}
    if acceptance not in (None, own["acceptance"]) or fine not in (None, own["fine"]):
        expected = f"the checkpoint's {own['acceptance']} and {own['fine']}"
        raise RsdError(f"rsd-skip: calibrated with {expected}, found {acceptance} and {fine}; leave them out")
    calibration = load_calibration(directory)
    return SkipRule(calibration.threshold, calibration.max_skips)


def locate_checkpoint(path_or_hub_id: str | Path) -> Path:
    """A local directory as it is; otherwise `owner/name` on the Hugging Face hub, downloaded to its cache."""
    path = Path(path_or_hub_id)
    if path.is_dir():
        return path
    name = str(path_or_hub_id)
    if path.exists() or name.count("/") != 1 or name.startswith((".", "/")):
        raise RsdError(f"policy {name!r}: expected a checkpoint directory or a hub id like owner/name")
    from huggingface_hub import snapshot_download

    try:
        # linear codes only, see `check_code`; an adapter where the main is OpenVLA
        files = [CONFIG_FILE, WEIGHTS_FILE, TOKENIZER_FILE, CALIBRATION_FILE, "lora_adapter/*"]
        return Path(snapshot_download(name, allow_patterns=files))
    except Exception as error:  # the hub client raises many kinds: no such repo, no network, no access
        raise RsdError(f"policy {name!r}: no such directory, and the hub answered: {error}") from error


def checkpoint_hash(path_or_hub_id: str | Path) -> str:
    """SHA-256 of a checkpoint's config.json, which holds the hashes of its other files."""
    return _sha256(locate_checkpoint(path_or_hub_id) / CONFIG_FILE)


def load_calibration(directory: Path) -> SkipCalibration:
    """The skip calibration of a checkpoint directory; `RsdError` without one, or if it is of other weights."""
    if not (directory / CALIBRATION_FILE).is_file():
        raise RsdError(f"{directory}: rsd-skip needs a {CALIBRATION_FILE}, found none; make it with `rsd calibrate`")
    calibration = SkipCalibration.load(directory)
    calibration.check_belongs(_sha256(directory / WEIGHTS_FILE))
    return calibration


def weights_hash(path_or_hub_id: str | Path) -> str:
    """SHA-256 of a checkpoint's weights file."""
    return _sha256(locate_checkpoint(path_or_hub_id) / WEIGHTS_FILE)


def save_checkpoint(
    model: RsdModel,
    tokenizer: ActionTokenizer,
    config: PolicyConfig,
    provenance: dict[str, Any],
    directory: Path,
) -> None:
    """Write `config.json`, `model.safetensors` and `tokenizer.json` into `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    halves = {name: value.detach().half().cpu().contiguous() for name, value in model.state_dict().items()}
    require_finite(halves, directory)
    weights: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        half = halves[name]
        if name.startswith("light.") and half.ndim > 1:  # a seventh of the parameters; see the README for what it moves
            weights[name], weights[name + SCALE] = quantise_rows(value.detach().float().cpu())
        else:
            weights[name] = half
    save_file(weights, directory / WEIGHTS_FILE)
    tokenizer.save(directory)
    content = {
        "format_version": FORMAT_VERSION,
        "policy": asdict(config),
        "sha256": {name: _sha256(directory / name) for name in (WEIGHTS_FILE, TOKENIZER_FILE)},
        "provenance": provenance,
    }
    (directory / CONFIG_FILE).write_text(json.dumps(content, indent=1) + "\n")


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


def load_weights(model: nn.Module, path: Path) -> None:
    """Strict: names and shapes must be the model's own, values finite. fp16 or int8 on disk, float32 in memory."""
    try:
        weights = load_file(path)
    except FileNotFoundError:
        raise RsdError(f"{path}: not found") from None
    except SafetensorError as error:
        raise RsdError(f"{path}: not readable as safetensors ({error}); it is cut off or damaged") from None
    for name in [name for name, value in weights.items() if value.dtype == torch.int8]:
        scale = weights.pop(name + SCALE, None)
        if scale is None or list(scale.shape) != list(weights[name].shape[:1]):
            raise RsdError(f"{path}: {name} is int8 and lacks its scale per row; copy the checkpoint again")
        weights[name] = weights[name].float() * scale.view(-1, *[1] * (weights[name].ndim - 1))
    expected = model.state_dict()
    missing, unknown = sorted(expected.keys() - weights.keys()), sorted(weights.keys() - expected.keys())
    if missing or unknown:
        raise RsdError(f"{path}: does not fit config.json; missing {missing[:5]}, unknown {unknown[:5]}")
    for name, value in weights.items():
        shape = list(expected[name].shape)
        if list(value.shape) != shape:
            raise RsdError(f"{path}: {name} expected {shape}, found {list(value.shape)}")
        if not torch.isfinite(value).all():
            raise RsdError(f"{path}: {name} holds NaN or infinity")
    model.load_state_dict({name: value.float() for name, value in weights.items()})


def read_content(directory: Path) -> dict[str, Any]:
    """config.json, of this format and with the files that belong to it."""
    path = directory / CONFIG_FILE
    content = read_versioned(path, "checkpoint", FORMAT_VERSION, "use the rsd-vla that wrote it, or train again")
    if not isinstance(content.get("policy"), dict):
        raise RsdError(f"{path}: unknown or missing field ('policy'); copy the checkpoint again")
    digests = content.get("sha256", {})
    for name in dict.fromkeys([WEIGHTS_FILE, TOKENIZER_FILE, *digests]):
        file = directory / name
        if not file.is_file():
            raise RsdError(f"{file}: not found; the checkpoint is incomplete, copy it again")
        if _sha256(file) != digests.get(name):
            raise RsdError(f"{file}: does not belong to this {CONFIG_FILE} (sha256 differs); copy it again")
    if content.get(BACKBONE, "openvla") != "openvla":
        raise RsdError(f"{path}: expected no {BACKBONE} or openvla, found {content[BACKBONE]!r}; use a newer rsd-vla")
    return content


def parse_config(directory: Path, content: dict[str, Any]) -> PolicyConfig:
    """The compact policy's configuration."""
    try:
        return PolicyConfig.from_json(content["policy"])
    except (KeyError, TypeError) as error:
        raise RsdError(f"{directory / CONFIG_FILE}: unknown or missing field ({error})") from None


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
