"""What an evaluation runs on: where the tasks, the simulator and the policy come from."""

from __future__ import annotations

import gc
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rsd.devices import cpu_model
from rsd.evaluation import foreign
from rsd.evaluation.cautions import cautions
from rsd.evaluation.config import OF_THE_RULE, EvalConfig, asked_rule
from rsd.evaluation.doctor import blank, preflight
from rsd.json_files import section
from rsd.sim.motion import check_task
from rsd.sim.suites import init_states, load_libero, suite_tasks
from rsd.types import BEST, CUDA_GRAPHS, DRAFTER_ONLY, ONNX, ONNX_INT8, RSD_ASYNC, ChunkPolicy, Policy, RsdError

if TYPE_CHECKING:
    from rsd.evaluation.rollout import Environment
    from rsd.options import Checkpoint, Choice, DecodeOptions


def libero_init_states(suite: str, task_id: int) -> int:
    return len(init_states(suite, task_id))


def libero_env(suite: str, task_id: int, image_size: int) -> Environment:
    from rsd.sim.failures import WatchedLibero

    return WatchedLibero(suite, task_id, image_size=image_size)


def import_simulator() -> None:
    """robosuite has garbage collected with every environment that closes: 0.2 s, if imports are looked at."""
    load_libero()
    gc.freeze()


def prepare_libero(suite: str, task_id: int) -> None:
    """Imports, compiles and draws; the process keeps the scene and its drawing context (`rsd.sim.scenes`)."""
    import_simulator()
    libero_env(suite, task_id, 64).close()


def worker_policy(config: EvalConfig) -> Policy:
    """On as many threads as the run's options say."""
    import torch

    torch.set_num_threads(config.threads)
    import_simulator()
    return rsd_policy(config)


def rsd_policy(config: EvalConfig) -> Policy:
    """A checkpoint of this package or in OpenVLA's format, a class of one's own, or what a port serves; its drafter."""
    if config.drafter:
        return speculating_policy(config)
    if config.custom:
        return foreign.custom(config)
    if config.served:
        return foreign.served(config)
    from rsd.options import RuntimeOptions
    from rsd.policy import RsdPolicy, load_policy
    from rsd.targets.openvla.published import locate_openvla

    if (openvla := locate_openvla(config.policy)) is not None:
        if config.temperature:
            found = f"--temperature {config.temperature:g}: {config.policy} in OpenVLA's format"
            raise RsdError(f"{found} takes the likeliest tokens, as published; leave --temperature out")
        from rsd.targets.openvla.policy import OpenVlaPolicy

        graphs = engine_of(config, None) == CUDA_GRAPHS
        options: dict[str, Any] = {"suite": config.task_suite, "graphs": graphs, "execute": config.execute}
        return OpenVlaPolicy.from_pretrained(openvla, device=config.device, decode=config.decode, **options)
    policy = RsdPolicy(load_policy(config.policy, decode_options(config), RuntimeOptions(config.device, config.engine)))
    if config.corrector:
        from rsd.checkpoint import weights_hash
        from rsd.targets.corrector import CorrectedPolicy

        return CorrectedPolicy(policy, Path(config.corrector), weights_hash(config.policy))
    return policy


def speculating_policy(config: EvalConfig) -> Policy:
    """The target, whatever it is, with the drafter that was distilled for it."""
    from rsd.targets.black_box import SpeculatingPolicy, load_drafter
    from rsd.targets.drafter_files import check_belongs

    drafter = load_drafter(Path(config.drafter), config.device)
    target = settle(foreign.alone(config))[0]
    check_belongs(drafter.stored, describe_checkpoint(target), config.drafter)
    skip = drafter.skip_rule(*(getattr(config, name) for name in foreign.OF_THE_GATE))
    policy = rsd_policy(target) if config.decode != DRAFTER_ONLY else None
    steps = foreign.steps_left(config, policy) if config.decode == foreign.FUSED else 0
    return SpeculatingPolicy(drafter, policy, skip, config.decode, audit=config.audit, steps=steps)


def decode_options(config: EvalConfig) -> DecodeOptions:
    """How to decode, as a policy takes it."""
    from rsd.decoding.gate import SkipRule
    from rsd.options import DecodeOptions

    skip = None
    if config.skip_threshold_mm is not None:
        given = {name: value for name in OF_THE_RULE if (value := getattr(config, name)) is not None}
        skip = SkipRule(config.skip_threshold_mm, **given)
    return DecodeOptions(
        config.decode,
        asked_rule(config.acceptance),
        temperature=config.temperature,
        skip=skip,
        target_at_reset=config.target_at_reset,
        audit=config.audit,
        execute=config.execute,
    )


