import json
import re
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from rsd.cli import COMMANDS, dispatch
from rsd.cli.eval import EvalArguments, check_names, plan_runs
from rsd.cli.expert import ExpertRunConfig
from rsd.cli.parsing import UsageError, check_choice, one_line, parse
from rsd.evaluation.config import EvalConfig, planned_tasks
from rsd.models.bundle import RsdModel
from rsd.policy import RsdPolicy
from rsd.tokenizer.action_tokenizer import ActionTokenizer
from rsd.training.config import TrainOpenVlaConfig, TrainPolicyConfig
from studies.command import STUDIES, run_study
from studies.tokenizers import methods as bench_methods
from studies.tokenizers.config import METHODS


def test_help_is_quick_and_loads_no_torch() -> None:
    code = (
        "import sys; from rsd.cli import dispatch; dispatch(['--help']); "
        "sys.exit(any(name in sys.modules for name in ('torch', 'numpy', 'scipy')))"
    )
    start = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    # processor time, which other work does not stretch: 0.3 s
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - start < 3.0
    assert done.returncode == 0, done.stderr
    assert all(f"rsd {name}" in done.stdout for name in COMMANDS)


HUGE = "9" * 25
HUGE_OF_EVAL = ("--batch", "--threads", "--num-workers", "--seed", "--num-trials", "--max-videos", "--memory-chunks")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["evl"],
            "rsd: error: unknown command 'evl': expected one of eval, compare, report, ",
        ),
        (["train", "polcy"], "rsd: error: 'train polcy': expected train policy or drafter or corrector"),
        (["eval", "--num-trials", "x"], "rsd eval: error: --num-trials: expected an integer, found 'x'"),
        (["eval", "--num-trials", "0"], "rsd eval: error: --num-trials: expected an integer from 1 to 1000000, found"),
        (["eval", "--tasks", "0,x"], "rsd eval: error: --tasks: expected all, numbers such as 0,3 or 0-4, or"),
        (["eval", "--tasks", "0", "1"], "rsd eval: error: expected values behind options, lists with commas"),
        (["tokenizer", "inspect", "DIR"], "rsd tokenizer inspect: error: expected values behind options such as --tok"),
        (["inspect", "a", "b"], "rsd inspect: error: expected values behind options"),
        (["expert", "run", "--seeds", "1", "x"], "rsd expert run: error: --seeds: expected numbers and ranges such as"),
        (["expert", "run", "--seeds", "0-9999999"], "rsd expert run: error: --seeds: expected at most 1000000 numbers"),
        (["calibrate", "--tasks", "3-1"], "rsd calibrate: error: --tasks: expected all, numbers such as 0,3 or 0-4"),
        (
            ["eval", "--num-workers", "many"],
            "rsd eval: error: --num-workers: expected auto or a number from 1 to 4096, found 'many'",
        ),
        (["eval", "--videos", "some"], "rsd eval: error: invalid choice 'some' for argument '--videos'"),
        (["eval", "--use-speculative-decoding", "maybe"], "rsd eval: error: invalid choice 'maybe'"),
        (
            ["eval", "--trials", "3"],
            "rsd eval: error: Unrecognized options: --trials, 3; did you mean --num-trials?",
        ),
        (
            ["eval", "--compare", "--decode", "ar"],
            "rsd eval: error: --compare runs l1, the checkpoint's best and drafter-only: leave --decode",
        ),
        (["eval", "--decode", "rds"], "rsd eval: error: --decode 'rds': expected one of ar, "),
        (["eval", "--acceptance", "synthetic(0.8)"], "rsd eval: error: --acceptance 'synthetic(0.8)': makes up what"),
        (["eval", "--acceptance", "most"], "rsd eval: error: --acceptance 'most': expected exact, margin, "),
        (["eval", "--temperature", "-1"], "rsd eval: error: --temperature: expected a number that is 0 or from 0.001"),
        (["eval", "--temperature", "nan"], "rsd eval: error: --temperature: expected a number that is 0 or"),
        (["eval", "--episode-timeout", "nan"], "rsd eval: error: --episode-timeout: expected a number from 0.1 to"),
        (["eval", "--batch-wait-ms", "inf"], "rsd eval: error: --batch-wait-ms: expected a number from 0 to 60000, fo"),
        (["calibrate", "--epsilon-mm", "nan"], "rsd calibrate: error: --epsilon-mm: expected a number above 0, at mos"),
        (
            ["demos", "collect", "--out", "x", "--noise.max-level", "nan"],
            "rsd demos collect: error: --noise.max-level: expected a number from 0",
        ),
        (["train", "policy", "--loop.learning-rate", "inf"], "rsd train policy: error: --loop.learning-rate: expected"),
        (["train", "drafter", "--loss.blind", "nan"], "rsd train drafter: error: --loss.blind: expected a number from"),
        (["demos", "render", "--source", "x", "--num-workers", "0"], "rsd demos render: error: --num-workers: expec"),
        (["demos", "collect", "--out", "x", "--seed", "-1"], "rsd demos collect: error: --seed: expected an int"),
        (["demos", "collect", "--out", "x", "--tasks", "0", "0"], "rsd demos collect: error: --tasks: expected ea"),
        (["demos", "collect", "--out", "x", "--tasks", "0,a"], "rsd demos collect: error: --tasks: expected numbe"),
        (["eval", "--output", "checkpoints/libero/x"], "rsd eval: error: --output checkpoints/libero"),
        (["serve", "--policy", "x", "--host", "x" * 300], "rsd serve: error: cannot listen at xxx"),
        (["tokenizer", "fit", "--tokenizer.rho", "nan"], "rsd tokenizer fit: error: --tokenizer.rho: expected a numbe"),
        (["eval", "--num-trials", "100000000"], "rsd eval: error: --num-trials: expected an integer from 1 to 1000000"),
        (["eval", "--init-states", "0-99999999999"], "rsd eval: error: --init-states: expected at most 1000000"),
        (["eval", "--init-states", "9" * 5000], "rsd eval: error: --init-states: expected numbers and"),
        (["eval", "--tasks", "9" * 5000], "rsd eval: error: --tasks: expected all, numbers"),
        (["calibrate", "--num-trials", "1000000000"], "rsd calibrate: error: --num-trials: expected an integer from 1"),
        (
            ["eval", "--temperature", "1", "--decode", "l1"],
            "rsd eval: error: --temperature 1: expected decode ar, parallel, rsd, rsd-fused, found 'l1'",
        ),
        (["eval", "--temperature", "1", "--acceptance", "margin"], "rsd eval: error: --temperature 1: expected accept"),
        (["eval", "--temperature", "1", "--compare"], "rsd eval: error: --temperature 1: expected decode ar, parallel"),
        (["eval", "--device", "abacus"], "rsd eval: error: --device 'abacus': expected cpu, cuda, or cuda with"),
        (["eval", "--device", "cuda:\u0661"], "rsd eval: error: --device 'cuda:\u0661': expected cpu, cuda, or"),
        (["eval", "--device", "meta"], "rsd eval: error: --device 'meta': expected cpu, cuda, or cuda with a number"),
        *((["eval", option, HUGE], f"rsd eval: error: {option}: expected ") for option in HUGE_OF_EVAL),
        (["eval", "--acceptance", f"distance({HUGE})"], "rsd eval: error: --acceptance 'distance(999"),
        (["eval", "--control-hz", "1e-300"], "rsd eval: error: --control-hz: expected a number that is 0 or from 0.01"),
        (["eval", "--episode-timeout", "1e-9"], "rsd eval: error: --episode-timeout: expected a number from 0.1 to"),
        (["eval", "--num-trials", "1.5"], "rsd eval: error: --num-trials: expected an integer, found '1.5'"),
        (["eval", "--num-trials", "\u0663"], "rsd eval: error: --num-trials: expected an integer, found '\u0663'"),
        (["eval", "--num-trials", "1_0"], "rsd eval: error: --num-trials: expected an integer, found '1_0'"),
        (["eval", "--max-skips", "x"], "rsd eval: error: --max-skips: expected {None}|INT, found ['x']"),
        (["eval", "--seed", "1", "--seed=2"], "rsd eval: error: --seed: expected once, found 2 times"),
        (["eval", "--task-suite", "a", "--task_suite", "b"], "rsd eval: error: --task-suite: expected once, found 2"),
        (["eval", "--tasks", "0,3,0"], "rsd eval: error: --tasks: expected each once, found 0 twice"),
        (["eval", "--task-suite", "a,b,a"], "rsd eval: error: expected --task-suite to name LIBERO suites, each once"),
        (["eval", "--engine", "compiled"], "rsd eval: error: expected --device cuda with --engine compiled, found cpu"),
        (["bench", "latency", "--engine", "cuda-graphs"], "rsd bench latency: error: expected --device cuda with"),
        (["bench", "latency", "--decode", "rsd-skip"], "rsd bench latency: error: expected --decode to be some of ar,"),
        (["train", "policy", "--loop.seed", "-1"], "rsd train policy: error: --loop.seed: expected an integer from 0"),
        (["train", "policy", "--loop.batch-size", HUGE], "rsd train policy: error: --loop.batch-size: expected an int"),
        (["train", "policy", "--remembered-chunks", "0"], "rsd train policy: error: --remembered-chunks: expected an"),
        (["train", "policy", "--loss.regress", "-1"], "rsd train policy: error: --loss.regress: expected a number fro"),
        (["train", "policy", "--augment.shift", "-1"], "rsd train policy: error: --augment.shift: expected an integer"),
        (["train", "policy", "--augment.brightness", "-1"], "rsd train policy: error: --augment.brightness: expected"),
        (["train", "policy", "--policy.target.heads", "7"], "rsd train policy: error: --policy.target: expected heads"),
        (["train", "policy", "--init-matching"], "rsd train policy: error: expected --init with --init-matching, foun"),
        (["tokenizer", "fit", "--tokenizer.binary", "a"], "rsd tokenizer fit: error: --tokenizer.binary: expected num"),
        (["compare"], "rsd compare: error: expected at least one results directory"),
    ],
)
def test_a_bad_command_line_is_one_line_and_status_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert dispatch(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(message)
    assert printed.err.count("\n") == 1


def test_a_bad_command_line_of_a_study_is_one_line_and_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_study("throughput", ["--plain-limit-s", "nan"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("python -m studies.throughput: error: --plain-limit-s")
    assert printed.err.count("\n") == 1


def test_an_error_at_work_is_one_line_and_status_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RSD_DEBUG", raising=False)
    assert dispatch(["compare", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"rsd compare: error: {tmp_path}: not a results directory")
    assert error.count("\n") == 1


@pytest.mark.parametrize("group", ["demos", "tokenizer", "train"])
def test_a_group_lists_its_commands(group: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert dispatch([group]) == 0
    printed = capsys.readouterr().out
    assert all((f"rsd {name} " in printed) == name.startswith(group) for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        dispatch([*name.split(), "--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"usage: rsd {name} ")
    assert "--help" in printed
    text = " ".join(printed.replace("│", " ").split())
    negated = re.findall(r"--(?:\w+\.)*no-[\w-]+[^-]*?\(default: True\)", text)
    assert not negated, "an option that says the opposite of its default"


WITHOUT_TORCH = """
import sys
from rsd.cli import COMMANDS, dispatch
lines = [[*name.split(), "--help"] for name in COMMANDS] + [["train", "policy", "--backbone", "openvla", "--help"]]
for line in lines:
    try:
        dispatch(line)
    except SystemExit:
        pass
    if "torch" in sys.modules:
        sys.exit(f"{' '.join(line)} loads torch")
"""


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("train policy", "The same while the gripper is closed; None: as many. (default: None)"),
        ("train policy", "Share of its samples without a memory of the target (1: it never has one). (default: 0.1)"),
        ("train drafter", "Every n-th episode never trains its drafts, and its forecast of their deviation is learnt"),
        ("drafter distil", "Every n-th episode never trains its drafts, and its forecast of their deviation is learnt"),
    ],
)
def test_help_says_what_options_mean_that_several_commands_share(
    name: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        dispatch([*name.split(), "--help"])
    assert told in " ".join(capsys.readouterr().out.replace("│", " ").split())


def test_help_and_mistakes_of_every_command_are_quick() -> None:
    start = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    # of all commands together, processor time; torch alone would take two seconds for each
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - start < 10.0


def test_help_in_a_terminal_of_few_columns_ends(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "3")
    with pytest.raises(SystemExit):
        dispatch(["compare", "--help"])
    assert "--markdown" in capsys.readouterr().out


def test_warnings_are_of_one_line_without_places_in_the_source(tmp_path: Path) -> None:
    (tmp_path / "episodes.jsonl").write_text("{")
    record = {"format": 1, "config": {}, "config_hash": "", "versions": {}, "policy": {}}
    (tmp_path / "config.json").write_text(json.dumps(record))
    command = [sys.executable, "-m", "rsd", "compare", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    warning, error = done.stderr.splitlines()
    assert warning.startswith(f"warning: {tmp_path / 'episodes.jsonl'}: the last line is cut off")
    assert error.startswith("rsd compare: error: ")


@pytest.mark.parametrize("command", ["train policy", "train drafter", "calibrate"])
def test_a_mistake_in_the_command_line_is_found_before_torch_is_loaded(command: str) -> None:
    line = [*command.split(), "--no-such-option"]
    code = f"import sys; from rsd.cli import dispatch; dispatch({line}); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert done.stderr.startswith(f"rsd {command}")
    assert "Unrecognized options: --no-such-option" in done.stderr


@pytest.mark.parametrize("study", STUDIES)
def test_a_mistake_in_a_study_s_command_line_is_found_before_torch_is_loaded(study: str) -> None:
    root = Path(__file__).parents[2]
    code = "import sys; from studies.command import run_study; "
    code += f"run_study({study!r}, ['--no-such-option']); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=root)
    assert done.stderr.startswith(f"python -m studies.{study}: error: ")  # some ask for what is required first
    assert done.stderr.count("\n") == 1
    assert done.returncode == 0


def test_what_is_on_by_default_is_turned_off_by_name() -> None:
    data = ["--loop.steps", "3"]
    assert parse(TrainPolicyConfig, data, "").loop.cuda_graph
    assert not parse(TrainPolicyConfig, [*data, "--loop.cuda-graph", "False"], "").loop.cuda_graph
    openvla = parse(TrainOpenVlaConfig, ["--from", "there", "--checkpointing", "False"], "")
    assert (openvla.checkpointing, openvla.loop.cuda_graph) == (False, False)
    assert list(METHODS) == list(bench_methods.METHODS)  # what help names is what there is


@pytest.mark.parametrize("words", ["0 1 2 5", "0,1,2,5", "0-2,5", "0, 1-2 5"])
def test_a_list_of_numbers_is_written_as_one_likes(words: str) -> None:
    assert parse(ExpertRunConfig, ["--seeds", *words.split()], "").seeds == (0, 1, 2, 5)
    assert " " in words or planned_tasks(f"libero_10:{words}") == {"libero_10": [0, 1, 2, 5]}


def arguments(config: EvalConfig | None = None, **options: bool) -> EvalArguments:
    return EvalArguments(config or EvalConfig(), **options)


def decoder(config: EvalConfig | None = None, **options: bool) -> str:
    ((run, _),) = plan_runs(arguments(config, **options))
    return run.decode


def test_speculative_decoding_is_the_best_mode_of_the_checkpoint_unless_decode_names_another() -> None:
    assert decoder(use_speculative_decoding=False) == "ar"
    assert decoder(use_speculative_decoding=True) == decoder() == "rsd-fused"
    assert decoder(EvalConfig(decode="rsd"), use_speculative_decoding=True) == "rsd"
    assert decoder(EvalConfig(decode="l1"), use_speculative_decoding=False) == "l1"
    with pytest.raises(UsageError, match="True contradicts --decode l1"):
        decoder(EvalConfig(decode="l1"), use_speculative_decoding=True)
    with pytest.raises(UsageError, match="False contradicts --decode rsd"):
        decoder(EvalConfig(decode="rsd"), use_speculative_decoding=False)


def test_the_best_mode_follows_from_the_options_given() -> None:
    ((run, note),) = plan_runs(arguments(EvalConfig(acceptance="exact")))
    assert run.decode == "rsd-fused"
    assert note == "checkpoints/libero decodes by rsd-fused: the best that verifies every chunk"
    assert decoder(EvalConfig(skip_threshold_mm=50.0)) == "rsd-skip"
    assert decoder(EvalConfig(temperature=0.5)) == "rsd-fused"


def test_compare_runs_all_on_the_same_initial_states() -> None:
    config = EvalConfig(num_trials=3, tasks="1,2", seed=5, audit=True, output="there")
    runs = plan_runs(arguments(config, compare=True))
    target, best, drafter = (run for run, _ in runs)
    assert (target.decode, best.decode, drafter.decode) == ("l1", "rsd-fused", "drafter-only")
    assert (runs[0][1], runs[2][1]) == ("", "")
    assert "decodes by rsd-fused" in runs[1][1]
    folders = [str(run.output_dir) for run, _ in runs]
    assert folders == ["there/l1", "there/rsd-fused", "there/drafter-only"]
    assert best.audit
    for alone, expected in ((target, {"decode", "audit"}), (drafter, {"decode"})):  # a target's own has no audit
        assert {name for name in alone.identity if alone.identity[name] != best.identity[name]} == expected
    skipping = replace(config, skip_threshold_mm=50.0, max_skips=2, target_at_reset=False, audit=False)
    skips = [run for run, _ in plan_runs(arguments(skipping, compare=True))]
    assert [run.decode for run in skips] == ["l1", "rsd-skip", "drafter-only"]
    for alone in (skips[0], skips[2]):  # what only a gate asks for is left out of its run
        assert alone.identity == replace(config, decode=alone.decode, audit=False).identity
    for run, _ in runs:
        check_names(run)
    scratch = plan_runs(arguments(compare=True))
    assert len({run.output_dir for run, _ in scratch}) == 3


def test_compare_without_a_visual_drafter_runs_the_target_and_the_best(
    policy: RsdPolicy, tokenizer: ActionTokenizer, tmp_path: Path
) -> None:
    config = replace(policy.config, visual_drafter=None)
    RsdPolicy.of(RsdModel.of(config, tokenizer), tokenizer, config).save_pretrained(tmp_path)
    runs = plan_runs(arguments(EvalConfig(policy=str(tmp_path)), compare=True))
    assert [run.decode for run, _ in runs] == ["l1", "rsd"]


def test_an_acceptance_rule_without_a_draft_is_refused() -> None:
    with pytest.raises(UsageError, match="--acceptance exact: --decode ar accepts nothing"):
        check_names(EvalConfig(decode="ar", acceptance="exact"))


def test_a_name_is_checked_against_all_there_are() -> None:
    check_choice("--decode", "ar", ["ar", "rsd"])
    with pytest.raises(UsageError, match=r"--decode 'rds': expected one of ar, rsd; did you mean rsd\?"):
        check_choice("--decode", "rds", ["ar", "rsd"])


UTF8 = """\
╭─ Unrecognized options ────────────────╮
│ Unrecognized options: --trials, 3     │
│ ───────────────────────────────────── │
│ Perhaps you meant:                    │
│     --num-trials INT                  │
╰───────────────────────────────────────╯"""
ASCII = """\
 Unrecognized options
 ---------------------------------------
  Unrecognized options: --trials, 3
  ---------------------------------------
  Perhaps you meant:
      --num-trials INT
"""


@pytest.mark.parametrize("box", [UTF8, ASCII, UTF8.replace("│ Unr", "│ \x1b[1mUnr")])
def test_a_box_becomes_its_sentence_however_it_is_drawn(box: str) -> None:
    assert one_line(box) == "Unrecognized options: --trials, 3; did you mean --num-trials?"
    assert one_line("╭──╮\n╰──╯") == "the command line is not understood"
