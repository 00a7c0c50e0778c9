"""Where a run asks a policy for what neither its training data nor its calibration holds; read from its own records."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from rsd.conventions import CONTROL_HZ
from rsd.evaluation.config import EvalConfig, planned_tasks
from rsd.json_files import section
from rsd.sim.suites import suite_tasks
from rsd.types import MEMORY_CHUNKS


def cautions(config: EvalConfig, suites: bool = True) -> list[str]:
    """One sentence each, none where all is as it was trained and calibrated; none of a policy that is served or
    the user's own, or of a published OpenVLA checkpoint, whose statistics have to name the suite anyway. suites: also
    about those of the run."""
    from rsd.checkpoint import CONFIG_FILE, gate_memory, gate_of, locate_checkpoint, long_memory
    from rsd.targets.openvla.published import locate_openvla

    if config.drafter and config.served:
        from rsd.targets.drafter_files import nameless

        return nameless(config.drafter, config.policy)
    if config.served or config.custom or config.drafter or locate_openvla(config.policy) is not None:
        return []
    directory = locate_checkpoint(config.policy)
    content = json.loads((directory / CONFIG_FILE).read_text())
    # read once: the weights are hashed for it
    gate = gate_of(directory) if config.decode == "rsd-skip" and config.skip_threshold_mm is None else {}
    found = [*unseen_tasks(config, content), *unpromised_suites(config, gate)] if suites else []
    found += odd_sizes(content)
    if config.decode == "rsd-skip":
        found += long_memory(content, gate_memory(gate) if gate else config.memory_chunks or MEMORY_CHUNKS)
    if config.control_hz not in (0.0, CONTROL_HZ):
        taught = f"it was taught at {CONTROL_HZ:g} actions a second"
        found.append(f"--control-hz {config.control_hz:g}: {taught}, which is LIBERO's rate")
    return [f"{config.policy}: {caution}" for caution in found]


def trained_on(content: dict[str, Any]) -> tuple[set[str], set[str], set[int]]:
    """config.json of a checkpoint -> suites, instructions and image sizes (pixels) of its training data.

    Each is empty where the data does not say; suites are those of a record that names one for every source."""
    data = section(content, "provenance", "data")
    sources = data.get("sources")
    sources = sources if isinstance(sources, list) else []
    suites = {str(section(source, "settings").get("suite", "")) for source in sources}
    sizes = {section(source, "rendering").get("image_size") for source in sources}
    told = data.get("instructions")
    instructions = {str(text) for text in told} if isinstance(told, list) else set()
    return set() if "" in suites else suites, instructions, {size for size in sizes if isinstance(size, int)}


def unseen_tasks(config: EvalConfig, content: dict[str, Any]) -> Iterable[str]:
    suites, instructions, _ = trained_on(content)
    planned = planned_tasks(config.tasks)
    for suite in config.suites:
        if suites and suite not in suites:
            yield f"trained on {', '.join(sorted(suites))}, not on {suite}; expect it to fail there"
            continue
        wanted = planned.get(suite, planned.get(""))
        tasks = [(t.task_id, t.language) for t in suite_tasks(suite) if wanted is None or t.task_id in wanted]
        unseen = [task for task, text in tasks if instructions and text not in instructions]
        if unseen:
            listed = ", ".join(map(str, unseen))
            which = f"task {listed}" if len(unseen) == 1 else f"tasks {listed}"
            known = [str(task) for task, text in tasks if text in instructions]
            remedy = f"; --tasks {','.join(known)} leaves out what it was not taught" if known else ""
            yield f"its training data holds no demonstration of {which} of {suite}{remedy}"


def odd_sizes(content: dict[str, Any]) -> Iterable[str]:
    """The simulator draws as large as the policy looks, so that is to be what it was trained on."""
    size, trained = section(section(content, "policy"), "target").get("image_size"), trained_on(content)[2]
    if size is not None and trained and size not in trained:
        yield f"looks at images of {size} pixels, trained on {', '.join(map(str, sorted(trained)))}"


def unpromised_suites(config: EvalConfig, gate: dict[str, Any]) -> Iterable[str]:
    """Where `rsd-skip` goes by a calibration of other suites; gate: see `gate_of`, empty where it does not."""
    made = gate.get("skip_calibration")
    calibrated = made["suites"].split(",") if made else config.suites  # a schedule promises nothing anywhere
    if beyond := [suite for suite in config.suites if suite not in calibrated]:
        found = f"calibrated for {', '.join(calibrated)}, not for {', '.join(beyond)}, where it promises nothing"
        yield f"rsd-skip: {found}; --audit tells the risk there, `rsd calibrate` makes a promise"
