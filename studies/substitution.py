"""`python -m studies.substitution`: what acceptance rules make of right and of wrong drafts.

The target is given drafts that were made for something else: another instruction for the same scene and moment, a
look-alike beside what is asked for, another scene. A verifier executes what it would have executed anyway; one that has
learnt that drafts are right copies. *Draft pull* is |executed - own| / |draft - own|, of mean absolute normalised
actions, where own is the target's own chunk (that of `l1`: the same pass with the draft withheld). An acceptance rate
shows none of it, so the confusion table counts apart the drafts that are right, by how far their commands lead the
fingertip away from the target's own, and those that are wrong.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import Tensor

from rsd import output
from rsd.data.demonstrations import Demonstration, load_demonstrations
from rsd.decoding.acceptance import acceptance_rule, leading
from rsd.decoding.calibration import fingertip_deviation
from rsd.decoding.decoders import judged, look
from rsd.decoding.primitives import Primitives
from rsd.decoding.state import Blocks, Draft, PolicyInput
from rsd.evaluation.results import encode_record, write_atomically
from rsd.evaluation.tables import ABSENT, print_table
from rsd.models.visual_drafter import Memory
from rsd.policy import RsdPolicy, SpeculativePolicy
from rsd.sim.permuted import LOOK_ALIKES
from rsd.types import EAGER, Observation, RsdError
from rsd.versions import versions
from studies.config import SubstitutionConfig

FORMAT = 1
MARK = b'"draft_pull": '  # in every record of a measurement
OWN, INSTRUCTION, LOOK_ALIKE, SCENE = "own", "another instruction", "look-alike", "another scene"
SUBSTITUTES = (INSTRUCTION, LOOK_ALIKE, SCENE)
ALL = "all substitutes"
RULES = ("exact", "margin", "distance(1)", "typical(0.09)", "agreement(0.7)")
WHOLE_RULES = ("blind(0.95)", "blind(0.95,moving)", "residual")  # not of OpenVLA


class Moment(NamedTuple):
    """What a draft is made for, and what the target saw when it last looked; None: the drafter remembers nothing."""

    now: Observation
    before: Observation | None = None

    def asking(self, instruction: str) -> Moment:
        before = None if self.before is None else replace(self.before, instruction=instruction)
        return Moment(replace(self.now, instruction=instruction), before)


Frame = Mapping[str, Moment]  # OWN, which is what the target sees, and those of SUBSTITUTES that the scene has


@dataclass(frozen=True)
class Cell:
    """Of so many drafts, the share that stands whole (every drafted level of every scalar), the share of tokens that
    stand (under all the coarser ones of their scalar), and the share after which what is executed leads further from
    the target's own chunk than epsilon; None of no draft."""

    drafts: int
    chunks_stand: float | None = None
    tokens_stand: float | None = None
    executed_beyond: float | None = None


@dataclass(frozen=True)
class Judgement:
    """Of one rule and one kind of draft. apart: mean |draft - own|, normalised, of the steps that are executed."""

    draft_pull: float
    apart: float
    right: Cell
    wrong: Cell


@dataclass(frozen=True)
class SubstitutionRecord:
    """judged: rule -> kind of draft -> what it makes of it."""

    format: int
    config: dict[str, Any]
    versions: dict[str, str]
    demonstrations: int
    frames: int
    judged: dict[str, dict[str, Judgement]]


def measure_substitution(config: SubstitutionConfig) -> SubstitutionRecord:
    """Run the measurement, print the tables, write the JSON."""
    output.refuse_to_replace(config.output, config.overwrite, MARK)
    policy = RsdPolicy.from_pretrained(config.policy, device=config.device, decode="rsd-fused", engine=EAGER).core
    demonstrations = [
        each for folder in config.data for each in load_demonstrations(folder, max_per_task=config.max_per_task)
    ]
    frames = spread_frames(demonstrations, config.frames, config.memory_chunks * policy.execute)
    begun = time.perf_counter()
    columns = judge_all(policy, frames, config.acceptance or default_rules(policy), config.batch)
    found = {rule: judgements(kinds, config.epsilon_mm) for rule, kinds in columns.items()}
    settings = {**asdict(config), "data": [str(path) for path in config.data], "output": str(config.output)}
    record = SubstitutionRecord(FORMAT, settings, versions(), len(demonstrations), len(frames), found)
    write_atomically(config.output, encode_record(record) + "\n")
    print_judgements(Console(), record)
    print(f"{time.perf_counter() - begun:.1f} s on {config.device}; results: {config.output}")
    return record


