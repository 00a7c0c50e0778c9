"""`rsd drafter distil`: a drafter for any policy, from its rollouts and from those that the drafter itself leads to."""

from __future__ import annotations

import json
import math
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from rsd.collection.target_rollouts import Look, RolloutConfig, labels_every, roll_out
from rsd.conventions import REPLAN_STEPS
from rsd.data.demonstrations import demonstration_files
from rsd.data.schema import demo_names, open_data, text_attribute
from rsd.decoding.calibration import SCORE, SkipCalibration, SkipPromise, episodes_needed, fit_threshold
from rsd.devices import check_device
from rsd.evaluation import foreign
from rsd.evaluation.backend import describe_checkpoint, rsd_policy, settle
from rsd.evaluation.config import EvalConfig
from rsd.evaluation.distil_config import DistilConfig
from rsd.evaluation.tables import say
from rsd.manifest import MANIFEST_FILE, file_sha256
from rsd.models.standalone_drafter import StandaloneDrafter
from rsd.output import plural, terminal, writing
from rsd.sim.suites import step_limit, suite_tasks
from rsd.targets.drafter_files import WEIGHTS_FILE, SelfDeviation, StoredDrafter, load_models, read_drafter, save_models
from rsd.tokenizer.action_tokenizer import ActionTokenizer
from rsd.tokenizer.fit import MIN_CHUNKS
from rsd.training.loop import CHECKPOINT, one_run_a_folder
from rsd.training.standalone_drafter import TrainStandaloneConfig, fit_tokenizer, train_standalone
from rsd.types import Policy, RsdError

ROLLOUTS, DRAFTER = "rollouts", "drafter"
FAR = 1e6  # mm: another gripper symbol than the target's
ROUNDING = 0.1  # mm, of answers that are alike
TEST: Literal["betting"] = "betting"


@dataclass(frozen=True)
class MakeTarget:
    """The target of a worker process; equal ones are one."""

    config: EvalConfig

    def __call__(self) -> Policy:
        return rsd_policy(self.config)


@one_run_a_folder
def distil(config: DistilConfig) -> Path:
    """All of it, each part once -> the drafter's directory."""
    check_device(config.device)
    target = EvalConfig(
        task_suite=config.task_suite,
        tasks=config.tasks,
        policy=config.target,
        device="cpu" if config.target.startswith(("ws://", "wss://")) else config.device,  # a server has its own
        execute=config.execute,
    )
    if target.custom:
        foreign.check_foreign(target)
    tasks = tuple(target.task_ids(config.task_suite, [task for task, *_ in suite_tasks(config.task_suite)]))
    target = settle(target)[0]
    run = Run(config, target, describe_checkpoint(target), tasks)
    run.check_rollouts()
    trained = run.round(0, None)
    for number in range(1, config.rounds + 1):
        trained = run.round(number, trained)
    return run.finish(trained)


