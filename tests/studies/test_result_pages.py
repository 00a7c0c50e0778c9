"""The pages of results are made from the committed raw results alone."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rsd.types import RsdError
from studies import readme_table, scaling_page, shipped_page

PAGES: dict[str, tuple[Any, Any, str]] = {
    "decoding": (shipped_page, shipped_page.ShippedPageConfig(), "| success [Wilson 95 %] "),
    "scaling": (scaling_page, scaling_page.ScalingPageConfig(), "| 314 M | "),
}


@pytest.mark.parametrize("name", PAGES)
def test_the_page_is_made_from_the_raw_results(name: str, tmp_path: Path) -> None:
    module, config, row = PAGES[name]
    assert config.output.parts[0] == "runs"  # nothing that is tracked is written over
    module.main(replace(config, output=tmp_path / "page.md"))
    page = (tmp_path / "page.md").read_text()
    assert row in page
    assert "nan" not in page


def test_the_readmes_table_is_made_from_the_raw_results() -> None:
    config = readme_table.ReadmeTableConfig()
    made = readme_table.readme_table(config.results)
    readme = config.readme.read_text()
    assert readme_table.replaced(readme, made) == readme
    assert readme_table.replaced(readme.replace("513/560", "514/560"), made) == readme
    with pytest.raises(RsdError, match="expected one table that begins with"):
        readme_table.replaced("", made)
