"""The pages of results are made from the committed raw results alone."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from refusals import check
from rsd.cli import Command, dispatch
from rsd.types import RsdError
from studies import command, readme_table, scaling_page, shipped_page

PAGES: dict[str, tuple[Any, Any, str]] = {
    "decoding": (shipped_page, shipped_page.ShippedPageConfig(), "| success [Wilson 95 %] "),
    "scaling": (scaling_page, scaling_page.ScalingPageConfig(), "| 314 M | "),
}

LACKING = {
    "archive": "expected folders with raw results, found none",
    "delay_page": "results/delayed: No such file",
    "expert_page": "results/expert.json: No such file",
    "modes": "--policy STR",
    "permuted_page": "results/permuted_object/l1: not a results directory",
    "permuted_suites_page": "results/permuted_suites: No such file",
    "readme_table": "results/averaged_drafter",
    "scaling_page": "results/libero_spatial_57M/h100/rsd-skip: not a results directory",
    "shipped_page": "results/libero_spatial_57M/h100/ar: not a results directory",
}
SCRIPTS = {
    "kill_test:KillTest --kills 0": "--kills: expected an integer from 1 to",
    "kill_test:KillTest --shortest 50": "expected --shortest of at most --longest, found 50 and 45",
    "report_screenshot: ": "expected two arguments, as in report_screenshot.py report.html docs/report, found 0",
    "report_screenshot: README.md x": "README.md: expected a page of `rsd report`, found none",
    "make_permuted_states:StatesConfig nosuch": "--suite: expected one of libero_object_permuted",
    "make_permuted_states:StatesConfig libero_goal": "--suite: expected one of libero_object_permuted",
    "make_permuted_states:StatesConfig libero_goal_permuted --states 0": "--states: expected an integer from 1 to",
}


@pytest.mark.parametrize("name", PAGES)
def test_the_page_is_made_from_the_raw_results(name: str, tmp_path: Path) -> None:
    module, config, row = PAGES[name]
    assert config.output.parts[0] == "runs"  # nothing that is tracked is written over
    module.main(replace(config, output=tmp_path / "page.md"))
    page = (tmp_path / "page.md").read_text()
    assert row in page
    assert "nan" not in page


@pytest.mark.parametrize("name", command.PAGES)
def test_outside_of_the_repositorys_root_a_page_says_what_it_lacks(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    check(["study", name], LACKING[name], tmp_path, capsys)


@pytest.mark.parametrize("line", SCRIPTS)
def test_a_script_is_a_command_like_the_others(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    (place, *words) = line.split()
    name, _, config = place.partition(":")
    script = Command("", f"scripts.{name}:main", config)  # which is never called with odd options
    assert dispatch(words, script, f"{name}.py") == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"{name}.py: error: {SCRIPTS[line]}")
    assert printed.count("\n") == 1


def test_the_readmes_table_is_made_from_the_raw_results() -> None:
    config = readme_table.ReadmeTableConfig()
    made = readme_table.readme_table(config.results)
    readme = config.readme.read_text()
    assert readme_table.replaced(readme, made) == readme
    assert readme_table.replaced(readme.replace("513/560", "514/560"), made) == readme
    with pytest.raises(RsdError, match="expected one table that begins with"):
        readme_table.replaced("", made)