def default_rules(policy: SpeculativePolicy) -> tuple[str, ...]:
    """One of each kind that the policy can use."""
    return (*WHOLE_RULES, *RULES) if policy.body.compact else RULES


# the frames and what drafts are made for


def spread_frames(demonstrations: Sequence[Demonstration], count: int, steps_before: int) -> list[Frame]:
    """At most `count` frames, evenly over all that were rendered. steps_before: so many steps earlier the target
    looked, 0: it did not; before an episode's step of that number it had not either.

    Raises RsdError for demonstrations without images, or without those of the steps before."""
    every = [(number, step) for number, each in enumerate(demonstrations) for step in rendered(each, steps_before)]
    chosen = torch.linspace(0, len(every) - 1, min(count, len(every))).long().tolist()
    return [frame_of(demonstrations, number, step, steps_before) for number, step in (every[i] for i in chosen)]


def rendered(demonstration: Demonstration, steps_before: int) -> range:
    """The steps of which there are images."""
    if demonstration.images is None:
        found = f"{demonstration.source}: states only, without images"
        raise RsdError(f"{found}; run `rsd demos render` on it first")
    if steps_before % demonstration.image_every:
        expected = f"images of every n-th step with n a divisor of {steps_before}"
        found = f"found every {demonstration.image_every}; render again with another --every, or --memory-chunks 0"
        raise RsdError(f"{demonstration.source}: expected {expected}, {found}")
    return range(0, len(demonstration), demonstration.image_every)


