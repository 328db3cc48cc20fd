"""Screenshots of pages, as wide as a screen and as a phone, light and dark.

    python experiments/screenshots.py runs/NAME/report.html ... --out docs/screenshots

Each page gives NAME_1400_light.png and three more, of its upper part, with few colours. Those in
docs/screenshots are of these runs, and of a comparison of quickstart with another learning rate:

    python -m sparsity_jax.run --config configs/quickstart.py --workdir runs/quickstart
    python -m sparsity_jax.run --workdir runs/sfw_oneshot \\
        --config configs/sfw_oneshot.py:data=digits,arch=mlp,epochs=15,sfw_init=1
    python -m sparsity_jax.run --config configs/toy_cnn.py:mlp --config.fit.epochs=8 \\
        '--config.sweep.seed=(0, 1)' --workdir runs/toy_cnn
    python -m sparsity_jax.run --config configs/geometric_limit.py:digits \\
        --workdir runs/geometric_limit
    python -m sparsity_jax.run --config configs/gradient_flow.py:digits \\
        --workdir runs/gradient_flow
    python -m sparsity_jax.run --config configs/greg.py:digits --workdir runs/greg

Needs Debian's chromium, and playwright (`pip install ".[browser]"`).
"""

import argparse
import io
import pathlib
import shutil

from PIL import Image
from playwright.sync_api import Browser, sync_playwright

HEIGHTS = {1400: 1300, 420: 1500}  # pixels of a screenshot by its width
COLORS = 96


def screenshot(browser: Browser, path: pathlib.Path, width: int, scheme: str) -> Image.Image:
    """The upper part of a page, `scheme` "light" or "dark"."""
    size = dict(width=width, height=HEIGHTS[width])
    page = browser.new_page(viewport=size, color_scheme=scheme)
    page.goto(path.resolve().as_uri())
    image = Image.open(io.BytesIO(page.screenshot()))
    page.close()
    return image.convert("RGB").quantize(
        COLORS, Image.Quantize.MAXCOVERAGE, kmeans=3, dither=Image.Dither.NONE
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pages", nargs="+", type=pathlib.Path)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("docs/screenshots"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as play:
        chromium = shutil.which("chromium")
        browser = play.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for path in options.pages:
            for width in HEIGHTS:
                for scheme in ("light", "dark"):
                    name = f"{path.resolve().parent.name}_{width}_{scheme}.png"
                    image = screenshot(browser, path, width, scheme)
                    image.save(options.out / name, optimize=True)


if __name__ == "__main__":
    main()
