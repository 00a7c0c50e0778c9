#!/usr/bin/env python
"""Photograph a report page in Chromium, light and dark, for the README: `report_screenshot.py report.html docs/report`.

The table of numbers is left out, so that the picture shows the tiles and the tasks.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

SIZE = {"width": 1180, "height": 1010}


def main(page_file: Path, stem: str) -> None:
    executable = shutil.which("chromium") or shutil.which("google-chrome")
    if executable is None:
        sys.exit("no Chromium on the PATH: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        for scheme, suffix in (("light", ""), ("dark", "-dark")):
            page = browser.new_page(viewport=SIZE, color_scheme=scheme)
            page.goto(page_file.resolve().as_uri())
            page.evaluate("document.querySelector('#numbers').style.display = 'none'")
            page.screenshot(path=f"{stem}{suffix}.png")
            page.close()
        browser.close()


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), sys.argv[2])
