"""The README's pictures: the page with a notebook, and the beginning of a report.

python docs/pictures.py MODEL    (a folder that 'craton train' wrote; needs playwright and Chromium on the PATH)
"""

import shutil
import subprocess
import sys
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

OUT = Path(__file__).parent / "pictures"
SIZE = {"width": 1000, "height": 640}
PROMPT = 'import os\nimport sys\n\n\nclass Path:\n    """A path of files.\n'


def main(model: Path) -> None:
    command = [sys.executable, "-m", "craton", "serve", str(model), "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert server.stdout is not None
        address = next(line.split()[0] for line in server.stdout if line.startswith("http"))
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            page = browser.new_page(viewport=SIZE, device_scale_factor=1)
            notebook(page, address)
            page.goto((model / "report.html").resolve().as_uri())
            page.screenshot(path=OUT / "report.png")
            browser.close()
    finally:
        server.terminate()


def notebook(page: Page, address: str) -> None:
    """A text that the model has gone on with."""
    page.goto(address)
    page.wait_for_selector("body.ready")
    page.keyboard.press("Control+,")
    page.fill("[aria-label='Most tokens']", "110")
    page.fill("[aria-label=Temperature]", "0.7")
    page.fill("[aria-label=Seed]", "3")
    page.keyboard.press("Tab")
    page.keyboard.press("Escape")
    page.fill("textarea.sheet", PROMPT)
    page.click("text=Continue")
    page.wait_for_selector(".mirror mark")
    page.wait_for_selector("body:not(.busy)")
    page.evaluate("document.querySelector('main').scrollTop = 0")
    page.wait_for_timeout(300)
    page.screenshot(path=OUT / "page.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