def stored(config: EvalConfig) -> tuple[Path, dict[str, Any], Checkpoint | None]:
    """Where the weights lie, config.json, and what of it decides; {} and None of a directory in OpenVLA's format."""
    from rsd.checkpoint import facts_of, locate_checkpoint, read_content
    from rsd.targets.openvla.published import locate_openvla

    if (openvla := locate_openvla(config.policy)) is not None:
        return openvla, {}, None
    directory = locate_checkpoint(config.policy)
    content = read_content(directory)
    return directory, content, facts_of(directory, content)


def best_of_checkpoint(config: EvalConfig) -> Choice:
    """A directory in OpenVLA's format has one decoder, its own, and so has a served policy; of the others see
    `rsd.options.best_decode`."""
    from rsd.options import Choice, best_decode
    from rsd.targets.openvla.published import Settings

    if (found := foreign.choice(config)) is not None:
        return found
    directory, _, facts = stored(config)
    if facts is not None:
        return best_decode(facts, decode_options(config))
    settings = Settings.load(directory).resolve(directory)
    return Choice(str(settings.decode), "what this OpenVLA checkpoint was trained for")


def batched_rsd_policy(config: EvalConfig) -> ChunkPolicy:
    import torch

    from rsd.options import RuntimeOptions
    from rsd.policy import load_policy
    from rsd.targets.openvla.published import locate_openvla

    torch.set_num_threads(config.threads)
    policy = None
    if config.custom or config.served or config.drafter:
        raise RsdError(f"--batch {config.batch}: {config.policy} takes one observation at a time; leave --batch out")
    if locate_openvla(config.policy) is None:
        runtime = RuntimeOptions(config.device, config.engine, max(2, config.batch))
        policy = load_policy(config.policy, decode_options(config), runtime)
    if policy is None or not policy.body.compact:
        found = f"{config.policy} in OpenVLA's format or on OpenVLA takes one observation at a time"
        raise RsdError(f"--batch {config.batch}: {found}; leave --batch out")
    policy.predict([blank(policy.image_size, 0)])  # records what it needs while the simulators still make ready
    return policy


def libero_versions(device: str) -> dict[str, str]:
    import torch

    from rsd.sim.libero import simulator_versions

    return {
        "torch": str(torch.__version__),  # whose own class would bring torch to every simulator that is told it
        **simulator_versions(),
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
        "platform": platform.platform(),
        "cpu": cpu_model(),
        "cpu_cores": str(available_cores()),
    }


