"""What the robot did in an episode, step by step: of a draft, the target's correction, the target's own, or nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rsd.decoding.course import DRAFTED, HELD, OWN, REPLACED
from rsd.evaluation.results import EpisodeResult
from rsd.evaluation.summary import describe
from rsd.evaluation.tables import percent
from rsd.reporting.tables import Run

MOST_OPEN = 60  # strips; of more only the first task's are shown at once
HEIGHT = 12.0  # of a strip, of which the last part is the marks of the observations
BARS = {DRAFTED: 10.0, REPLACED: 10.0, OWN: 6.0, HELD: 2.0}  # heights, so that no colour has to be told from another
LEGEND = (
    (DRAFTED, "drafted: of a draft that the target had not answered yet, or let stand"),
    (REPLACED, "replaced: the target's answer in the place of its draft"),
    (OWN, "the target's own: no draft, or the answer before going on"),
    (HELD, "stood still"),
)
NAMES = {letter: words.split(":")[0] for letter, words in LEGEND}


@dataclass(frozen=True)
class Strip:
    """An episode. width: periods of control, with those between chunks in real time; bars: a path by letter; marks: one
    where an observation was taken; told: the same in words."""

    run: str
    colour: int
    episode: EpisodeResult
    width: float
    bars: dict[str, str]
    marks: str
    told: str


def strips(runs: Sequence[Run], labels: dict[tuple[str, int], str]) -> list[tuple[str, list[Strip]]]:
    """By task, in the order of the initial states, runs under each other; empty where no run has recorded any."""
    found: dict[tuple[str, int], list[Strip]] = {}
    for colour, run in enumerate(runs):
        for episode in run.episodes:
            if episode.sources:
                drawn = strip(run.name, colour, episode, float(run.record.config.get("control_hz", 0.0)))
                found.setdefault(episode.task, []).append(drawn)
    order = {task: sorted(found[task], key=lambda s: (s.episode.init_state, s.colour)) for task in sorted(found)}
    return [(labels.get(task, str(task[1])), listed) for task, listed in order.items()]


def unrecorded(runs: Sequence[Run]) -> list[str]:
    """Names of the runs in which time counted but whose records, of an earlier version, do not hold the steps."""
    timed = ("delay", "drafter_delay", "control_hz")
    return [
        run.name
        for run in runs
        if any(run.record.config.get(name) for name in timed) and not any(e.sources for e in run.episodes)
    ]


def strip(name: str, colour: int, episode: EpisodeResult, control_hz: float) -> Strip:
    """control_hz: of a run in real time, whose standstill before a chunk may be beside its steps (`pause_ms`)."""
    pauses = episode.chunk_stats.get("pause_ms", [None] * episode.chunks)
    at, spans, marks, counts = 0.0, list[tuple[str, float, float]](), list[str](), dict.fromkeys(BARS, 0.0)
    for source, pause in zip(episode.sources, pauses, strict=False):
        marks.append(f"M{at:g} {HEIGHT - 1:g}v1")
        still = round((pause or 0.0) * control_hz / 1e3, 1)
        for letter, length in [(HELD, still)] * (still > 0) + [(letter, 1.0) for letter in source]:
            counts[letter] += length
            if spans and spans[-1][0] == letter and spans[-1][1] + spans[-1][2] == at:
                spans[-1] = (letter, spans[-1][1], spans[-1][2] + length)
            else:
                spans.append((letter, at, length))
            at = round(at + length, 1)
    bars = dict.fromkeys(BARS, "")
    for letter, start, length in spans:
        bars[letter] += f"M{start:g} {10 - BARS[letter]:g}h{length:g}V10h{-length:g}z"
    told = ", ".join(f"{NAMES[letter]} {counts[letter]:g}" for letter in BARS if counts[letter])
    return Strip(name, colour, episode, at, bars, "".join(marks), f"{told} of {at:g} steps")


def corrections(run: Run) -> str:
    """How far drafts got before the target's answer, and what it replaced; "" of a run without drafts to correct."""
    answers = list[tuple[float | None, float, float | None]]()
    for episode in run.episodes:
        stats = episode.chunk_stats
        columns = [stats.get(name, [None] * episode.chunks) for name in ("drafted_steps", "replaced", "replaced_mm")]
        answers += [(steps, share, mm) for steps, share, mm in zip(*columns, strict=True) if share is not None]
    if not answers:
        return ""
    shares = [share for _, share, _ in answers]
    drafted = [steps for steps, share, _ in answers if share and steps is not None]
    apart = [mm for _, share, mm in answers if share and mm is not None]
    replaced = f"{percent(sum(shares) / len(shares))} of the actions replaced"
    if not drafted:
        return replaced
    before, far = describe(drafted), describe(apart or [0.0])
    return (
        f"{replaced}, in {percent(len(drafted) / len(shares))} of the answers, {before['mean']:.1f} steps of the draft "
        f"executed before (p95 {before['p95']:.0f}); the two lead {far['mean']:.1f} mm apart (p95 {far['p95']:.1f})"
    )
