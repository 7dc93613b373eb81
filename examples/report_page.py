"""Save the page of a small Llama's report, whose first layer and head stay in BF16; with --screenshot, take a picture of it, too.

    python examples/report_page.py
    python examples/report_page.py --screenshot docs/images/report-page.png      # needs playwright, pillow and Chromium
"""

import argparse
import shutil
from pathlib import Path

import torch
from llama_model import Llama, LlamaConfig

import quartet_compile as quartet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", type=Path, default=Path("report.html"), help="where the page is written")
    parser.add_argument("--screenshot", type=Path, help="where a picture of it is written")
    arguments = parser.parse_args()

    model = Llama(LlamaConfig(vocab=2048, context=256, layers=4, heads=8, kv_heads=4, dim=256, hidden=704))
    tokens = torch.randint(0, 2048, (2, 128))
    with torch.autocast("cpu", torch.bfloat16):
        report = quartet.explain(model, tokens, tokens, options={"quartet.exclude": ["layers.0.*"]})
    print(report.save(arguments.page).resolve().as_uri())
    if arguments.screenshot:
        photograph(arguments.page, arguments.screenshot)


def photograph(page: Path, picture: Path) -> None:
    """The upper left of a page, the details of one linear shown."""
    from PIL import Image
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"])
        view = browser.new_page(viewport={"width": 1280, "height": 1000}, color_scheme="light")
        view.goto(f"{page.resolve().as_uri()}#layers.1.attn.o_proj")
        view.wait_for_selector("#after .code.selected", state="attached")
        view.wait_for_timeout(500)
        view.screenshot(path=picture)
        browser.close()
    Image.open(picture).convert("RGB").quantize(256).save(picture, optimize=True)


if __name__ == "__main__":
    main()
