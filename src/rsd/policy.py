"""The policy: observation in, action chunk out. Its files are in `checkpoint`, its models in `models.rsd_model`."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rsd import hub
from rsd.checkpoint import (
    BACKBONE,
    load_model,
    locate_checkpoint,
    proven_decode,
    read_content,
    save_checkpoint,
    with_calibration,
)
from rsd.decoding.acceptance import acceptance_rule
from rsd.decoding.calibration import fingertip_deviation
from rsd.decoding.engines import choose_engine, strategy_on
from rsd.decoding.sampling import Sampler
from rsd.decoding.steps import Decoded, Decoder, EpisodeMemory, Proposal, Scene, SkipRule, Stopwatch
from rsd.decoding.strategies import LIGHT, STRATEGIES, Strategy, check_sampling, in_prefill
from rsd.devices import check_device
from rsd.models.light_draft import Memory
from rsd.models.main import state_features
from rsd.models.rsd_model import PolicyConfig, RsdModel
from rsd.models.text import word_ids
from rsd.tokenizer.action_tokenizer import ActionTokenizer
from rsd.types import AUTO, BEST, ActionChunk, ChunkStats, Observation, RsdError, check_observation

TEXT_CACHE = 64  # instructions whose encoding is kept
CACHED_CHARACTERS = 1000  # longer instructions are encoded every time: a client could send 64 of any length
LOG = logging.getLogger(__name__)
FOLLOW_UP = "follow-up"  # the stage of what is done while the chunk is executed
JUDGED = (  # statistics of a chunk that its follow-up knows
    *("prefills", "main_passes", "num_draft_tokens", "num_accepted_tokens", "accepted_levels"),
    *("gripper_acceptance", "skipped"),
)


class RsdPolicy:
    """A loaded policy. `predict` is the whole path of a control decision."""

    exportable = True  # whether its models can become ONNX graphs

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
        engine: str = AUTO,
        audit: bool = False,
        provenance: dict[str, Any] | None = None,
    ) -> None:
        """temperature: draw the motion tokens from softmax(logits / temperature), see `reset`; 0 takes the likeliest.
        skip: when `rsd-skip` leaves the main idle (never without one). audit: know of every chunk how far the light
        draft's led away from the main's; beside a skipped one the main is run for that, outside the latencies.
        engine: what it runs on, see `decoding.engines`."""
        if decode == BEST:
            decode = choose_decode(model.light is not None, temperature, skip).decode
        check_decode(decode, model.light is not None)
        check_sampling(temperature, decode, acceptance, fine)
        name, fine = settle_verification((config.acceptance, config.fine), acceptance, fine, temperature)
        rule = acceptance_rule(name, tokenizer.config.rfsq)
        if rule.as_a_whole and fine == "sequential":
            raise RsdError(f"acceptance {rule.name!r}: expected fine 'regress', found 'sequential'; leave it out")
        self.model, self.config = model.eval(), config
        if self.device.type == "cuda":  # TF32: ten bits of mantissa, as many as the fp16 on disk; a third off a pass
            torch.set_float32_matmul_precision("high")
        self.tokenizer = tokenizer.to(self.device)
        self.provenance = provenance or {}
        self.decode, self.temperature, self.audit = decode, temperature, audit
        self.acceptance = rule.name if decode.startswith("rsd") else ""
        sampler = Sampler(temperature, torch.Generator(self.device).manual_seed(0)) if temperature else None
        foresees = audit or decode != "rsd-fused"
        self.decoder = Decoder(model.main, model.draft, rule, fine, model.light, skip or SkipRule(), sampler, foresees)
        graphs = recordable(fine, temperature, self.exportable, self.device)
        self.engine = choose_engine(engine, str(self.device), graphs, compact=self.exportable)
        self._strategy: Strategy = strategy_on(self.engine, decode)
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
        check_observation(observation)
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
        """-> pixels uint8 [B, 2, S, S, 3], state features [B, 11], encoded instructions."""
        size = self.image_size
        for observation in observations:
            if observation.images.shape[1:3] != (size, size):
                found = " x ".join(map(str, observation.images.shape[1:3]))
                raise RsdError(f"observation images: expected {size} x {size} pixels, found {found}")
        pixels = torch.from_numpy(np.stack([o.images for o in observations])).to(self.device)
        state = state_features(torch.from_numpy(np.stack([o.state for o in observations]))).to(self.device)
        texts = [self._encode_text(o.instruction) for o in observations]
        text = torch.cat([t for t, _ in texts]), torch.cat([c for _, c in texts])
        return pixels, state, text

    def _encode_text(self, instruction: str) -> tuple[Tensor, Tensor]:
        """What `_read_text` makes of an instruction, kept for the next chunks."""
        found = self._texts.get(instruction)
        if found is None:
            found = self._read_text(instruction)
            if len(self._texts) >= TEXT_CACHE:
                self._texts.clear()
            if len(instruction) <= CACHED_CHARACTERS:
                self._texts[instruction] = found
        return found

    def _read_text(self, instruction: str) -> tuple[Tensor, Tensor]:
        return self.model.main.encode_text(word_ids([instruction]).to(self.device))

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
            if decoded.proposal.expected_deviation_mm is not None:
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
        assert proposal.value is not None  # whoever audits foresees
        drafted = self._to_actions(proposal.value, proposal.gripper)
        mains = self._to_actions(main.value, main.gripper)
        return float(fingertip_deviation(drafted, mains)[0]), not torch.equal(proposal.gripper, main.gripper)

    # checkpoint

    def save_pretrained(self, directory: str | Path) -> None:
        """Write the checkpoint directory; a skip calibration is of one weights file, so make it anew there."""
        save_checkpoint(self.model, self.tokenizer, self.config, self.provenance, Path(directory))

    def push_to_hub(self, repo_id: str, *, private: bool = False) -> None:
        """Upload the checkpoint to the Hugging Face hub (needs a login)."""
        hub.upload(self.save_pretrained, repo_id, private)

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
        engine: str = AUTO,
        audit: bool = False,
    ) -> RsdPolicy:
        """Load a checkpoint directory, or a hub repository of one; `RsdError` on anything missing or odd.

        decode: `best` takes the best proven decoder that the checkpoint supports (see `choose_decode`), logs why, and
        the policy's `decode` names it. engine: `auto` takes CUDA graphs on a GPU and ONNX Runtime on a CPU (see
        `decoding.engines`), and the policy's `engine` names it. acceptance, fine: None takes the checkpoint's own, or
        with a temperature `exact` and `sequential`. skip: for `rsd-skip`; None takes the checkpoint's own calibration
        and the acceptance rule that it was made with.
        """
        check_device(device)
        directory = locate_checkpoint(path_or_hub_id)
        content = read_content(directory)
        policy_class: type[RsdPolicy] = cls
        if BACKBONE in content:
            from rsd.openvla.rsd_policy import OpenVlaRsdPolicy

            policy_class = OpenVlaRsdPolicy
        if decode == BEST:
            proven = proven_decode(directory, content)
            choice = choose_decode(bool(content["policy"].get("light")), temperature, skip, proven)
            second = choice.decode != "rsd-ahead" and proven is None  # to what another checkpoint could do
            LOG.log(logging.WARNING if second else logging.INFO, "%s: %s", directory, choice)
            decode = choice.decode
        check_sampling(temperature, decode, acceptance, fine)  # before the weights
        check_decode(decode, bool(content["policy"].get("light")))
        options = {"decode": decode, "acceptance": acceptance, "fine": fine, "temperature": temperature}
        options = with_calibration(directory, options | {"skip": skip, "engine": engine, "audit": audit})
        return policy_class.load(directory, content, device, options)

    @classmethod
    def load(cls, directory: Path, content: dict[str, Any], device: str, options: dict[str, Any]) -> RsdPolicy:
        """directory and its config.json, already checked; options: the constructor's."""
        tokenizer = ActionTokenizer.load(directory)
        model, config = load_model(directory, content, tokenizer)
        model.to(device)
        return cls(model, tokenizer, config, provenance=content.get("provenance", {}), **options)


