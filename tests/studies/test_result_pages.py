"""The committed pages are what the committed raw results say."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from studies import scaling_page, shipped_page, studies_page, suites_page

PAGES = {
    "decoding": (shipped_page, shipped_page.ShippedPageConfig()),
    "scaling": (scaling_page, scaling_page.ScalingPageConfig()),
    "studies": (studies_page, studies_page.StudiesPageConfig()),
    "suites": (suites_page, suites_page.SuitesPageConfig()),
}


@pytest.mark.parametrize("name", PAGES)
def test_the_page_is_made_from_the_raw_results(name: str, tmp_path: Path) -> None:
    module, config = PAGES[name]
    made: Any = replace(config, output=tmp_path / "page.md")
    module.target(made)
    assert (tmp_path / "page.md").read_text() == config.output.read_text()
