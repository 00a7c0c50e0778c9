"""Runs in real worker processes on the scripted backend: resume, scheduling, failures."""

import errno
import io
import json
import math
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from scripted import SCRIPTED, episode, make_patient_batch_policy

from rsd.evaluation.config import EvalConfig, stored_config
from rsd.evaluation.episodes import Job, JobQueue, Outcome, VideoBudget, wants_video
from rsd.evaluation.evaluate import evaluate, plan_episodes, run_differences
from rsd.evaluation.pools import ProcessPool, worker_count
from rsd.evaluation.results import EPISODES_FILE, EpisodeKey, EpisodeResult, RunRecord, read_episodes
from rsd.evaluation.summary import RunSummary
from rsd.locks import exclusive
from rsd.reporting.tables import load_run
from rsd.types import RsdError

evaluation = sys.modules["rsd.evaluation.evaluate"]
Evaluate = Callable[..., RunSummary]


@pytest.fixture
def config(tmp_path: Path) -> EvalConfig:
    return EvalConfig(num_trials=3, tasks="0,2", policy="good", num_workers="1", output=str(tmp_path / "run"))


def run(config: EvalConfig, **options: Any) -> tuple[RunSummary, str]:
    console = Console(file=io.StringIO(), width=200)
    summary = evaluate(config, backend=SCRIPTED, console=console, **options)
    return summary, console.file.getvalue()  # type: ignore[attr-defined]


def outcomes(config: EvalConfig) -> dict[EpisodeKey, EpisodeResult]:
    """The episodes without what time alone decides."""
    episodes = read_episodes(config.output_dir / EPISODES_FILE)
    return {key: replace(result, wall_s=0.0, latency_ms={}) for key, result in episodes.items()}


def test_a_run_is_whole_summed_up_and_the_same_with_any_number_of_workers(config: EvalConfig, tmp_path: Path) -> None:
    summary, log = run(config)
    assert (summary.episodes, summary.errors) == (6, 0)
    assert (summary.success.successes, summary.success.n) == (6, 6)
    assert [(task.task_id, task.success.n) for task in summary.tasks] == [(0, 3), (2, 3)]
    assert summary.decoding.acceptance_per_level == pytest.approx([1.0, 0.8, 0.5])
    assert "6/6: task 2" in log
    stored = json.loads((config.output_dir / "summary.json").read_text())
    assert stored["versions"]["simulator"] == "scripted 1"
    assert stored["policy"] == {"sha256": "hash of good"}
    assert stored["config"]["num_trials"] == 3

    two = replace(config, num_workers="2", output=str(tmp_path / "two"))
    run(two)
    assert outcomes(two) == outcomes(config)


