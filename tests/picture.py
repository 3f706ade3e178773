# SPDX-License-Identifier: MIT
"""The README's picture of the page: the first screen of data/report/index.html, as .github/page.png.

    python tests/picture.py                    # after the five stages; needs chromium
    python tests/picture.py --data DIR --to page.png
"""
import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
SIZE = (1440, 900)  # pixels
MOST = 200_000  # bytes


def take(page: Path, to: Path, size: tuple[int, int] = SIZE) -> Path:
    """A picture of the first screen of a page, in 128 colours; an error if it takes more than MOST bytes."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        sys.exit(f"no browser: install one of {', '.join(BROWSERS)}")
    if not page.exists():
        sys.exit(f"{page} is missing: run 05_report.py")
    with tempfile.TemporaryDirectory() as folder:
        shot = Path(folder) / "page.png"
        command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={folder}",
                   f"--screenshot={shot}", f"--window-size={size[0]},{size[1]}", page.resolve().as_uri()]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        to.parent.mkdir(parents=True, exist_ok=True)
        # few colours are on the page, and text stays sharp without dithering
        Image.open(shot).convert("RGB").quantize(128, dither=Image.Dither.NONE).save(to, "PNG", optimize=True)
    if to.stat().st_size > MOST:
        sys.exit(f"{to} has {to.stat().st_size:,} bytes, more than {MOST:,}")
    return to


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT / "data")
    parser.add_argument("--to", type=Path, default=ROOT / ".github" / "page.png")
    options = parser.parse_args()
    done = take(options.data / "report" / "index.html", options.to)
    print(f"{done}: {done.stat().st_size:,} bytes")
