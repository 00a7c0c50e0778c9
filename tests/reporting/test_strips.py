"""The strips of what the robot did at each step: their numbers, old records, and how a browser shows them."""

import re
from pathlib import Path
from typing import Any

import pytest
from test_html_report import browser as browser  # a fixture
from test_report import PLAN

from evaluation.scripted import episode
from rsd.cli import dispatch
from rsd.evaluation.results import EpisodeResult, RunRecord, append_episode, encode_record
from rsd.reporting.html_report import write_report
from rsd.reporting.strips import strip
from rsd.types import RsdError

ASYNC = {"drafted_steps": [None, 4.0, 0.0], "replaced": [None, 0.5, 1.0], "replaced_mm": [None, 12.0, 30.0]}


def delayed(task: int = 0, state: int = 0, **changes: Any) -> EpisodeResult:
    """An episode at a delay of 4: the first chunk waited for, one draft corrected, one that did not begin."""
    further = {"latency_ms": {"total": [10.0] * 3}, "accepted_levels": [1] * 3, "num_drafts": 3, "decode": "rsd-async"}
    sources = ["hhhhtttttttt", "ddddrrrr", "ttttrrrr"]
    kept = {"chunks": 3, "steps": 28, "sources": sources, "chunk_stats": ASYNC, **further, **changes}
    return episode(task, state, **kept)


def write(directory: Path, episodes: list[EpisodeResult], **options: Any) -> Path:
    directory.mkdir()
    record = RunRecord({**PLAN, "num_trials": 9, **options}, "hash", {}, {})
    (directory / "config.json").write_text(encode_record(record))
    for each in episodes:
        append_episode(directory / "episodes.jsonl", each)
    return directory


def test_a_strip_has_every_step_in_its_place() -> None:
    drawn = strip("a run", 0, delayed(), 0.0)
    assert (drawn.width, drawn.told) == (28.0, "drafted 4, replaced 8, the target's own 12, stood still 4 of 28 steps")
    assert drawn.bars["d"] == "M12 0h4V10h-4z"
    assert drawn.bars["r"] == "M16 0h4V10h-4zM24 0h4V10h-4z"
    assert drawn.marks.startswith("M0 11v1M12 11v1M20 11v1")
    paused = delayed(chunk_stats={"pause_ms": [None, 80.0, 25.0]}, sources=["tttttttttttt", "tttttttt", "tttttttt"])
    drawn = strip("in real time", 0, paused, 20.0)  # the standstill is beside the steps
    assert (drawn.width, drawn.bars["h"]) == (30.1, "M12 8h1.6V10h-1.6zM21.6 8h0.5V10h-0.5z")


@pytest.mark.parametrize(
    "sources", [["hhh"], ["hhhhtttttttt", "ddddrrrrttttrrrr"], ["hhhhtttttttt", "ddddrrrr", "ttttrrrx"]]
)
def test_steps_that_do_not_fit_the_episode_are_refused(sources: list[str], tmp_path: Path) -> None:
    run = write(tmp_path / "run", [delayed(sources=sources)], delay=4)
    with pytest.raises(RsdError, match="sources"):
        write_report([run])


def test_the_page_and_the_command_say_what_was_corrected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    new = write(tmp_path / "new", [delayed(), delayed(1, success=False, failure="step limit")], delay=4)
    old = write(tmp_path / "old", [episode(0), episode(1)], delay=4)
    assert dispatch(["report", str(new), str(old)]) == 0
    said = (
        "75.0 % of the actions replaced, in 100.0 % of the answers, 2.0 steps of the draft executed before (p95 4); "
        "the two lead 21.0 mm apart (p95 30.0)"
    )
    assert f"rsd-async (margin, delay 4): {said}\n" in capsys.readouterr().out
    text = (tmp_path / "report.html").read_text()
    assert said in text
    assert "Not recorded by an earlier version: rsd (margin, delay 4)." in text
    assert text.count('class="of-d"') == 3  # in the legend and in two strips
    assert re.search(r"<title>drafted 4, replaced 8, .* of 28 steps</title>", text)
    plain = write_report([write(tmp_path / "plain", [episode(0)])], tmp_path / "plain.html").read_text()
    assert 'id="steps"' not in plain


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs of three tasks; some episodes are ten times as long as others."""
    root, runs = tmp_path_factory.mktemp("strips"), []
    for name, decode in (("a", "rsd-async"), ("b", "l1")):
        episodes = []
        for number in range(12):
            times = 10 if number % 3 == 0 else 1
            sources = ["hhhhtttttttt", "ddddrrrr", "ttttrrrr"] * times
            longer = {
                "chunks": 3 * times,
                "num_drafts": 3 * times,
                "accepted_levels": [1] * 3 * times,
                "decode": decode,
            }
            latency = {"latency_ms": {"total": [10.0] * 3 * times}, "chunk_stats": {}}
            told = {"instruction": f"do the thing number {number % 3} with all the words that a long sentence has"}
            kept = {"steps": 28 * times, "sources": sources, **longer, **latency, **told}
            episodes.append(episode(number % 3, number // 3, **kept))
        runs.append(write(root / name, episodes, delay=4))
    return write_report(runs, root / "report.html")


STRIPS = """width => {
  const found = [], box = e => e.getBoundingClientRect();
  const all = [...document.querySelectorAll('.strips svg')];
  for (const svg of all) {
    const own = box(svg), card = box(svg.closest('.card'));
    if (own.left < card.left || own.right > Math.min(card.right, width)) found.push('sticks out');
    if (own.width < 250 || own.height < 18) found.push('too small: ' + own.width + ' x ' + own.height);
    for (const path of svg.querySelectorAll('path')) if (box(path).right > own.right + 1) found.push('beyond it');
    const above = box(svg.previousElementSibling);
    if (above.bottom > own.top + 1 || above.height > 60) found.push('under its label');
    const [one, other] = [...svg.previousElementSibling.children].map(box);
    if (one.right > other.left + 1) found.push('labels over each other');
  }
  const parse = c => c.match(/[0-9.]+/g).slice(0, 3).map(Number);
  const light = c => parse(c).reduce((a, b) => a + b, 0);
  const card = light(getComputedStyle(document.querySelector('#steps .card')).backgroundColor);
  const fills = [...'drth'].map(l => getComputedStyle(document.querySelector('.strips .of-' + l)).fill);
  if (new Set(fills).size < 4) found.push('colours: ' + fills);
  fills.forEach(f => Math.abs(light(f) - card) > 150 || found.push('cannot be seen: ' + f));
  return [all.length, document.querySelectorAll('#steps .key svg').length, found];
}"""


@pytest.mark.browser
@pytest.mark.parametrize(
    ("width", "scheme"), [(1280, "light"), (390, "dark"), (390, "light")], ids=["desktop", "dark phone", "phone"]
)
def test_a_browser_shows_the_strips(browser: Any, page_file: Path, width: int, scheme: str, tmp_path: Path) -> None:
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page.goto(page_file.as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate(STRIPS, width) == [24, 4, []]
    page.locator("#steps").screenshot(path=tmp_path / "steps.png")
    assert (tmp_path / "steps.png").stat().st_size > 10_000
    page.close()
