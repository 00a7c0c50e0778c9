"""How to decode and on what: the options, their defaults, and the one function that settles them for a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Annotated, Any, Literal, NamedTuple

from rsd import former
from rsd.checks import Checked, between
from rsd.conventions import CHUNK_SIZE
from rsd.decoding.acceptance import BLIND, AcceptanceRule, acceptance_rule
from rsd.decoding.calibration import SkipCalibration
from rsd.decoding.decoders import DECODERS, names
from rsd.decoding.gate import SkipRule
from rsd.models.config import OwnDecoding
from rsd.tokenizer.rfsq import RfsqConfig
from rsd.types import AUTO, BEST, Engine, RsdError, Steps, Temperature


@dataclass(frozen=True)
class DecodeOptions(Checked):
    """What is asked for; None leaves it to the checkpoint.

    decode: a decoder of `decoding.decoders`, or `best`, the best one that the checkpoint supports.
    acceptance: the rule that judges drafts. fine: how the fine levels come. Their defaults are the checkpoint's (but
    `blind(0.95)` for `residual`), with `rsd-skip` those of its calibration, and with a temperature `exact` and
    `sequential`.
    temperature: draw the motion tokens from softmax(logits / temperature); 0 takes the likeliest.
    skip: when `rsd-skip` skips the target; None takes the checkpoint's calibration. target_at_reset: the target
    always runs on an episode's first observation, whatever the skip rule says.
    execute: steps of a chunk that are executed, 1 to all of them.
    timed_only: nobody will execute the chunks; allows the acceptance `synthetic(RATE)`, which makes up what stands.
    audit: know of every chunk how far the visual drafter's led away from the target's; beside a skipped one the target
    is run for that, outside the latencies.
    """

    decode: str = BEST
    acceptance: str | None = None
    fine: Literal["regress", "sequential"] | None = None
    temperature: Temperature = 0.0
    skip: SkipRule | None = None
    target_at_reset: bool = True
    audit: bool = False
    execute: Steps | None = None
    timed_only: bool = False


@dataclass(frozen=True)
class RuntimeOptions(Checked):
    """What it runs on. device: cpu, cuda or cuda:1; engine: see `runtime.engines`; batch: observations at once, a
    fixed number, up to which fewer are filled up."""

    device: str = "cpu"
    engine: Engine = AUTO
    batch: Annotated[int, between(1, 4096)] = 1


def options_of(**asked: Any) -> tuple[DecodeOptions, RuntimeOptions]:
    """Both kinds from keywords, as a script gives them; `RsdError` for a name that is no option."""
    known = [{one.name for one in fields(kind)} for kind in (DecodeOptions, RuntimeOptions)]
    if unknown := sorted(asked.keys() - known[0] - known[1]):
        raise RsdError(f"option {', '.join(unknown)}: expected some of {', '.join(sorted(known[0] | known[1]))}")
    decode, runtime = ({name: value for name, value in asked.items() if name in own} for own in known)
    return DecodeOptions(**decode), RuntimeOptions(**runtime)


@dataclass(frozen=True, kw_only=True)
class Checkpoint(OwnDecoding):
    """What of a checkpoint decides how it may decode.

    visual_drafter: whether it has one. calibration: for `rsd-skip`; a text says why there is none, None that none is
    needed, where it keeps a schedule. code: of its tokens. compact: its models are the compact ones, and not OpenVLA's.
    horizon: steps of a chunk."""

    visual_drafter: bool
    calibration: SkipCalibration | str | None = None
    code: RfsqConfig = field(default_factory=RfsqConfig)
    compact: bool = True
    horizon: int = CHUNK_SIZE


@dataclass(frozen=True)
class Decoding:
    """How a policy decodes, settled. why: what `best` was chosen for, "" if the decoder was asked for by name."""

    decode: str
    why: str
    rule: AcceptanceRule
    fine: str
    temperature: float
    skip: SkipRule
    audit: bool
    execute: int

    @property
    def lossless(self) -> bool:
        """Whether its tokens are those of `ar`."""
        known = DECODERS[self.decode]
        return known.lossless and (self.rule.name == "exact" or not known.drafts)

    def recordable(self, compact: bool, device: str) -> bool:
        """Whether an engine can record it. Drawn tokens cannot be: a graph would have to know of the generator, and
        sequential levels are decided on the host. OpenVLA's 15 GB do not become ONNX graphs."""
        return self.fine == "regress" and self.temperature == 0 and (compact or not device.startswith("cpu"))