def check_decode(decode: str, light: bool) -> None:
    """Raise unless there is such a strategy and, where it needs one, a light draft."""
    if decode not in STRATEGIES:
        raise RsdError(f"decode {decode!r}: expected one of {', '.join(STRATEGIES)}")
    if decode in LIGHT and not light:
        raise RsdError(f"decode {decode!r}: this checkpoint has no light draft; use rsd, l1 or ar, or train one")


def own_verification(policy: dict[str, Any]) -> tuple[str, str]:
    """A checkpoint's own acceptance rule and way to the fine levels; policy: that part of its config.json."""
    return policy.get("acceptance", PolicyConfig.acceptance), policy.get("fine", PolicyConfig.fine)


def settle_verification(
    own: tuple[str, str], acceptance: str | None, fine: str | None, temperature: float
) -> tuple[str, str]:
    """The acceptance rule's name, and how the fine levels come; own: the checkpoint's; None: nothing was asked for."""
    # drawn tokens have no greedy choice to be near to: only the rule that keeps a distribution can judge them
    name = acceptance or ("exact" if temperature else own[0])
    # `exact` promises the tokens of `ar`; regressed fine levels would break that promise
    fine = fine or ("sequential" if name == "exact" else own[1])
    if fine not in ("regress", "sequential"):
        raise RsdError(f"fine {fine!r}: expected regress or sequential")
    return name, fine


def recordable(fine: str, temperature: float, exportable: bool, device: torch.device) -> bool:
    """Whether a strategy can become a graph; exportable: whether its models can become ONNX graphs.

    Drawn tokens cannot: a graph would have to know of the generator, and `rsd` decides on the host."""
    return fine == "regress" and temperature == 0 and (exportable or device.type != "cpu")


class Choice(NamedTuple):
    """The decoder that `best` stands for, and why."""

    decode: str
    why: str

    def __str__(self) -> str:
        return f"decodes by {self.decode}: {self.why}"


def choose_decode(
    light: bool, temperature: float = 0.0, skip: SkipRule | None = None, proven: tuple[str, str] | None = None
) -> Choice:
    """What `best` is, by what is proven in closed loop, for a checkpoint with or without a light draft.

    proven: what its own evaluations proved, see `checkpoint.proven_decode`."""
    if not light:
        return Choice("rsd", "the best without a light draft")
    if temperature:
        return Choice("rsd-fused", "the best that draws its tokens")
    if skip:
        return Choice("rsd-skip", "a skip threshold is given")
    return Choice(*proven) if proven else Choice("rsd-ahead", "the best")