def available_cores() -> int:
    """Cores this process may use, which in a container are often fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe_checkpoint(config: EvalConfig) -> dict[str, Any]:
    """What names the weights beyond doubt, with their provenance; of a served policy also what it runs on."""
    from rsd.manifest import MANIFEST_FILE, file_sha256

    if config.drafter:
        from rsd.targets.drafter_files import check_belongs, read_drafter

        target = describe_checkpoint(settle(foreign.alone(config))[0])
        check_belongs(drafter := read_drafter(Path(config.drafter)), target, config.drafter)
        sha256 = file_sha256(Path(config.drafter, MANIFEST_FILE))
        gate = {"epsilon_mm": drafter.epsilon_mm, "delta": getattr(drafter.calibration, "delta", None)}
        return {**target, "drafter": config.drafter, "drafter_sha256": sha256, "drafter_gate": gate}
    if (found := foreign.identity(config)) is not None:
        return found
    from rsd.checkpoint import checkpoint_hash, gate_of
    from rsd.options import executed_steps, resolve
    from rsd.targets.openvla.published import fingerprint

    directory, content, facts = stored(config)
    known: dict[str, Any] = {"policy": config.policy, "engine": engine_of(config, facts)}
    if facts is None:
        steps = executed_steps(config.execute, openvla_chunk(config, directory), "--execute")
        return known | {"execute": steps, "checkpoint_fingerprint": fingerprint(directory)}
    known |= {
        "execute": resolve(facts, decode_options(config)).execute,
        "checkpoint_sha256": checkpoint_hash(config.policy),
        "provenance": content.get("provenance", {}),
    }
    if config.corrector:
        from rsd.targets.corrector import read_corrector

        read_corrector(Path(config.corrector), content["sha256"]["model.safetensors"])
        known["corrector_sha256"] = file_sha256(Path(config.corrector, MANIFEST_FILE))
    if config.decode == "rsd-skip" and config.skip_threshold_mm is None:
        known |= gate_of(directory)
    return known


def openvla_chunk(config: EvalConfig, directory: Path) -> int:
    """Steps that a published OpenVLA predicts at once."""
    from rsd.targets.openvla.published import Settings

    stored = Settings.load(directory)
    settings = replace(stored, decode=config.decode, unnorm_key=stored.unnorm_key or config.task_suite)
    return settings.resolve(directory).chunk or 1


def ready(config: EvalConfig) -> None:
    """The cheap checks, and what every worker would find out: options that this checkpoint cannot do, late answers of
    a policy that has no tail to go on with."""
    preflight(config)
    for suite in config.suites if config.motion != "none" else ():
        for task in config.task_ids(suite, [number for number, *_ in suite_tasks(suite)]):
            check_task(config.motion, suite, task)  # which has to be able to slide
    if config.lerobot:  # one process for all workers
        foreign.address(foreign.alone(config) if config.drafter else config)
    if config.drafter and config.served and config.decode == foreign.FUSED:
        remote = foreign.served(settle(foreign.alone(config))[0])
        remote.close()
        foreign.steps_left(config, remote)
    if config.drafter or config.corrector:  # damaged, or another's
        describe_checkpoint(config)
    if config.served or foreign.is_foreign(config):  # its first chunk shows it
        return
    from rsd.options import resolve

    directory, content, facts = stored(config)
    if config.corrector and facts is None:
        raise RsdError(f"--corrector: expected a checkpoint of a compact policy, found {config.policy} on OpenVLA")
    engine_of(config, facts)
    if (told := config.meanwhile == "rtc") and not section(content, "policy", "target").get("committed"):
        expected = "a compact checkpoint, trained with --policy.target.committed --loss.committed 0.5"
        raise RsdError(f"--meanwhile rtc: expected {expected}, found {config.policy}")
    late = max(config.delay, config.drafter_delay)
    if not late or (config.meanwhile in (None, "hold") and config.decode != RSD_ASYNC):
        return
    horizon = facts.horizon if facts else openvla_chunk(config, directory)
    if told and facts:
        execute = resolve(facts, decode_options(config)).execute
        if late > horizon - execute:
            most = f"{horizon - execute}, what {execute} executed steps leave of a chunk of {horizon}"
            raise RsdError(f"--meanwhile rtc: expected a --delay of at most {most}, found {late}")
    if late >= horizon:
        found = f"{late}: the chunks of {config.policy} have {horizon} steps, so nothing of an answer could be used"
        raise RsdError(f"--delay, --drafter-delay: expected at most {horizon - 1}, found {found}")


def engine_of(config: EvalConfig, facts: Checkpoint | None) -> str:
    """What `--engine auto` is for this run, as the policy will choose it; with a version that torch's does not tell.

    facts: the checkpoint's; None of one in OpenVLA's format."""
    from rsd.options import resolve
    from rsd.runtime.engines import choose_engine

    compact, recordable = False, not config.device.startswith("cpu")
    if facts is not None:
        compact = facts.compact
        recordable = resolve(facts, decode_options(config)).recordable(compact, config.device)
    engine = choose_engine(config.engine, config.device, recordable, compact=compact)
    return f"{engine} {metadata.version('onnxruntime')}" if engine in (ONNX, ONNX_INT8) else engine


@dataclass(frozen=True)
class Backend:
    """Module-level functions, importable by workers; torch and simulator load when called."""

    list_tasks: Callable[[str], Sequence[tuple[int, str, str]]] = suite_tasks
    """suite -> (task number, name, instruction) of each task; RsdError for an unknown suite."""
    count_init_states: Callable[[str, int], int] = libero_init_states
    """suite, task number -> how many fixed initial states the benchmark has."""
    make_env: Callable[[str, int, int], Environment] = libero_env
    """suite, task number, image size (pixels) -> simulator."""
    make_policy: Callable[[EvalConfig], Policy] = worker_policy
    describe_policy: Callable[[EvalConfig], dict[str, Any]] = describe_checkpoint
    """What names the weights beyond doubt: a run is never continued with others."""
    versions: Callable[[str], dict[str, str]] = libero_versions
    """device -> versions of everything a result may depend on."""
    choose_decode: Callable[[EvalConfig], Choice] = best_of_checkpoint
    """What --decode best is for this policy and these options."""
    make_batch_policy: Callable[[EvalConfig], ChunkPolicy] = batched_rsd_policy
    """A policy for `--batch`; RsdError where there is none."""
    prepare: Callable[[str, int], None] = prepare_libero
    """suite, task number -> what a simulator's process can do of `make_env` while its policy still loads elsewhere."""
    preflight: Callable[[EvalConfig], None] = ready
    """Raises RsdError where something is lacking; cheap, run before anything is started."""
    cautions: Callable[[EvalConfig], list[str]] = cautions
    """What a user should know before a run that asks more of the policy than it was made for, a sentence each."""


LIBERO = Backend()


def settle(config: EvalConfig, backend: Backend = LIBERO) -> tuple[EvalConfig, str]:
    """The run with `--decode best` made a decoder, and a line on which and why; "" where it was asked for by name."""
    if config.decode != BEST:
        return config, ""
    choice = backend.choose_decode(config)
    return replace(config, decode=choice.decode), f"{config.policy} {choice}"
