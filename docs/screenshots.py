"""Pictures of a report as a reader meets it: desktop, phone, dark and print, taken by headless Chromium.

    python docs/screenshots.py out/demo/report -o docs/screenshots

Needs Chromium or Chrome, and pdftoppm (Debian: poppler-utils) for the printed pages; no network.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image  # comes with matplotlib

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--force-prefers-reduced-motion",  # a jump to a section is done when the picture is taken
)
DARK = "--blink-settings=preferredColorScheme=0"
DESKTOP = (1200, 1700)
PHONE = (390, 1688)  # two screens
NARROWEST = 500  # window of a browser
PAGES, RULE = 3, 8  # printed; pixels between them
MOST_BYTES = 400_000
TIMEOUT_S = 120

FRAME = """<!doctype html>
<style>body {{ margin: 0 }} iframe {{ border: 0; width: {width}px; height: {height}px }}</style>
<iframe src={address}></iframe>"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path, help="folder of a report, or its report.html")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder of the pictures")
    arguments = parser.parse_args()
    page = arguments.report / "report.html" if arguments.report.is_dir() else arguments.report
    if not page.is_file():
        sys.exit(f"{page}: no such report; make one with `python build.py demo`")
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        sys.exit(f"no browser found: install one of {', '.join(BROWSERS)} (Debian: apt-get install chromium)")
    if shutil.which("pdftoppm") is None:
        sys.exit("pdftoppm not found, which turns printed pages into pictures (Debian: apt-get install poppler-utils)")
    arguments.output.mkdir(parents=True, exist_ok=True)
    address = page.resolve().as_uri()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        shots = {
            "desktop": shot(browser, address, work, DESKTOP),
            "charts": framed(browser, f"{address}#batch", work, DESKTOP),
            "dark": shot(browser, address, work, DESKTOP, DARK),
            "phone": framed(browser, address, work, PHONE, scale=2),
            "print": pages(browser, address, work),
        }
        for name, picture in shots.items():
            save_small(picture, arguments.output / f"{name}.png")


def run(browser: str, *arguments: str) -> None:
    """Run the browser with a profile of its own, and stop where it fails."""
    with tempfile.TemporaryDirectory() as profile:
        done = subprocess.run(
            [browser, *FLAGS, f"--user-data-dir={profile}", *arguments],
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
        )
    if done.returncode != 0:
        sys.exit(f"{browser} failed:\n{done.stderr[-2000:]}")


def shot(browser: str, address: str, work: Path, size: tuple[int, int], *more: str) -> Image.Image:
    """Take what a window of this size shows first."""
    file = work / "shot.png"
    file.unlink(missing_ok=True)
    run(browser, *more, f"--window-size={size[0]},{size[1]}", f"--screenshot={file}", address)
    if not file.is_file():
        sys.exit(f"{browser} took no picture of {address}")
    with Image.open(file) as picture:
        return picture.convert("RGB")


def framed(browser: str, address: str, work: Path, size: tuple[int, int], scale: int = 1) -> Image.Image:
    """Take the page in a frame of this size; a window cannot be as narrow as a phone, nor be taken where it scrolled.

    Args:
        scale: pixels of the picture per CSS pixel.
    """
    width, height = size
    frame = work / "frame.html"
    frame.write_text(FRAME.format(width=width, height=height, address=json.dumps(address)))
    window = (max(width, NARROWEST), height)
    wide = shot(browser, frame.as_uri(), work, window, f"--force-device-scale-factor={scale}")
    return wide.crop((0, 0, width * scale, height * scale))


def pages(browser: str, address: str, work: Path) -> Image.Image:
    """Print to PDF; the first pages side by side."""
    pdf = work / "report.pdf"
    run(browser, "--no-pdf-header-footer", f"--print-to-pdf={pdf}", address)
    command = ["pdftoppm", "-png", "-r", "80", "-l", str(PAGES), str(pdf), str(work / "page")]
    subprocess.run(command, check=True, timeout=TIMEOUT_S)
    printed = [Image.open(file).convert("RGB") for file in sorted(work.glob("page-*.png"))]
    width, height = printed[0].size
    sheet = Image.new("RGB", (len(printed) * (width + RULE) - RULE, height), "#999999")
    for index, page in enumerate(printed):
        sheet.paste(page, (index * (width + RULE), 0))
    return sheet


def save_small(picture: Image.Image, target: Path) -> None:
    """Save with a palette of 256 colours, which a page of text and flat shapes hardly exceeds."""
    picture.quantize(256, dither=Image.Dither.NONE).save(target, optimize=True)
    nbytes = target.stat().st_size
    if nbytes > MOST_BYTES:
        sys.exit(f"{target} has {nbytes:,} bytes, more than {MOST_BYTES:,}")
    print(f"{target}: {nbytes:,} bytes")


if __name__ == "__main__":
    main()
