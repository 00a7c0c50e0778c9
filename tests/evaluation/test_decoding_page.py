"""The committed page is what the committed raw results say."""

from dataclasses import replace
from pathlib import Path

from rsd.evaluation.decoding_page import PageConfig, main


def test_the_page_is_made_from_the_raw_results(tmp_path: Path) -> None:
    config = PageConfig()
    main(replace(config, output=tmp_path / "page.md"))
    assert (tmp_path / "page.md").read_text() == config.output.read_text()
