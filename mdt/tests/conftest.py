"""What several tests of decision trees share."""

import os
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "msedge")
# Nothing of the browser's own goes out to the network.
QUIET = ["--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-gpu"]


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """A browser that is installed on this machine, driven by Playwright; none is downloaded.

    It ends with the module: as long as Playwright is at work, an event loop runs in this thread, and no other test could start one.
    """
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install 'gatewise-mdt[dev]'")
    found = os.environ.get("GATEWISE_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip("there is no Chromium here (Debian: apt install chromium), or name one in GATEWISE_CHROMIUM")
    root = hasattr(os, "geteuid") and os.geteuid() == 0  # for whom Chromium has no sandbox
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=[*QUIET, *(["--no-sandbox"] if root else [])])
        yield browser
        browser.close()