def frame_of(demonstrations: Sequence[Demonstration], number: int, step: int, steps_before: int) -> Frame:
    """The frame of one demonstration, with the drafts that its scene and the demonstrations beside it allow; which of
    several instructions is another one goes by the step."""
    here = demonstrations[number]
    own, asked = moment(here, step, steps_before), {thing: sentence for sentence, thing in here.asks}
    others = [sentence for thing, sentence in asked.items() if thing != here.target_object]
    if not here.asks:  # of scenes in which every task is one of all
        others = sorted({each.instruction for each in demonstrations})
    others = [sentence for sentence in others if sentence != here.instruction]
    beside = [sentence for thing, sentence in asked.items() if alike(thing, here.target_object)]
    frame = {OWN: own}
    if others:
        frame[INSTRUCTION] = own.asking(others[step // here.image_every % len(others)])
    if beside:
        frame[LOOK_ALIKE] = own.asking(beside[step // here.image_every % len(beside)])
    elsewhere = [each for each in (*demonstrations[number + 1 :], *demonstrations[:number]) if each is not here]
    if elsewhere:  # at the same share of the way
        other = elsewhere[0]
        there = step * len(other) // len(here) // other.image_every * other.image_every
        frame[SCENE] = moment(other, there, steps_before)
    return frame


def moment(demonstration: Demonstration, step: int, steps_before: int) -> Moment:
    def seen(at: int) -> Observation:
        assert demonstration.images is not None
        images = demonstration.images[at // demonstration.image_every]
        return Observation(images, demonstration.state[at], demonstration.instruction)

    return Moment(seen(step), seen(step - steps_before) if 0 < steps_before <= step else None)


def alike(thing: str, other: str) -> bool:
    """Whether two things of a scene, such as `milk_1`, are of one kind or of one family of look-alikes, but not one."""
    kind, other_kind = thing.rpartition("_")[0], other.rpartition("_")[0]
    return thing != other and (kind == other_kind or any({kind, other_kind} <= {*family} for family in LOOK_ALIKES))


# what the rules make of them


@dataclass(frozen=True)
class Columns:
    """One number a chunk, each [n], CPU. apart: |draft - own|, moved: |executed - own|, normalised means; draft_mm,
    executed_mm: how far from own they lead the fingertip; tokens: share that stands; whole: whether all do."""

    apart: Tensor
    draft_mm: Tensor
    moved: Tensor
    executed_mm: Tensor
    tokens: Tensor
    whole: Tensor


@torch.inference_mode()
def judge_all(
    policy: SpeculativePolicy, frames: Sequence[Frame], rules: Iterable[str], batch: int
) -> dict[str, dict[str, Columns]]:
    """rule -> kind of draft -> what became of every frame that has it."""
    ops = {}
    for name in rules:
        rule = acceptance_rule(name, policy.ops.target.code)
        if rule.unit == "chunk" and not policy.body.compact:
            raise RsdError(f"--acceptance {name}: not for OpenVLA; expected some of {', '.join(RULES)}")
        own = policy.ops
        ops[rule.name] = Primitives(own.target, own.feature_drafter, rule, visual_drafter=own.visual_drafter)
    found: dict[tuple[str, str], list[Columns]] = {}
    parts = [frames[first : first + batch] for first in range(0, len(frames), batch)]
    for part in output.shown(parts, "batches of frames", len(parts)):
        for name, kind, columns in judge_batch(policy, ops, part):
            found.setdefault((name, kind), []).append(columns)
    return {
        name: {kind: joined(found[name, kind]) for kind in (OWN, *SUBSTITUTES) if (name, kind) in found} for name in ops
    }


def judge_batch(
    policy: SpeculativePolicy, ops: Mapping[str, Primitives], frames: Sequence[Frame]
) -> Iterator[tuple[str, str, Columns]]:
    """(rule, kind of draft, what became of it) of the frames that have that kind. The kinds share what the target sees,
    rules that tell the target alike its pass."""
    any_ops = next(iter(ops.values()))
    seen = any_ops.embed(policy.body([frame[OWN].now for frame in frames]))
    looked = any_ops.prefill(seen, False)
    regressed = any_ops.regress(looked.features[0])
    for kind in (OWN, *SUBSTITUTES):
        rows = [row for row, frame in enumerate(frames) if kind in frame]
        if not rows:
            continue
        draft, prefix = drafted(policy, any_ops, [frames[row][kind] for row in rows]), seen[rows]
        own = Executed.of(policy, regressed[rows], looked.gripper[rows])
        proposed = Executed.of(policy, any_ops.forecast(draft).value, draft.gripper)
        any_ops.check()
        told: dict[str, Blocks] = {}
        for name, rule_ops in ops.items():
            if rule_ops.telling not in told:
                told[rule_ops.telling] = rule_ops.prefill_with(prefix, draft)
            result = judged(rule_ops, draft, told[rule_ops.telling], passes=0)
            rule_ops.check()
            assert result.accepted is not None
            executed, count = Executed.of(policy, result.value, result.gripper), result.accepted.shape[1]
            stands = leading(result.accepted).float() / count  # [B, P]
            apart = (proposed.apart(own), proposed.millimetres(own), executed.apart(own), executed.millimetres(own))
            yield name, kind, Columns(*(each.cpu() for each in (*apart, stands.mean(-1), (stands == 1).all(-1))))


def drafted(policy: SpeculativePolicy, ops: Primitives, moments: Sequence[Moment]) -> Draft:
    """What the visual drafter proposes at those moments, each with its memory of the target's last look, if any."""
    return ops.draft(policy.body([each.now for each in moments]), remembered(policy, ops, moments))


def remembered(policy: SpeculativePolicy, ops: Primitives, moments: Sequence[Moment]) -> Memory | None:
    if all(each.before is None for each in moments):
        return None
    seen: PolicyInput = policy.body([each.before or each.now for each in moments])
    memory = look(ops, seen, ops.draft(seen, None)).memory
    assert memory is not None
    return memory._replace(known=torch.tensor([each.before is not None for each in moments], device=policy.device))


@dataclass(frozen=True)
class Executed:
    """The steps of chunks that are executed: normalised motion [B, execute, M], actions [B, execute, 7]."""

    motion: Tensor
    actions: Tensor

    @classmethod
    def of(cls, policy: SpeculativePolicy, value: Tensor, gripper: Tensor) -> Executed:
        coefficients, steps = value.float() * policy.tokenizer.first_step, slice(policy.execute)
        motion = policy.tokenizer.to_normalised(coefficients)[:, steps]
        return cls(motion, policy.tokenizer.actions_of(coefficients, gripper)[:, steps].float())

    def apart(self, other: Executed) -> Tensor:
        return (self.motion - other.motion).abs().mean((1, 2))

    def millimetres(self, other: Executed) -> Tensor:
        return fingertip_deviation(self.actions, other.actions)


def joined(parts: Sequence[Columns]) -> Columns:
    return Columns(*(torch.cat(column) for column in zip(*(vars(part).values() for part in parts), strict=True)))


def judgements(kinds: Mapping[str, Columns], epsilon_mm: float) -> dict[str, Judgement]:
    """By kind of draft, and of all the substitutes together."""
    if wrong := [columns for kind, columns in kinds.items() if kind != OWN]:
        kinds = {**kinds, ALL: joined(wrong)}
    return {kind: judgement(columns, epsilon_mm) for kind, columns in kinds.items()}


def judgement(columns: Columns, epsilon_mm: float) -> Judgement:
    right, apart = columns.draft_mm <= epsilon_mm, float(columns.apart.mean())
    pull = float(columns.moved.mean()) / apart if apart else 0.0
    return Judgement(pull, apart, cell(columns, right, epsilon_mm), cell(columns, ~right, epsilon_mm))


def cell(columns: Columns, those: Tensor, epsilon_mm: float) -> Cell:
    if not those.any():
        return Cell(0)
    shares = (columns.whole, columns.tokens, columns.executed_mm > epsilon_mm)
    return Cell(int(those.sum()), *(float(each[those].float().mean()) for each in shares))


def print_judgements(console: Console, record: SubstitutionRecord) -> None:
    epsilon = record.config["epsilon_mm"]
    kinds = list(next(iter(record.judged.values())))
    pulls = [[rule, *(f"{found[kind].draft_pull:.3f}" for kind in kinds)] for rule, found in record.judged.items()]
    apart = next(iter(record.judged.values()))
    counts = [f"{each.right.drafts} right, {each.wrong.drafts} wrong" for each in apart.values()]
    pulls += [["|draft - own|", *(f"{each.apart:.3f}" for each in apart.values())], ["drafts", *counts]]
    where = f"{record.frames} frames of {record.demonstrations} demonstrations; right: within {epsilon:g} mm of own"
    print_table(console, f"draft pull, {where}", ["rule", *kinds], pulls)
    kinds = [kind for kind in (OWN, ALL) if kind in kinds]
    rows = [
        [rule, *(written(each) for kind in kinds for each in (found[kind].right, found[kind].wrong))]
        for rule, found in record.judged.items()
    ]
    counts = [str(each.drafts) for kind in kinds for each in (apart[kind].right, apart[kind].wrong)]
    header = ["rule", *(f"{kind}, {which}" for kind in kinds for which in ("right", "wrong"))]
    title = "share of the drafts that stand whole / of the tokens that stand / of the chunks executed beyond, in %"
    print_table(console, title, header, [*rows, ["drafts", *counts]])


def written(one: Cell) -> str:
    shares = (one.chunks_stand, one.tokens_stand, one.executed_beyond)
    return " / ".join(ABSENT if share is None else f"{100 * share:.0f}" for share in shares)


if __name__ == "__main__":
    from studies.command import main  # which names this module

    main("substitution")
