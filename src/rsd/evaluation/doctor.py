"""`rsd doctor`: does this machine have what an evaluation needs, and what to do where it does not.

The cheap checks (well under a second) are the ones `rsd eval` runs before it starts anything.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from rsd.devices import check_device
from rsd.evaluation import foreign
from rsd.evaluation.config import EvalConfig
from rsd.output import reason, shown, terminal
from rsd.sim.suites import MAIN_SUITES, bddl_file, init_states, suite_names, suite_tasks
from rsd.types import CAMERAS, STATE_DIM, ActionChunk, Observation, RsdError

if TYPE_CHECKING:
    from rsd.policy import RsdPolicy

# Other versions move objects in the first steps, and with them the success rates.
PINNED = {"mujoco": "3.2.3", "robosuite": "1.4.0"}
DISK_MIB = 500


@dataclass(frozen=True)
class DoctorConfig:
    """Check this machine and a checkpoint for an evaluation; exit status 1 if anything is red."""

    policy: str = "checkpoints/libero"
    """Everything that `rsd eval --policy` takes."""
    device: str = "cpu"
    """Where the policy shall run: cpu, cuda, cuda:1."""
    output: Path = Path("results")
    """Where results shall go: is there room, may one write?"""
    verbose: bool = False
    """Also show what flows through the policy: observation keys, shapes of hidden states, tokens and actions."""


@dataclass(frozen=True)
class Check:
    """One line. status: red lines keep an evaluation from running or from being comparable. remedy: what to do."""

    name: str
    status: Literal["ok", "warn", "fail"]
    found: str
    remedy: str = ""


def guarded(name: str, check: Callable[[], Check]) -> Check:
    """A check whose own failure is its finding."""
    try:
        return check()
    except Exception as error:  # whatever the machine comes up with
        return Check(name, "fail", reason(error))


def python_version() -> Check:
    version = platform.python_version()
    if (3, 10) <= sys.version_info[:2] <= (3, 12):
        return Check("Python", "ok", version)
    return Check("Python", "fail", f"{version}, expected 3.10 to 3.12", "make the environment anew: make env")


def torch_version() -> Check:
    import torch

    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "built for the CPU"
    return Check("PyTorch", "ok", f"{torch.__version__}, {cuda}, {torch.get_num_threads()} threads")


def device(name: str) -> Check:
    import torch

    check_device(name)
    if name.startswith("cuda"):
        properties = torch.cuda.get_device_properties(name)
        return Check("device", "ok", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    if torch.cuda.is_available():
        return Check("device", "warn", f"{name}, and a {torch.cuda.get_device_name()} idles", "try --device cuda")
    return Check("device", "ok", name)


def pinned(package: str) -> Check:
    remedy = f"pip install {package}=={PINNED[package]}"
    try:
        found = metadata.version(package)
    except metadata.PackageNotFoundError:
        return Check(package, "fail", "not installed", remedy)
    if found == PINNED[package]:
        return Check(package, "ok", found)
    return Check(package, "fail", f"{found}, expected {PINNED[package]}: success rates are not comparable", remedy)


def gl_library() -> Check:
    from rsd.sim.rendering import check_gl, gl_backend

    check_gl()
    backend = gl_backend()
    if backend == "osmesa":
        return Check("OpenGL", "ok", "OSMesa: draws on the CPU, some 100 ms an image; EGL needs an NVIDIA driver")
    return Check("OpenGL", "ok", backend)


def disk(directory: Path) -> Check:
    existing = next(path for path in (directory.absolute(), *directory.absolute().parents) if path.exists())
    if not existing.is_dir():
        return Check("disk", "fail", f"expected a folder, found that {existing} is none", "choose another --output")
    free = shutil.disk_usage(existing).free / 2**20
    if free < DISK_MIB:
        return Check("disk", "fail", f"{free:.0f} MiB free at {existing}", "make room, or choose another --output")
    if not os.access(existing, os.W_OK):
        return Check("disk", "fail", f"{existing} may not be written to", "choose another --output")
    return Check("disk", "ok", f"{free / 1024:.1f} GiB free at {existing}")


def checkpoint_files(policy: str) -> Check:
    """Files are there and belong together (hashes), the configuration is readable."""
    from rsd.checkpoint import backbone_of, checkpoint_hash, locate_checkpoint, parse_config, read_content
    from rsd.models.bundle import PolicyConfig
    from rsd.targets.openvla.published import Settings, fingerprint, locate_openvla
    from rsd.tokenizer.action_tokenizer import ActionTokenizer

    if (openvla := locate_openvla(policy)) is not None:
        from rsd.targets.openvla.statistics import Statistics

        statistics, wanted = Statistics.load(openvla), Settings.load(openvla).unnorm_key
        for key in [statistics.key(wanted)] if wanted else statistics.tables:
            statistics.actions(key)
        return Check("checkpoint files", "ok", f"{openvla}, OpenVLA's format, fingerprint {fingerprint(openvla)[:12]}")
    directory = locate_checkpoint(policy)
    content = read_content(directory)
    if (backbone := backbone_of(content)) is not None:
        backbone.check_files(directory, content)
    else:
        parse_config(directory, content, PolicyConfig)
    ActionTokenizer.load(directory)
    return Check("checkpoint files", "ok", f"{directory}, sha256 {checkpoint_hash(policy)[:12]}")


def libero_assets() -> Check:
    tasks = [(suite, task.task_id) for suite in MAIN_SUITES for task in suite_tasks(suite)]
    for suite, task_id in tasks:
        bddl_file(suite, task_id)
    states = sum(len(init_states(suite, 0)) for suite in MAIN_SUITES)
    others = len(suite_names()) - len(MAIN_SUITES)
    found = f"{len(tasks)} tasks of {len(MAIN_SUITES)} suites, {others} variants; {states} states read"
    return Check("LIBERO", "ok", found)


def render_frame() -> Check:
    """Really draws: a scene with both cameras, which must not be empty, nor the same."""
    from rsd.sim.libero import LiberoEnv
    from rsd.sim.rendering import gl_backend

    env = LiberoEnv("libero_spatial", 0, image_size=64)
    try:
        env.reset(options={"init_state": 0})
        images = env.observation().images
    finally:
        env.close()
    if any(image.std() < 5 for image in images) or np.array_equal(*images):
        return Check("rendering", "fail", f"{gl_backend()} draws an empty picture", "set MUJOCO_GL=osmesa")
    return Check("rendering", "ok", f"a scene of LIBERO, two cameras, by {gl_backend()}")


def load_and_predict(policy_name: str, device_name: str, keep: list[RsdPolicy]) -> Check:
    """Weights load strictly, a prediction is finite, and the policy looks at its images."""
    from rsd.policy import RsdPolicy
    from rsd.targets.openvla.published import locate_openvla

    if (openvla := locate_openvla(policy_name)) is not None:
        from rsd.targets.openvla.policy import OpenVlaPolicy
        from rsd.targets.openvla.selftest import image_self_test

        test = image_self_test(OpenVlaPolicy.from_pretrained(openvla, device=device_name))
        return Check("policy", "ok" if test.passed else "fail", str(test))
    policy = RsdPolicy.from_pretrained(policy_name, device=device_name)
    keep.append(policy)
    dark, light = (alone(policy, blank(policy.image_size, value)) for value in (0, 255))
    if np.array_equal(dark.actions, light.actions):
        return Check("policy", "fail", "a black and a white image give the same actions: it does not see")
    count = sum(parameter.numel() for parameter in policy.model.parameters())
    spent = light.stats.latency_ms["total"]
    how = f"{policy.decode}, {'lossless' if policy.core.decoding.lossless else 'lossy'}, engine {policy.engine}"
    chunk = f"chunk {list(light.actions.shape)} in {spent:.0f} ms by {how}"
    return Check("policy", "ok", f"{count / 1e6:.1f} M parameters, {chunk}")


def alone(policy: RsdPolicy, observation: Observation) -> ActionChunk:
    """The chunk at the beginning of an episode, where every decoder looks."""
    policy.reset()
    return policy.predict(observation)


def accuracy(policy: RsdPolicy) -> Check:
    """What the training measured, if the checkpoint says so."""
    validation = policy.provenance.get("validation", {})
    measured = {name: v["l1_error"] for name, v in validation.items() if isinstance(v, dict) and "l1_error" in v}
    if not measured:
        return Check("validation", "warn", "the checkpoint says nothing about its accuracy")
    errors = ", ".join(f"{name} {float(error):.3f}" for name, error in measured.items())
    return Check("validation", "ok", f"action error {errors}")


def blank(size: int, value: int) -> Observation:
    images = np.full((len(CAMERAS), size, size, 3), value, dtype=np.uint8)
    return Observation(images, np.zeros(STATE_DIM, dtype=np.float32), "pick up the black bowl")


def checked(checks: dict[str, Callable[[], Check]]) -> list[Check]:
    return [guarded(name, check) for name, check in shown(checks.items(), "checks", len(checks))]


def cheap_checks(policy: str, device_name: str, output: Path) -> list[Check]:
    return checked(
        {
            "Python": python_version,
            "PyTorch": torch_version,
            "device": lambda: device(device_name),
            **{package: partial(pinned, package) for package in PINNED},
            "OpenGL": gl_library,
            "disk": lambda: disk(output),
            **({} if is_elsewhere(policy) else {"checkpoint files": lambda: checkpoint_files(policy)}),
        }
    )


def is_elsewhere(policy: str) -> bool:
    """Whether it is no checkpoint of this package's or OpenVLA's."""
    config = EvalConfig(policy=policy)
    return config.served or config.custom


def reach(config: EvalConfig) -> Check:
    """The class of one's own can be used, the server answers, LeRobot's environment loads its policy."""
    choice = foreign.choice(config)
    assert choice is not None
    foreign.identity(replace(config, decode=choice.decode))
    if config.custom:
        foreign.custom(config)
    return Check("policy", "ok", f"{config.policy} {choice}")


def preflight(config: EvalConfig) -> None:
    """The cheap checks before an evaluation; raises RsdError naming every red one and what to do."""
    checks = cheap_checks(config.policy, config.device, config.output_dir)
    bad = [check for check in checks if check.status == "fail"]
    if bad:
        lines = "; ".join(f"{check.name}: {check.found}{f' ({check.remedy})' if check.remedy else ''}" for check in bad)
        raise RsdError(f"{lines}; `rsd doctor` checks everything")


def diagnose(config: DoctorConfig) -> tuple[list[Check], RsdPolicy | None]:
    """All checks, and the policy if it loads."""
    loaded: list[RsdPolicy] = []
    policy = partial(load_and_predict, config.policy, config.device, loaded)
    if is_elsewhere(config.policy):
        policy = partial(reach, EvalConfig(policy=config.policy, device=config.device))
    checks = cheap_checks(config.policy, config.device, config.output)
    checks += checked({"LIBERO": libero_assets, "rendering": render_frame, "policy": policy})
    for one in loaded:
        skipping = partial(calibrated, config.policy)
        checks += checked({"validation": partial(accuracy, one), "skip calibration": skipping})
    return checks, loaded[0] if loaded else None


def calibrated(name: str) -> Check:
    """Whether `rsd-skip` can be used: its threshold has to be of these very weights."""
    from rsd.checkpoint import load_calibration, locate_checkpoint, read_content, schedule_of
    from rsd.decoding.calibration import FILE_NAME

    directory = locate_checkpoint(name)
    if not (directory / FILE_NAME).is_file() and (schedule := schedule_of(read_content(directory))):
        return Check("skip calibration", "ok", f"a plain schedule: {schedule}")
    if not (directory / FILE_NAME).is_file():
        return Check("skip calibration", "warn", "none: rsd-skip is not available", "rsd calibrate makes one")
    found = load_calibration(directory)
    made = f"{found.episodes} rollouts, {found.suites}, acceptance {found.acceptance}"
    return Check("skip calibration", "ok", f"threshold {found.threshold:.1f} mm: {found.words}; {made}")


def flow(policy: RsdPolicy) -> list[tuple[str, str]]:
    """(what, its shape or value) of everything between an observation and its chunk, for one blank observation."""
    import torch

    from rsd.decoding.decoders import DECODERS
    from rsd.decoding.state import EpisodeState

    observation, core = blank(policy.image_size, 128), policy.core
    with torch.inference_mode():
        seen = core.body([observation])
        prefix = core.ops.embed(seen)
        (hidden,) = core.ops.prefill(prefix, False).features
        result = DECODERS[policy.decode].decode(core.ops, seen, EpisodeState())
    rows = [
        ("observation.images", f"{observation.images.dtype} {list(observation.images.shape)}, {' and '.join(CAMERAS)}"),
        ("observation.state", f"{observation.state.dtype} {list(observation.state.shape)}"),
        ("observation.instruction", repr(observation.instruction)),
        ("images to the model", f"{list(seen.images.shape)}"),
        ("state features", f"{list(seen.state.shape)}"),
        ("prefix (vision, language, state)", f"{list(prefix.shape)}"),
        ("hidden states of the first block", f"{list(hidden.shape)}"),
    ]
    drafted = vars(result.draft) | vars(result.forecast or result.draft) if result.draft else {}
    parts = {**vars(result), **{name: value for name, value in drafted.items() if name != "prefixes"}}
    parts |= dict.fromkeys(("draft", "forecast", "memory"))
    for name, value in parts.items():
        if isinstance(value, torch.Tensor):
            rows.append((f"decoded.{name}", f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"))
        elif value is not None and value != []:
            rows.append((f"decoded.{name}", str(value)))
    chunk = alone(policy, observation)
    stats = policy.verify() or chunk.stats
    rows.append(("actions", f"{chunk.actions.dtype} {list(chunk.actions.shape)}"))
    rows += [(f"stats.{name}", statistic(value)) for name, value in vars(stats).items()]
    return rows


def statistic(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {number:.1f}" for name, number in value.items())
    return str(value)


def run_doctor(config: DoctorConfig) -> int:
    """Print the findings; returns the exit status."""
    from rich.markup import escape

    console = terminal(highlight=False, soft_wrap=True)
    checks, policy = diagnose(config)
    width = max(len(check.name) for check in checks)
    marks = {"ok": "[green]ok  [/green]", "warn": "[yellow]note[/yellow]", "fail": "[red]RED [/red]"}
    for check in checks:
        console.print(f"{marks[check.status]}  {check.name.ljust(width)}  {escape(check.found)}")
        if check.remedy:
            console.print(f"      {' ' * width}  -> {escape(check.remedy)}")
    if config.verbose and policy is not None:
        console.print("\n[bold]one blank observation through the policy[/bold]")
        rows = flow(policy)
        width = max(len(name) for name, _ in rows)
        for name, value in rows:
            console.print(f"  {name.ljust(width)}  {escape(value)}")
    bad = sum(check.status == "fail" for check in checks)
    console.print(f"\n{f'{bad} red' if bad else 'all is well'}: {len(checks)} checks")
    return 1 if bad else 0