def test_workers_tidy_up_after_themselves(config: EvalConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is killed leaves semaphores behind, of which Python complains at the end of the run."""
    leave, codes = ProcessPool.__exit__, list[int | None]()

    def watched(pool: ProcessPool, *error: Any) -> None:
        leave(pool, *error)
        codes.extend(worker.handle.exitcode for worker in pool._workers)

    monkeypatch.setattr(ProcessPool, "__exit__", watched)
    run(replace(config, num_workers="2"))
    assert codes == [0, 0]


def test_ctrl_c_says_what_is_kept(config: EvalConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ProcessPool, "run", interrupted)
    console = Console(file=io.StringIO(), width=200)
    with pytest.raises(KeyboardInterrupt):
        evaluate(config, backend=SCRIPTED, console=console)
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert f"interrupted: finished episodes are kept in {config.output_dir}; the same command" in said


def test_what_a_policy_draws_hangs_on_the_episode_alone(config: EvalConfig, tmp_path: Path) -> None:
    one = replace(config, policy="draws")
    two = replace(one, num_workers="2", seed=8, output=str(tmp_path / "two"))
    again = replace(one, num_workers="2", output=str(tmp_path / "again"))
    for each in (one, two, again):
        run(each)
    assert outcomes(again) == outcomes(one)
    results = [*outcomes(one).values(), *outcomes(two).values()]
    drawn = [result.chunk_stats["expected_deviation_mm"][0] for result in results]
    assert len(set(drawn)) == len(drawn)  # another episode's are others, and so are another seed's


def test_another_temperature_is_another_run(config: EvalConfig) -> None:
    small = replace(config, num_trials=1, tasks="0", decode="rsd", temperature=0.5)
    assert small.hash != replace(small, temperature=1.0).hash != replace(small, temperature=0.0).hash
    run(small)
    assert json.loads((small.output_dir / "summary.json").read_text())["config"]["temperature"] == 0.5
    assert load_run(small.output_dir).name == "rsd (margin, temperature 0.5)"  # the scripted policy says margin
    for other in (0.0, 1.0):
        with pytest.raises(RsdError, match=rf"another run \(temperature 0.5 there, {other} here\)"):
            run(replace(small, temperature=other))


def test_other_executed_steps_are_another_run_but_for_one_before_they_were_recorded(config: EvalConfig) -> None:
    assert config.hash == replace(config, execute=None).hash != replace(config, execute=4).hash
    before, now = RunRecord({}, "", {}, {"policy": "mine"}, 1), {"policy": "mine", "execute": 8}
    assert run_differences(before, {}, now) == ""
    assert "execute 8 there, 4 here" in run_differences(replace(before, policy=now), {}, {**now, "execute": 4})


def test_a_killed_run_continues_where_it_was_cut_off(config: EvalConfig) -> None:
    run(config)
    whole = outcomes(config)
    path = config.output_dir / EPISODES_FILE
    kept = path.read_text().splitlines(keepends=True)[:2]
    path.write_text("".join(kept) + path.read_text().splitlines()[2][:50])
    summary, log = run(config)
    assert "cut off" in log
    assert "2 of 6 episodes done, 4 to go" in log
    assert path.read_text().startswith("".join(kept))
    assert outcomes(config) == whole
    assert summary.episodes == 6
    untouched = path.read_bytes()
    run(config)
    assert path.read_bytes() == untouched


def test_another_run_in_the_directory_is_kept_unless_overwritten(config: EvalConfig) -> None:
    small = replace(config, num_trials=1, tasks="0")
    run(small)
    other = replace(small, decode="ar")
    with pytest.raises(RsdError, match=r"decode 'rsd-fused' there, 'ar' here.*--output.*--overwrite"):
        run(other)
    bystander = config.output_dir / "notes.txt"
    bystander.write_text("keep me")
    summary, _ = run(other, overwrite=True)
    assert [result.decode for result in read_episodes(config.output_dir / EPISODES_FILE).values()] == ["ar"]
    assert summary.decoding.acceptance_rate is None
    assert bystander.read_text() == "keep me"


def test_a_run_has_its_folder_for_itself(config: EvalConfig) -> None:
    with exclusive(config.output_dir), pytest.raises(RsdError, match="another run is writing here"):
        run(config)
    assert not (config.output_dir / EPISODES_FILE).exists()
    run(replace(config, num_trials=1, tasks="0"))


def test_a_run_is_not_mixed_into_a_folder_of_runs_nor_into_a_run(config: EvalConfig) -> None:
    small = replace(config, num_trials=1, tasks="0")
    run(replace(small, output=f"{config.output}/ar"))
    for overwrite in (False, True):
        with pytest.raises(RsdError, match=r"is a folder of runs \(ar\): choose one of them or another --output"):
            run(small, overwrite=overwrite)
        with pytest.raises(RsdError, match="lies in a run"):
            run(replace(small, output=f"{config.output}/ar/sub"), overwrite=overwrite)
    assert [path.name for path in config.output_dir.iterdir()] == ["ar"]


def test_overwriting_deletes_no_checkpoint(config: EvalConfig) -> None:
    config.output_dir.mkdir()
    (config.output_dir / "config.json").write_text('{"format_version": 1, "policy": {}}')
    with pytest.raises(RsdError, match=r"its config.json is no run's, so nothing is deleted"):
        run(config, overwrite=True)
    assert (config.output_dir / "config.json").exists()


def test_a_fault_that_lasts_stops_the_run_which_goes_on_when_it_is_gone(config: EvalConfig, tmp_path: Path) -> None:
    """A policy that answers no more, as a dead server's: once in five episodes, not three times in each of twelve."""
    gone = tmp_path / "gone"
    many = replace(config, num_trials=6, policy=f"until:{gone}:raises")
    with pytest.raises(RsdError, match=r"the policy broke .5 times in a row, so the run stops.*without --overwrite"):
        run(many)
    assert (many.output_dir / "errors.log").read_text().count("Traceback") == 5
    two = replace(many, num_workers="2", output=f"{config.output}-two")
    with pytest.raises(RsdError, match=r"the policy broke .6 times in a row"):
        run(two)
    gone.touch()
    summary, _ = run(many)
    assert (summary.episodes, summary.errors) == (12, 0)


def test_a_disk_that_fills_up_is_a_line_and_loses_nothing(
    config: EvalConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(replace(config, output=f"{config.output}-whole"))
    synced, calls = os.fsync, [0]

    def full(file: int) -> None:
        calls[0] += 1
        if calls[0] == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        synced(file)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(RsdError, match=r"episodes.jsonl: cannot be written .No space left on device.; .*make room"):
            run(config)
    assert run(config)[0].errors == 0
    assert outcomes(config) == outcomes(replace(config, output=f"{config.output}-whole"))


def test_a_folder_deleted_meanwhile_is_a_line(config: EvalConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def deleting(*arguments: Any) -> None:
        shutil.rmtree(config.output_dir)
        append_episode(*arguments)

    append_episode = evaluation.append_episode
    monkeypatch.setattr(evaluation, "append_episode", deleting)
    with pytest.raises(RsdError, match=r"cannot be written .No such file or directory.; .*not there, or not any more"):
        run(config)


@pytest.mark.parametrize(
    "options",
    [
        {"num_trials": 100_000_000},
        {"init_states": "0-99999999999"},
        {"init_states": "0,0"},
        {"init_states": "2-4,3"},
        {"init_states": "1" * 5000},
        {"tasks": "1" * 5000},
        {"shard": "0/" + "1" * 5000},
    ],
)
def test_a_huge_plan_is_refused_before_it_is_made(config: EvalConfig, options: dict[str, Any]) -> None:
    start = time.process_time()
    with pytest.raises(RsdError, match="expected"):
        replace(config, **options)
    assert time.process_time() - start < 1.0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["episode_timeout", "batch_wait_ms", "temperature", "control_hz", "skip_threshold_mm"])
def test_numbers_that_are_not_finite_are_refused(config: EvalConfig, name: str, value: float) -> None:
    with pytest.raises(RsdError, match=f"{name}: expected a number .*found {value}"):
        replace(config, decode="rsd-skip", **{name: value})


def test_a_changed_checkpoint_is_not_mixed_in(config: EvalConfig) -> None:
    small = replace(config, num_trials=2, tasks="0")
    run(small)
    path = small.output_dir / EPISODES_FILE
    path.write_text(path.read_text().splitlines(keepends=True)[0])
    record = small.output_dir / "config.json"
    record.write_text(record.read_text().replace("hash of good", "hash of yesterday"))
    with pytest.raises(RsdError, match="sha256 'hash of yesterday' there, 'hash of good' here"):
        run(small)
    assert len(read_episodes(path)) == 1


@pytest.mark.parametrize(("behaviour", "reason"), [("raises", "the policy broke"), ("dies", "exit code 3")])
def test_an_error_is_no_failure_of_the_policy_and_is_run_again(config: EvalConfig, behaviour: str, reason: str) -> None:
    broken = replace(config, policy=f"{behaviour}:0.1", tasks="0", num_trials=2)
    summary, log = run(broken)
    assert (summary.episodes, summary.errors, summary.success.n, summary.success.successes) == (2, 1, 1, 1)
    assert log.count("begun anew") == 2
    assert (broken.output_dir / "errors.log").read_text().count(reason) >= 3
    (error,) = (e for e in outcomes(broken).values() if e.is_error)
    assert error.attempts == 3
    assert reason in error.failure
    lines = len((broken.output_dir / EPISODES_FILE).read_text().splitlines())
    if behaviour == "raises":  # the next invocation tries it again, and a try that errs again counts for nothing
        summary, _ = run(broken)
        assert len((broken.output_dir / EPISODES_FILE).read_text().splitlines()) == lines + 1
        assert (summary.episodes, summary.errors) == (2, 1)


@pytest.mark.parametrize("behaviour", ["dies", "hangs"])
def test_what_went_wrong_once_leaves_no_trace_in_the_result(
    config: EvalConfig, tmp_path: Path, behaviour: str
) -> None:
    good = replace(config, tasks="0", num_trials=2, output=str(tmp_path / "good"))
    run(good)
    flaky = replace(good, policy=f"once:{tmp_path}/marker:{behaviour}:0.1", output=str(tmp_path / "flaky"))
    flaky = replace(flaky, episode_timeout=4.0)
    summary, log = run(flaky)
    assert summary.errors == 0
    assert log.count("begun anew") == 1
    assert ("hung: nothing for 4 s" in log) == (behaviour == "hangs")
    again = outcomes(flaky)
    assert again.pop(("libero_spatial", 0, 1)).attempts == 2
    assert again == {key: value for key, value in outcomes(good).items() if key in again}


def test_a_policy_in_a_process_of_its_own_gives_the_same_episodes(config: EvalConfig, tmp_path: Path) -> None:
    run(config)
    batched = replace(config, batch=2, num_workers="2", output=str(tmp_path / "batched"))
    assert batched.hash != config.hash
    summary, _ = run(batched)
    assert summary.errors == 0
    assert summary.versions["simulator"] == "scripted 1"
    together = outcomes(batched)
    assert {key: replace(episode, chunk_stats={}) for key, episode in together.items()} == outcomes(config)
    for one in together.values():  # the scripted memory counts an episode's chunks: none is mixed with another's
        assert one.chunk_stats["expected_deviation_mm"] == list(range(1, one.chunks + 1))
    latencies = [e.latency_ms for e in read_episodes(batched.output_dir / EPISODES_FILE).values()]
    assert all(set(found) == {"queue", "total", "prefill"} for found in latencies)


def test_the_death_of_the_policys_process_is_survived(config: EvalConfig, tmp_path: Path) -> None:
    flaky = replace(config, batch=1, tasks="0", policy=f"once:{tmp_path}/marker:dies:0.2")
    summary, log = run(flaky)
    assert (summary.episodes, summary.errors) == (3, 0)
    assert "begun anew" in log


def test_a_policy_that_the_policys_process_cannot_load_stops_the_run(config: EvalConfig) -> None:
    with pytest.raises(RsdError, match="expected a checkpoint directory"):
        run(replace(config, policy="missing", batch=4, num_workers="2"))
    assert multiprocessing.active_children() == []


def test_simulators_prepare_themselves_while_the_policy_of_another_process_loads(
    config: EvalConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = tmp_path / "prepared"
    prepared.mkdir()
    monkeypatch.setenv("SCRIPTED_PREPARED", str(prepared))
    backend = replace(SCRIPTED, make_batch_policy=make_patient_batch_policy)
    batched = replace(config, tasks="2,0", batch=2, num_workers="2")
    assert evaluate(batched, backend=backend, console=Console(file=io.StringIO())).errors == 0
    assert [path.name.split()[:2] for path in prepared.iterdir()] == [["libero_spatial", "2"]] * 2
    # a policy in the simulator's own process comes first: there is nothing to wait for
    run(replace(config, output=str(tmp_path / "alone")))
    assert len(list(prepared.iterdir())) == 2


def test_a_simulator_whose_policy_is_elsewhere_does_without_torch() -> None:
    modules = "evaluation.workers", "evaluation.batching", "evaluation.rollout", "evaluation.video", "sim.libero"
    code = f"import sys, {', '.join('rsd.' + name for name in modules)}; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def test_several_suites_make_one_run(config: EvalConfig) -> None:
    both = replace(config, task_suite="libero_spatial, libero_goal", tasks="0", num_trials=2)
    summary, _ = run(both)
    assert [(task.suite, task.success.n) for task in summary.tasks] == [("libero_goal", 2), ("libero_spatial", 2)]
    (directory,) = {replace(both, decode="ar", output="").output_dir.name.split("-ar-")[0]}
    assert directory == "libero_spatial+libero_goal"


def test_shards_cover_the_plan_once(config: EvalConfig) -> None:
    whole = plan_episodes(replace(config, tasks="all"), SCRIPTED)
    shards = [plan_episodes(replace(config, tasks="all", shard=f"{i}/4"), SCRIPTED) for i in range(4)]
    assert sorted(map(str, whole)) == sorted(str(job) for shard in shards for job in shard)
    with pytest.raises(RsdError, match=r"--shard '4/4': expected i/n"):
        replace(config, shard="4/4")


@pytest.mark.parametrize(("videos", "expected"), [("all", 2), ("failures", 1)])
def test_videos_follow_their_condition_and_never_exceed_their_number(
    config: EvalConfig, videos: Literal["failures", "all"], expected: int
) -> None:
    # From state 3, task 5 alone takes longer than the step limit.
    filmed = replace(config, num_trials=1, init_states="3", tasks="0,1,4,5", videos=videos, max_videos=2)
    filmed = replace(filmed, num_workers="2")
    summary, _ = run(filmed)
    assert (summary.errors, summary.success.successes) == (0, 3)
    names = [path.name for path in (filmed.output_dir / "videos").iterdir()]
    assert len(names) == expected
    assert sum(name.endswith("_failure.mp4") for name in names) == 1  # of the last task: in the place of a success


def test_failures_are_filmed_in_the_place_of_successes(tmp_path: Path) -> None:
    (tmp_path / "old_success.mp4").touch()
    budget = VideoBudget("all", 1, tmp_path)
    jobs = [budget.allot(Job("suite", task, "", "", 0)) for task in range(4)]
    assert [job.video for job in jobs] == ["all", "instead", "", ""]  # one place is free, one could be made free

    def end(job: Job, success: bool) -> None:
        wanted = wants_video(job.video, episode(success=success, failure="" if success else "step limit"))
        video = tmp_path / f"{job.task_id}_{'success' if success else 'failure'}.mp4"
        if wanted:
            video.touch()
        result = episode(job.task_id, success=success, failure="" if success else "step limit")
        budget.settle(Outcome(job, result, video=video if wanted else None))

    end(jobs[0], success=True)
    end(jobs[1], success=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0_success.mp4", "1_failure.mp4"]
    again = budget.allot(jobs[2])
    assert again.video == "instead"
    end(again, success=True)  # nothing to film, so the place is given back
    last = budget.allot(jobs[3])
    end(last, success=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1_failure.mp4", "3_failure.mp4"]
    assert budget.allot(jobs[0]).video == ""  # no failure gives way to another


@pytest.mark.parametrize(("condition", "left"), [("none", 3), ("all", 0), ("failures", 0)])
def test_where_no_video_is_wanted_or_left_none_is_made(condition: str, left: int, tmp_path: Path) -> None:
    assert VideoBudget(condition, left, tmp_path).allot(Job("suite", 0, "", "", 0)).video == ""


def test_a_policy_that_cannot_be_loaded_stops_the_run(config: EvalConfig) -> None:
    with pytest.raises(RsdError, match="expected a checkpoint directory"):
        run(replace(config, policy="missing"))
    assert not (config.output_dir / EPISODES_FILE).exists()


def test_plans_name_what_does_not_exist(config: EvalConfig) -> None:
    assert len(plan_episodes(replace(config, tasks="all"), SCRIPTED)) == 18
    assert [job.init_state for job in plan_episodes(replace(config, tasks="1", init_states="7"), SCRIPTED)] == [
        7,
        8,
        9,
    ]
    with pytest.raises(RsdError, match="has tasks 0 to 5"):
        plan_episodes(replace(config, tasks="0,6"), SCRIPTED)
    with pytest.raises(RsdError, match="has 10 initial states"):
        plan_episodes(replace(config, init_states="8"), SCRIPTED)


def test_tasks_may_be_named_suite_by_suite(config: EvalConfig) -> None:
    three = replace(config, task_suite="libero_spatial,libero_goal,libero_10", num_trials=1)
    plan = plan_episodes(replace(three, tasks="libero_goal: 1,4;libero_10:5"), SCRIPTED)
    found = {suite: [job.task_id for job in plan if job.suite == suite] for suite in three.suites}
    assert found == {"libero_spatial": [0, 1, 2, 3, 4, 5], "libero_goal": [1, 4], "libero_10": [5]}
    with pytest.raises(RsdError, match="expected --tasks of the suites in --task-suite, found libero_90"):
        replace(three, tasks="libero_90:1")
    for odd in ("1;2", "libero_goal:1;libero_goal:2", "libero_goal:", "libero_goal:x", "0,", "", "\u0663"):
        with pytest.raises(RsdError, match="expected all, numbers such as 0,3 or 0-4, or suite by suite"):
            replace(three, tasks=odd)


def test_initial_states_are_a_first_one_or_a_list(config: EvalConfig) -> None:
    plan = plan_episodes(replace(config, tasks="0,1", init_states="7, 2-4", num_trials=50), SCRIPTED)
    assert [(job.task_id, job.init_state) for job in plan] == [(t, s) for s in (7, 2, 3, 4) for t in (0, 1)]
    assert replace(config, init_states="7,2-4", num_trials=2).states == [7, 2]
    assert replace(config, init_states="5-5", num_trials=50).states == [5]
    with pytest.raises(RsdError, match=r"--init-states 3,8-12: task 0 .* has 10 initial states, 0 to 9"):
        plan_episodes(replace(config, init_states="3,8-12", num_trials=50), SCRIPTED)
    for odd in ("x", "3,,4", "9-3", "-1", "1-", ""):
        with pytest.raises(RsdError, match="expected numbers and ranges such as 0,3,10-19"):
            replace(config, init_states=odd)
    assert EvalConfig(init_states="4").hash != EvalConfig(init_states="4-53").hash


def test_a_new_option_changes_no_runs_hash() -> None:
    skips = EvalConfig(decode="rsd-skip")
    assert EvalConfig().hash[:16] == "8e4c8b80ab20fe89"
    assert skips.hash[:16] == "e28c81777aec765d"
    assert EvalConfig(init_states="3,8", delay=2, meanwhile="tail", view="light").hash[:16] == "2618dfe51f056267"
    assert replace(skips, target_at_reset=False).hash[:16] == "1a24a952f14b3bb0"
    assert EvalConfig(target_at_reset=False).hash == EvalConfig().hash  # only a gate can tell
    assert EvalConfig(num_workers="3", videos="all").hash == EvalConfig().hash


def test_stored_options_are_checked() -> None:
    with pytest.raises(RsdError, match="expected a --skip-threshold-mm with --max-skips, as the checkpoint has its o"):
        stored_config({**asdict(EvalConfig()), "max_skips": 4}, "there")


jobs_by_task = st.lists(st.integers(1, 6), min_size=1, max_size=8)


@given(jobs_by_task, st.integers(1, 5), st.randoms())
def test_every_job_is_taken_once_and_tasks_stay_together(counts: list[int], workers: int, random: object) -> None:
    jobs = [Job("suite", task, "", "", state) for task, count in enumerate(counts) for state in range(count)]
    queue, taken, switches = JobQueue(jobs), [], 0
    current: dict[int, tuple[str, int] | None] = dict.fromkeys(range(workers))
    while current:
        worker = random.choice(sorted(current))  # type: ignore[attr-defined]
        job = queue.take(current[worker])
        if job is None:
            del current[worker]
            continue
        switches += job.task != current[worker]
        current[worker] = job.task
        taken.append(job)
    assert sorted((job.task_id, job.init_state) for job in taken) == [(job.task_id, job.init_state) for job in jobs]
    # A worker changes its task only when that is used up: each but the last worker on a task leaves it once.
    assert switches <= len(counts) * workers
    if workers == 1:
        assert switches == len(counts)


def test_worker_count_follows_cores_and_episodes() -> None:
    assert worker_count("4", 2) == 2
    assert worker_count("3", 100) == 3
    assert worker_count("auto", 1000) >= 1
    assert worker_count("auto", 0) == 1