def resolve(checkpoint: Checkpoint, options: DecodeOptions) -> Decoding:
    """Settle every option; `RsdError` for what this checkpoint or this combination cannot do."""
    decode, why = (options.decode, "") if options.decode != BEST else best_decode(checkpoint, options)
    check_sampling(options.temperature, decode, options.acceptance, options.fine)
    if decode in former.DECODERS:
        raise RsdError(f"decode {decode!r}: it is called {former.DECODERS[decode]} now")
    if decode not in DECODERS:
        raise RsdError(f"decode {decode!r}: expected one of {', '.join(DECODERS)}")
    if DECODERS[decode].visual and not checkpoint.visual_drafter:
        raise RsdError(f"decode {decode!r}: this checkpoint has no visual drafter; use rsd, l1 or ar, or train one")
    acceptance, fine, skip = options.acceptance, options.fine, options.skip
    execute = executed_steps(options.execute or checkpoint.execute, checkpoint.horizon)
    # `residual` executes what it is told (a draft pulls the shipped policy 0.66 of the way): it has to be asked for
    own = BLIND if checkpoint.acceptance == "residual" else checkpoint.acceptance
    if DECODERS[decode].gated and skip is None and checkpoint.max_skips and checkpoint.calibration is None:
        skip = SkipRule.schedule(checkpoint.max_skips, checkpoint.max_skips_held)
        own = own.replace("blind", "own")  # what the target is told at its looks costs time and gains nothing
    elif DECODERS[decode].gated and skip is None and checkpoint.calibration is not None:
        skip, acceptance = calibrated(checkpoint.calibration, options)
        check_calibrated_steps(checkpoint, execute)
        fine = "regress"  # every calibration is of that
    # drawn tokens have no greedy choice to be near to: only the rule that keeps a distribution can judge them
    acceptance = acceptance or ("exact" if options.temperature else own)
    # `exact` promises the tokens of `ar`; regressed fine levels would break that promise
    rule = acceptance_rule(acceptance, checkpoint.code, options.timed_only)
    # nor has what is made up any effect on the time where all fine levels come in one pass
    fine = fine or ("sequential" if acceptance == "exact" or rule.synthetic else checkpoint.fine)
    if rule.synthetic and fine != "sequential":
        raise RsdError(f"acceptance {rule.name!r}: expected fine 'sequential', found {fine!r}; leave it out")
    if rule.unit == "chunk" and not checkpoint.compact:
        # a block right after the first has other rotary positions than any that the trunk was trained with
        raise RsdError(f"acceptance {rule.name!r}: not for OpenVLA, where nothing is known of it")
    if rule.untold and not DECODERS[decode].visual and DECODERS[decode].drafts:
        raise RsdError(f"acceptance {rule.name!r}: the target is told nothing that {decode} could verify; take l1")
    if rule.unit == "chunk" and fine == "sequential":
        raise RsdError(f"acceptance {rule.name!r}: expected fine 'regress', found 'sequential'; leave it out")
    skip = replace(skip or SkipRule(), target_at_reset=options.target_at_reset)
    return Decoding(decode, why, rule, fine, options.temperature, skip, options.audit, execute)


def executed_steps(asked: int | None, horizon: int, option: str = "execute") -> int:
    """How many of a chunk's steps are executed, None: all; `RsdError` for more than it has."""
    if asked is not None and asked > horizon:
        raise RsdError(f"{option} {asked}: expected 1 to {horizon}, the steps of this policy's chunk")
    return asked or horizon


def check_calibrated_steps(checkpoint: Checkpoint, execute: int) -> None:
    """Raise where a calibration is of chunks executed otherwise; before it said so, all of a chunk was executed."""
    made = checkpoint.calibration
    if isinstance(made, SkipCalibration) and execute != (steps := made.execute or checkpoint.horizon):
        found = f"calibrated for chunks of which {steps} steps are executed, found execute {execute}"
        raise RsdError(f"rsd-skip: {found}; calibrate again with rsd calibrate --execute {execute}")


class Choice(NamedTuple):
    """The decoder that `best` stands for, and why."""

    decode: str
    why: str

    def __str__(self) -> str:
        return f"decodes by {self.decode}: {self.why}"


def best_decode(checkpoint: Checkpoint, options: DecodeOptions) -> Choice:
    """What `best` is: by default what has every chunk verified."""
    if not checkpoint.visual_drafter:
        return Choice("rsd", "the best without a visual drafter")
    if options.temperature:
        return Choice("rsd-fused", "the best that draws its tokens")
    if options.skip:
        return Choice("rsd-skip", "a skip threshold is given")
    return Choice("rsd-fused", "the best that verifies every chunk")


def check_sampling(temperature: float, decode: str, acceptance: str | None, fine: str | None) -> None:
    """Raise unless tokens can be drawn that way; acceptance, fine: None where the default is taken."""
    if temperature == 0.0:
        return
    if decode not in names(samples=True):
        found = f"temperature {temperature:g}: expected decode {', '.join(names(samples=True))}, found {decode!r}"
        raise RsdError(f"{found}, which executes no tokens that the target chose; take one of them, or temperature 0")
    if DECODERS[decode].drafts and (acceptance not in (None, "exact") or fine not in (None, "sequential")):
        found = " and ".join(x for x in (acceptance and f"acceptance {acceptance!r}", fine and f"fine {fine!r}") if x)
        raise RsdError(
            f"temperature {temperature:g}: expected acceptance 'exact' and fine 'sequential' (the defaults), "
            f"found {found}, which does not keep the distribution of ar; leave it out, or take temperature 0"
        )


def calibrated(calibration: SkipCalibration | str, options: DecodeOptions) -> tuple[SkipRule, str]:
    """The skip rule of a checkpoint's calibration and the acceptance rule that it was made with."""
    if isinstance(calibration, str):
        raise RsdError(calibration)
    asked = options.acceptance and acceptance_rule(options.acceptance, RfsqConfig()).name
    if asked not in (None, calibration.acceptance) or options.fine not in (None, "regress"):
        found = ", ".join(f"{name} {value}" for name in ("acceptance", "fine") if (value := getattr(options, name)))
        expected = f"acceptance {calibration.acceptance} and fine regress"
        raise RsdError(f"rsd-skip: calibrated with {expected}, found {found}; leave it out")
    per_agreement = calibration.skips_per_agreement
    rule = SkipRule(
        calibration.threshold, calibration.max_skips, calibration.memory_chunks, skips_per_agreement=per_agreement
    )
    return rule, calibration.acceptance