class Run:
    """One distillation and its folder."""

    def __init__(
        self, config: DistilConfig, target: EvalConfig, identity: dict[str, Any], tasks: tuple[int, ...]
    ) -> None:
        self.config, self.target, self.identity, self.tasks = config, target, identity, tasks
        self.make_target = MakeTarget(target)
        self.console = terminal(stderr=True)

    def check_rollouts(self) -> None:
        """`RsdError` where they will hold too few chunks, however long they last; of some the first answer tells."""
        steps = self.config.execute or (REPLAN_STEPS if "metadata" in self.identity else 1)
        each, tasks = math.ceil(step_limit(self.config.task_suite) / labels_every(steps)), len(self.tasks)
        if (rollouts := self.config.num_rollouts * tasks) * each < MIN_CHUNKS:
            found = f"{plural(rollouts, 'rollout')} of at most {each}"
            more = f"give --num-rollouts {math.ceil(MIN_CHUNKS / (each * tasks))} or more"
            raise RsdError(f"expected at least {MIN_CHUNKS} chunks, found {found}; {more}")

    def folder(self, name: str) -> Path:
        return self.config.output / ROLLOUTS / name

    def round(self, number: int, drafter: Path | None) -> Path:
        """Rollouts, by the target in round 0 and by the drafter of the round before in others, and a training on all
        so far -> its checkpoint."""
        config = self.config
        if number == 0:
            self.rollouts("round-0", "target", config.num_rollouts, None)
        else:
            self.rollouts(f"round-{number}", "drafter", config.num_dagger, drafter)
        tokenizer = self.tokenizer()
        stored = StoredDrafter(config.drafter, self.identity, *self.measured())
        training = TrainStandaloneConfig(
            data=tuple(self.folder(f"round-{each}") for each in range(number + 1)),
            output=config.output / f"round-{number}",
            drafter=config.drafter,
            loss=config.loss,
            augment=config.augment,
            loop=replace(config.loop, seed=config.seed),
            device=config.device,
            validation_every=config.validation_every,
            init_sha256=file_sha256(drafter / WEIGHTS_FILE) if drafter else "",
        )

        def save(model: StandaloneDrafter, made: dict[str, Any], directory: Path) -> None:
            save_models(model, tokenizer, replace(stored, provenance=made), directory)

        if (done := training.output / CHECKPOINT).exists() and self.whole(done):
            return done
        init = load_models(drafter, read_drafter(drafter))[0] if drafter else None
        return train_standalone(training, tokenizer, init, save)

    def whole(self, checkpoint: Path) -> bool:
        """Whether that training came to its end, its validation too."""
        stored = read_drafter(checkpoint)
        if stored.target != json.loads(json.dumps(self.identity, default=str)):
            raise RsdError(f"{checkpoint}: distilled from another target; choose another --output")
        return bool(stored.provenance.get("validation"))

    def rollouts(self, name: str, driver: Any, episodes: int, drafter: Path | None, **more: Any) -> None:
        config = self.config
        asked = RolloutConfig(
            out=self.folder(name), suite=config.task_suite, tasks=self.tasks, episodes=episodes, driver=driver,
            target=json.loads(json.dumps(self.identity, default=str)), image_size=config.drafter.image_size,
            horizon=self.tokenizer().config.horizon if drafter else config.execute or 0, drafter=drafter,
            drafter_sha256=file_sha256(drafter / MANIFEST_FILE) if drafter else "",
            seed=config.seed + sum(name.encode()), num_workers=config.num_workers, **more
        )
        counts = roll_out(asked, self.make_target)
        solved = [attribute["success"] for attribute in attributes_of(self.folder(name))]
        say(self.console, f"{name}: {plural(sum(counts.values()), 'rollout')}, {sum(solved)} successful")

    def tokenizer(self) -> ActionTokenizer:
        """Fitted once, from the target's own rollouts, whose longest chunk is the horizon."""
        place = self.config.output / "tokenizer"
        if (place / "tokenizer.json").exists():
            return ActionTokenizer.load(place)
        tokenizer = fit_tokenizer(self.folder("round-0"), self.config.execute or self.horizon())
        with writing(place):
            place.mkdir(parents=True, exist_ok=True)
        tokenizer.save(place)
        return tokenizer

    def horizon(self) -> int:
        """How many actions the target's answers have."""
        chunks = {attribute["horizon"] for attribute in attributes_of(self.folder("round-0"))}
        if len(chunks) != 1:
            found = f"answers of {', '.join(map(str, sorted(chunks)))} actions"
            raise RsdError(f"{self.config.target}: {found}; choose how many to execute, --execute")
        return int(chunks.pop())

    def measured(self) -> tuple[float, SelfDeviation]:
        """Epsilon, and how far the target is from itself."""
        pairs = [pair for each in attributes_of(self.folder("round-0")) for pair in each["self_deviation"]]
        if not pairs:
            return self.config.epsilon_mm, SelfDeviation()
        apart = np.array([distance for distance, _ in pairs])
        p50, p90 = (float(value) for value in np.percentile(apart, (50, 90)))
        found = SelfDeviation(len(pairs), p50, p90, float(np.mean([differs for _, differs in pairs])))
        return (p90 if p50 > ROUNDING else self.config.epsilon_mm), found

    def finish(self, trained: Path) -> Path:
        """Calibrate the gate of the last round's drafter, and write the directory that goes with its target."""
        config, stored = self.config, read_drafter(trained)
        calibration, why = None, ""
        needed, planned = episodes_needed(config.alpha, config.delta, TEST), config.num_calibration * len(self.tasks)
        if planned < needed:
            why = f"{planned} rollouts, {needed} take a promise (--num-calibration)"
        else:
            self.rollouts("calibration", "gate", config.num_calibration, trained, threshold_mm=stored.epsilon_mm)
            calibration = self.calibrated(stored, file_sha256(trained / WEIGHTS_FILE))
        final = config.output / DRAFTER
        with writing(final):
            shutil.copytree(trained, final, dirs_exist_ok=True)
        made = replace(stored, calibration=calibration, uncalibrated=why, max_skips=config.max_skips)
        made.save(final)
        itself = stored.self_deviation
        unit = "asked twice it differs by" if itself.p50_mm > ROUNDING else "it answers always alike:"
        say(self.console, f"{config.target}: {unit} {itself.p50_mm:.1f} mm (p50), {itself.p90_mm:.1f} (p90)")
        promise = f"not calibrated: {why}; drafts that expect less than epsilon are trusted"
        if calibration is not None:
            skips = f"{calibration.skip_share:.0%} of the chunks without the target"
            promise = f"threshold {calibration.threshold:.1f} mm, {skips}, risk <= {config.alpha:g}"
        say(self.console, f"gate: epsilon {stored.epsilon_mm:.1f} mm; {promise}")
        print(f"drafter: {final}; next: rsd eval --policy {config.target} --drafter {final}", file=sys.stderr)
        return final

    def calibrated(self, stored: StoredDrafter, sha256: str) -> SkipCalibration:
        config = self.config
        episodes = [
            [Look(**look) for look in attribute["looks"]] for attribute in attributes_of(self.folder("calibration"))
        ]
        order = np.random.default_rng(config.seed).permutation(len(episodes))
        episodes = [episodes[place] for place in order]  # the betting test needs exchangeable ones
        promise = SkipPromise(
            alpha=config.alpha, delta=config.delta, test=TEST, epsilon_mm=stored.epsilon_mm,
            max_skips=config.max_skips, memory_chunks=1, skips_per_agreement=config.max_skips, score=SCORE,
            suites=config.task_suite, acceptance="margin", weights_sha256=sha256
        )
        return fit_threshold(
            [np.array([look.expected_mm for look in looks]) for looks in episodes],
            [np.array([FAR if look.gripper_differs else look.deviation_mm for look in looks]) for looks in episodes],
            promise,
            forced=[np.array([look.forced for look in looks]) for looks in episodes],
            stands=[np.array([look.stood for look in looks]) for looks in episodes],
        )


def attributes_of(folder: Path) -> list[dict[str, Any]]:
    """What every rollout of a folder noted of itself, in order."""
    found = []
    for path in demonstration_files(folder):
        with open_data(path) as data:
            for name in demo_names(data):
                node = data[name]
                noted = {key: json.loads(text_attribute(node, key, name, "[]")) for key in ("looks", "self_deviation")}
                numbers = {key: int(node.attrs[key]) for key in ("horizon", "image_every", "success")}
                found.append({**noted, **numbers})
    return found
