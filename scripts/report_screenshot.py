#!/usr/bin/env python
"""Photograph a report page in Chromium, light and dark, for the README: `report_screenshot.py report.html docs/report`.

The table of numbers is left out, so that the picture shows the tiles and the tasks.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from playwright.sync_api import sync_playwright

from rsd.cli import Command, dispatch
from rsd.types import RsdError

SIZE = {"width": 1180, "height": 1010}


def main(arguments: Sequence[str], prog: str) -> int:
    if len(arguments) != 2:
        raise RsdError(f"expected two arguments, as in {prog} report.html docs/report, found {len(arguments)}")
    page_file, stem = Path(arguments[0]), arguments[1]
    if not page_file.is_file() or 'id="numbers"' not in page_file.read_text():
        raise RsdError(f"{page_file}: expected a page of `rsd report`, found none")
    executable = shutil.which("chromium") or shutil.which("google-chrome")
    if executable is None:
        raise RsdError("no Chromium on the PATH: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        for scheme, suffix in (("light", ""), ("dark", "-dark")):
            page = browser.new_page(viewport=SIZE, color_scheme=scheme)
            page.goto(page_file.resolve().as_uri())
            page.evaluate("document.querySelector('#numbers').style.display = 'none'")
            page.screenshot(path=f"{stem}{suffix}.png")
            page.close()
        browser.close()
    return 0


if __name__ == "__main__":
    sys.exit(dispatch(sys.argv[1:], Command("", "report_screenshot:main"), "report_screenshot.py"))
