"""The report page: complete, self-contained, and right in a real browser (marker `browser`)."""

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from test_report import write_run

from evaluation.scripted import episode
from rsd.cli import dispatch
from rsd.evaluation.results import append_episode
from rsd.evaluation.video import VIDEOS_DIR, video_name
from rsd.reporting.figures import INK, MUTED, SERIES, STAGE_COLOURS, STAGES, latency_figure, save, stage_colour
from rsd.reporting.html_report import DARK_STAGES, write_report
from rsd.reporting.tables import load_runs
from rsd.types import RsdError

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
REAL = [
    Path("results/libero_spatial_57M") / name
    for name in ("h100/ar", "h100/rsd-fused", "cpu/timed-rsd-fused", "cpu/timed-rsd-skip")
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two runs; the second has a video of a failure, an error episode and a statistic nobody knows."""
    root = tmp_path_factory.mktemp("runs")
    first, second = write_run(root / "ar", "ar", {1, 2}, 80.0), write_run(root / "rsd", "rsd", {2}, 40.0, trials=2)
    further = {"chunk_stats": {"skipped": [1.0], "pause_ms": [83.5]}, "failure_detail": "pushed, never lifted"}
    further |= {"prefills": 0, "target_passes": 0}  # it skipped the target
    failed = episode(3, 1, success=False, failure="step limit", instruction="say <b>hello</b>", **further)
    append_episode(second / "episodes.jsonl", failed)
    append_episode(second / "episodes.jsonl", episode(9, 1, success=False, failure="error: worker hung", attempts=3))
    (second / VIDEOS_DIR).mkdir()
    (second / VIDEOS_DIR / video_name(failed)).write_bytes(b"not really a film")
    return [first, second]


def test_the_page_holds_everything_and_needs_nothing(runs: list[Path], tmp_path: Path) -> None:
    page = write_report(runs, tmp_path / "page.html")
    text = page.read_text()
    for expected in (
        *("8/10 = 80.0 %", "not distinguishable at n = 10", "chunks without the target", "pushed, never lifted"),
        "4 failures, one by one",
        *("standstill between chunks, p50 / p95", "83.5 / 83.5 ms", "Standstill: from the end"),
        *("error: worker hung", "data:video/mp4;base64,", "rsd eval --num-trials 1", "2.00x the speed per chunk"),
    ):
        assert expected in text, expected
    assert "tasks drawn anew" in text
    assert "chunk_stats" not in text
    assert "say &lt;b&gt;hello" in text
    assert "<b>hello" not in text
    links = re.findall(r'(?:src|href)="([^"]+)"', text)
    assert links
    assert all(link.startswith(("#", "data:")) for link in links)
    assert "<script" not in text
    assert not re.search(r"#[0-9a-f]{6}\b", text[text.index("<body>") :]), "a colour that knows no dark page"
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    names = {"success", "acceptance_level", "acceptance_time"}  # without stages there is no figure of them
    for suffix in ("svg", "pdf"):
        assert {path.stem for path in (tmp_path / "figures").glob(f"*.{suffix}")} == names


def test_figures_are_the_same_twice(runs: list[Path], tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_report(runs, tmp_path / name / "page.html")
    for drawn in (tmp_path / "a" / "figures").iterdir():
        assert drawn.read_bytes() == (tmp_path / "b" / "figures" / drawn.name).read_bytes(), drawn.name


def test_videos_may_be_linked_or_left_out(runs: list[Path], tmp_path: Path) -> None:
    linked = write_report(runs, tmp_path / "linked.html", videos="link").read_text()
    (src,) = re.findall(r'<video[^>]* src="([^"]+)"', linked)
    assert (tmp_path / src).resolve() == next((runs[1] / VIDEOS_DIR).iterdir()).resolve()
    assert "<video" not in write_report(runs, tmp_path / "none.html", videos="none").read_text()


def test_the_command_says_where_the_page_is(runs: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert dispatch(["report", *map(str, runs)]) == 0
    page = runs[0].parent / "report.html"
    assert capsys.readouterr().out == f"report: {page}\n"
    assert page.is_file()
    with pytest.raises(RsdError, match="expected the name of an HTML file, found a directory"):
        write_report(runs, runs[0])
    episodes = runs[0] / "episodes.jsonl"
    before = episodes.read_bytes()
    with pytest.raises(RsdError, match=r"expected a name that ends in .html"):
        write_report(runs, episodes)
    assert episodes.read_bytes() == before


def test_a_run_without_drafts_or_failures_has_a_shorter_page(tmp_path: Path) -> None:
    text = write_report([write_run(tmp_path / "ar", "ar", set(), 80.0)]).read_text()
    assert "Every episode succeeded." in text
    assert 'id="acceptance"' not in text
    assert "not run" not in text


def test_failures_and_successes_are_apart_and_counted_in_words(tmp_path: Path) -> None:
    run = write_run(tmp_path / "rsd", "rsd", {1}, 40.0)
    (run / VIDEOS_DIR).mkdir()
    for name in (video_name(episode(0)), video_name(episode(1, success=False, failure="step limit"))):
        (run / VIDEOS_DIR / name).write_bytes(b"not really a film")
    text = write_report([run]).read_text()
    failures, successes = text.index('<section id="failures">'), text.index('<section id="videos">')
    assert failures < text.index("Videos of failures") < text.index("1 failure, one by one") < successes
    assert "success</span> after" not in text[failures:successes]
    assert text.count("<video") == 2
    assert text[successes:].count("<video") == 1
    without = write_report([write_run(tmp_path / "l1", "l1", set(), 40.0)]).read_text()
    assert 'id="videos"' not in without


def test_a_stage_has_its_colour_in_every_report(tmp_path: Path) -> None:
    colours = []
    for number, stages in enumerate((("decode", "prefill", "verify-pending"), ("draft", "decode", "vision", "odd"))):
        run = write_run(tmp_path / str(number), "rsd", set(), 40.0, range(0))
        latencies = {stage: [2.0] for stage in (*stages, "total")}
        append_episode(run / "episodes.jsonl", episode(0, latency_ms=latencies))
        figure = latency_figure(load_runs([run]))
        assert figure is not None
        drawn = dict(zip(*reversed(figure.axes[0].get_legend_handles_labels()), strict=True))
        assert set(drawn) == {*stages} - {"verify-pending"}  # which comes after the chunk
        colours.append(to_hex(drawn["decode"].patches[0].get_facecolor()))
    assert colours == [stage_colour("decode")] * 2
    assert len({stage_colour(stage) for stage in STAGES}) == len(STAGES)
    assert len(set(STAGE_COLOURS) & {*SERIES, MUTED, INK}) == 0
    assert len(STAGE_COLOURS) == len(DARK_STAGES) == len(STAGES) + 1


def test_no_time_is_shown_of_runs_that_waited(runs: list[Path], tmp_path: Path) -> None:
    folders = []
    for name in ("ar", "rsd"):
        run = write_run(tmp_path / name, name, set(), 40.0 if name == "ar" else 20.0)
        folders.append(run)
        record = run / "config.json"
        record.write_text(record.read_text().replace('"num_trials": 1', '"num_trials": 1, "batch": 4'))
    text = write_report(folders).read_text()
    for absent in ("the speed per chunk", 'id="latency"', "per chunk, p50", "40.0 ms", "2.00x"):
        assert absent not in text, absent
    assert "batch of 4" in text
    assert "they are no speed and are left out" in text


def test_what_was_not_run_is_a_gap_in_its_place(tmp_path: Path) -> None:
    directory = write_run(tmp_path / "rsd", "rsd", set(), 40.0, range(2))
    record = directory / "config.json"
    record.write_text(record.read_text().replace('"num_trials": 1', '"num_trials": 3'))
    append_episode(directory / "episodes.jsonl", episode(0, 2))
    text = write_report([directory]).read_text()
    titles = re.findall(r'<i[^>]* title="rsd \(margin\), initial state (\d): (not run|success)', text)
    assert [outcome for _, outcome in titles[:3]] == ["success", "not run", "success"]
    assert [outcome for _, outcome in titles[3:]] == ["success", "not run", "not run"]
    assert [state for state, _ in titles] == list("012012")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        message = "no Chromium on the PATH: apt-get install chromium"
        if os.environ.get("RSD_BROWSER") == "required":
            pytest.fail(message)
        pytest.skip(message)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # the sandbox needs what a container does not grant; the page is our own
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(REAL, tmp_path_factory.mktemp("page") / "report.html")


OVERLAPS = """width => {
  const found = [], box = e => e.getBoundingClientRect(), seen = e => box(e).width > 0;
  const before = (a, b) => a.right <= b.left + 1 || a.bottom <= b.top + 1;
  const apart = (a, b) => before(a, b) || before(b, a);
  const fits = c => box(c).right <= width && c.scrollWidth <= c.clientWidth + 1;
  for (const row of document.querySelectorAll('#numbers tr, #failures tr')) {
    const cells = [...row.children].filter(seen);
    cells.forEach((a, i) => cells.slice(i + 1).forEach(b => apart(box(a), box(b)) || found.push(a.innerText)));
    if (width < 640) cells.forEach(c => fits(c) || found.push(c.innerText));
  }
  const columns = new Set();
  for (const task of document.querySelectorAll('.outcomes > div')) {
    const lines = [...task.querySelectorAll('.line')];
    lines.slice(1).forEach((line, i) => box(lines[i]).bottom + 4 <= box(line).top || found.push(task.innerText));
    for (const line of lines)
      for (const ten of line.querySelectorAll('.ten')) columns.add(Math.round(box(ten).left - box(line).left));
  }
  const most = box(document.querySelector('.line')).width / 128;
  if (columns.size > most) found.push('squares that do not stand under each other: ' + [...columns]);
  const runs = new Set([...document.querySelectorAll('#numbers td')].filter(seen).map(c => c.dataset.label));
  if (runs.size != document.querySelectorAll('.tile').length) found.push('runs: ' + [...runs]);
  return found;
}"""


@pytest.mark.browser
@pytest.mark.parametrize(
    ("width", "scheme"), [(1280, "light"), (1280, "dark"), (390, "light")], ids=["desktop", "dark", "phone"]
)
def test_a_browser_shows_it(browser: Any, page_file: Path, width: int, scheme: str) -> None:
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("requestfailed", lambda request: complaints.append(request.url))
    page.goto(page_file.as_uri())
    screenshot = page.screenshot(full_page=True)
    assert complaints == []
    assert len(screenshot) > 50_000
    # nothing sticks out of a phone's screen, every figure is drawn inside its card
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    boxes = page.evaluate(
        "[...document.querySelectorAll('main svg')].map(s => [s.getBoundingClientRect().width,"
        " s.parentElement.getBoundingClientRect().width, s.getBoundingClientRect().height])"
    )
    assert len(boxes) == 4  # nor levels of rules that let chunks stand as one
    assert all(100 < drawn <= card and height > 80 for drawn, card, height in boxes)
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", dark)[:3])) < 200) == (scheme == "dark")
    # letters of figures and page are legible on what they stand on
    ink = page.evaluate("getComputedStyle(document.querySelector('main svg text')).fill")
    brightness = sum(map(int, re.findall(r"\d+", ink)[:3]))
    assert (brightness > 380) == (scheme == "dark")
    # every run's numbers are on the screen, and nothing lies on anything else
    stray = page.evaluate(OVERLAPS, width)
    assert stray == []
    page.close()


def test_a_figure_replaces_a_link_and_not_what_it_leads_to(tmp_path: Path) -> None:
    other = tmp_path / "episodes.jsonl"
    other.write_text("theirs")
    (tmp_path / "success.svg").symlink_to(other)
    save(Figure(), tmp_path / "success.svg")
    assert other.read_text() == "theirs"
    assert not (tmp_path / "success.svg").is_symlink()
    assert {path.name for path in tmp_path.iterdir()} == {"episodes.jsonl", "success.svg", "success.pdf"}
