"""What flows through a policy: an observation in, an action chunk with its decoding statistics out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol, runtime_checkable

from rsd.checks import Count, RsdError, Share, Time, Where, Word, above, between, check_shape, checked, one_of
from rsd.checks import WrongOption as WrongOption
from rsd.checks import real_array as real_array

if TYPE_CHECKING:  # half of the time that `rsd --help` would take
    import numpy as np
    from numpy.typing import NDArray

ACTION_DIM = 7  # end-effector position 3, rotation 3, gripper 1
STATE_DIM = 8  # end-effector position 3, axis-angle 3, gripper joint positions 2
CAMERAS = ("agentview", "wrist")
# see `runtime.engines`
ENGINES = "auto", "eager", "cuda-graphs", "compiled", "onnx", "onnx-int8"
AUTO, EAGER, CUDA_GRAPHS, COMPILED, ONNX, ONNX_INT8 = ENGINES
ENGINE_DEVICES = {CUDA_GRAPHS: "cuda", COMPILED: "cuda", ONNX: "cpu", ONNX_INT8: "cpu"}  # of those that record
MAX_SKIPS, MEMORY_CHUNKS = 6, 2  # of `decoding.gate.SkipRule`; here, where nothing loads torch
TARGET_ONLY = "target-only"  # how a policy of somebody else's decodes: its own way
LEROBOT = "lerobot:"  # before the folder of a LeRobot data set or policy, or a policy's hub id
DRAFTER_ONLY = "drafter-only"  # the drafter as a policy, without a target
# acceptance rules by what they let stand or fall as one; the others each level
BY_CHUNK, BY_SCALAR = ("blind", "own", "residual"), ("margin", "distance", "typical")
BEST = "best"  # in the place of a decoder's name: the best one that the checkpoint supports
Deviation = Annotated[float, between(0, 1e300)]
Temperature = Annotated[float, Where(lambda t: t == 0 or 1e-3 <= t <= 1e3, "that is 0 or from 0.001 to 1000")]
Chunks = Annotated[int, between(1, 1e6)]
Batch = Annotated[int, between(0, 4096)]
Steps = Annotated[int, between(1, 1000)]
Threads = Annotated[int, between(0, 4096)]
Engine = Annotated[str, one_of(ENGINES)]
Moving = Literal["none", "thing", "destination", "jump", "push-out"]  # `sim.motion.Motion.what`
VIEWS = ("light", "camera", "zoom", "shift", "noise")  # `sim.views.View.what`
Speed = Annotated[float, above(0, 0.2)]  # m/s of what slides
SPEED = 0.02
VERIFY_PENDING = "verify-pending"  # the stage of what is done while the chunk is executed, beside `total`
DRAFT_FIRST, RSD_ASYNC = "draft-first", "rsd-async"


def unit_of(rule: str) -> str:
    """What an acceptance rule, named with or without its settings, lets stand or fall as one."""
    return "chunk" if (name := rule.partition("(")[0]) in BY_CHUNK else "scalar" if name in BY_SCALAR else "level"


def speed_rule(motion: Moving, speed: float) -> tuple[bool, str, str]:
    """Only what slides has a speed."""
    slides = motion in ("thing", "destination") or speed == SPEED
    return slides, "a --motion of thing or destination with --motion-speed", f"--motion {motion}"


@dataclass(frozen=True)
class Observation:
    """One control step as the policy sees it.

    images: uint8 [2, S, S, 3], cameras in the order of `CAMERAS`, rotated by 180 degrees (upright).
    state: float32 [8], end-effector position (m), axis-angle (rad), two gripper joint positions (m); given as another
        float or integer type, NumPy's float64 say, it is cast.
    instruction: free text.
    committed: float32 [n, 7], what will be executed before the answer is there, n below the chunk's length; None:
        nothing. Read by policies that are trained for it (`TargetConfig.committed`).
    """

    images: NDArray[np.uint8]
    state: NDArray[np.float32]
    instruction: str
    committed: NDArray[np.float32] | None = None

    def __post_init__(self) -> None:
        import numpy as np

        if not isinstance(self.images, np.ndarray) or isinstance(self.images, np.ma.MaskedArray):
            raise RsdError(f"observation images: expected a NumPy array, found {type(self.images).__name__}")
        if self.images.dtype != np.uint8:
            expected = f"uint8 [{len(CAMERAS)}, S, S, 3] for cameras {CAMERAS}"
            raise RsdError(f"observation images: expected {expected}, found {self.images.dtype}")
        check_shape("observation images", self.images.shape, (len(CAMERAS), "S", "S", 3))
        if not self.images.size:
            raise RsdError("observation images: expected pixels, found none")
        object.__setattr__(self, "state", real_array("observation state", self.state, shape=(STATE_DIM,)))
        if self.committed is not None:
            told = real_array("observation committed", self.committed, shape=("n", ACTION_DIM))
            object.__setattr__(self, "committed", told)
        if not checked(str, self.instruction, "observation instruction").strip():
            raise RsdError("observation instruction: expected text, found an empty string")


def check_observation(found: Any) -> Observation:
    """What `predict` was given, an `Observation` or what `rsd/Libero-v0` returns with the instruction of its info;
    `RsdError` for anything else."""
    if isinstance(found, Observation):
        return found
    if isinstance(found, dict) and {*CAMERAS, "state", "instruction"} <= found.keys():
        import numpy as np

        first = found[CAMERAS[0]]
        for name in CAMERAS:
            if not isinstance(found[name], np.ndarray) or found[name].shape != first.shape:
                kind = list(getattr(found[name], "shape", [])) or type(found[name]).__name__
                raise RsdError(f"predict: {name}: expected uint8 [S, S, 3] as of every camera, found {kind}")
        return Observation(np.stack([found[name] for name in CAMERAS]), found["state"], found["instruction"])
    what = "its images uint8 [2, S, S, 3], its state [8] and its instruction"
    remedy = f"make one: rsd.types.Observation(images, state, instruction), of {what}"
    raise RsdError(f"predict: expected an Observation, found {type(found).__name__}; {remedy}")


@dataclass(frozen=True)
class ChunkStats:
    """How one action chunk was decoded. Counts per level use vLLM's words (levels = positions).

    target_passes: passes of the target AFTER its prefill (the prefill is counted in `prefills`).
    num_draft_tokens / num_accepted_tokens: per level, drafted scalars and those accepted together with all the coarser
        levels of the same scalar; empty without a draft. Of tokens drawn at a temperature, those before the first that
        was corrected are accepted.
    accepted_levels: length of the accepted prefix of levels (0 .. draft levels).
    gripper_acceptance: share of the drafted gripper symbols that are the target's own; None where it verified no draft.
    The rest is None without a visual drafter. skipped: its chunk was executed and the target was skipped. forced: the
    target had to run whatever the draft expected. stood: the target let the whole draft stand, every level and the
    gripper (known where it verified). expected_deviation_mm: how far its chunk would lead the fingertip
    away from the target's, by its own estimate. Known of audited chunks: deviation_mm, how far it does;
    gripper_differs, whether any gripper symbol is another than the target's.
    denoising_steps: of a target that continued from a draft, the steps that it took, of steps_in_full.
    latency_ms: wall time by stage (preprocess, vision, prefill, draft, verify, decode) and `total`, which none exceeds.
    """

    decode: Word
    acceptance: Word = ""
    prefills: Count = 0
    target_passes: Count = 0
    num_draft_tokens: list[Count] = field(default_factory=list)
    num_accepted_tokens: list[Count] = field(default_factory=list)
    accepted_levels: Count = 0
    gripper_acceptance: Share | None = None
    skipped: bool | None = None
    forced: bool | None = None
    stood: bool | None = None
    expected_deviation_mm: Deviation | None = None
    deviation_mm: Deviation | None = None
    gripper_differs: bool | None = None
    denoising_steps: Count | None = None
    steps_in_full: Count | None = None
    latency_ms: dict[Word, Time] = field(default_factory=dict)


@dataclass(frozen=True)
class ActionChunk:
    """actions: float32 [H, 7], environment-ready: every number in [-1, 1], gripper -1 = open, +1 = close.

    execute: how many of them before the next observation, 1 to H; None: all. The rest is a tail for who must go on.
    answer: of `rsd-async`, once it is there: the target's chunk for the same observation, which overrules what of a
    draft is not executed yet, if it did not let it stand."""

    actions: NDArray[np.float32]
    stats: ChunkStats
    execute: int | None = None
    answer: NDArray[np.float32] | None = None

    @property
    def executed(self) -> NDArray[np.float32]:
        """The actions to execute, [execute, 7]."""
        return self.actions[: self.execute]


class Policy(Protocol):
    """What a rollout needs of a policy."""

    @property
    def image_size(self) -> int:
        """Side of the square camera images in pixels."""
        ...

    def reset(self, seed: int | None = None) -> None:
        """Forget the episode so far. seed: of whatever is drawn in the next one."""
        ...

    def predict(self, observation: Observation) -> ActionChunk: ...


class Continues(Policy, Protocol):
    """A target by diffusion or flow matching, whose denoising may begin from a draft."""

    num_inference_steps: int
    """Denoising steps of a whole prediction; 0 where it cannot continue from a draft."""

    def continue_from(self, observation: Observation, draft: NDArray[np.float32], steps: int) -> ActionChunk:
        """The draft [H, 7], environment-ready, is noised to the time at which `steps` are left, and those are taken."""
        ...


class ChunkPolicy(Protocol):
    """One path for a robot, a batch and a server's sessions: what episodes remember goes in and comes out."""

    @property
    def image_size(self) -> int: ...

    def predict(
        self, observations: Sequence[Observation], states: Sequence[Any]
    ) -> tuple[list[ActionChunk], list[Any], Any]:
        """One observation and one state of each episode, None at its start -> chunks, states, and what is pending."""
        ...

    def verify_pending(self, pending: Any) -> tuple[list[ActionChunk], list[Any]]:
        """What was pending of a prediction -> its chunks, complete, and states."""
        ...


class Corrects(Policy, Protocol):
    """A policy that corrects its chunks at every control step from the newest observation."""

    def correct(self, observation: Observation, index: int, before: bool) -> NDArray[np.float32]:
        """The action [7] of now, which is number `index` of the last chunk, or of the one before it."""
        ...


@runtime_checkable
class Completes(Protocol):
    """A policy that may have something left to find out of a chunk while it is executed."""

    def complete(self) -> ActionChunk | None:
        """The last chunk, complete now, with the target's answer if the decoder has one; None if nothing was left."""
        ...
