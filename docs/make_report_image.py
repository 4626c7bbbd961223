"""Draws docs/images/report.png from a report: ``python docs/make_report_image.py OUT/report.html``.

It needs Chromium and Pillow. The README's picture shows ResNet-20 at 4 bits with rounding borders.
"""

from __future__ import annotations

import argparse
import pathlib
import shutil
import subprocess
import tempfile

from PIL import Image

SIZE = 1460, 1000
# Two windows on a desk, the head of the page and its histograms; a telephone with the graph, in the dark.
FRAME = """<!doctype html><meta charset="utf-8"><style>
body {{ margin: 0; background: #e4e1d8; width: {width}px; height: {height}px; overflow: hidden; position: relative; }}
div {{ position: absolute; overflow: hidden; border-radius: 14px; box-shadow: 0 0 0 1px #0002, 0 2px 3px #0001; }}
iframe {{ border: 0; position: absolute; left: 0; top: 0; width: 1060px; height: 12000px; }}
#phone {{ width: 360px; color-scheme: dark; zoom: .8; }}
</style>
<div style="left:40px;top:36px;width:1060px;height:440px"><iframe src="{page}"></iframe></div>
<div style="left:40px;top:500px;width:1060px;height:464px"><iframe src="{page}" id="values"></iframe></div>
<div style="left:1132px;top:36px;width:288px;height:928px"><iframe src="{page}" id="phone"></iframe></div>
<script>
const place = (id, query, gap) => {{
  const frame = document.getElementById(id), part = frame.contentDocument.querySelector(query);
  frame.style.top = gap - part.getBoundingClientRect().top + "px";
}};
addEventListener("load", () => {{ place("values", "#values h3", 22); place("phone", "#map", 20); }});
</script>"""


def draw(page: pathlib.Path, out: pathlib.Path) -> None:
    """Takes the picture.

    Args:
        page: A report.
        out: A PNG file.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        shutil.copyfile(page, folder / "page.html")
        text = FRAME.format(page="page.html", width=SIZE[0], height=SIZE[1])
        (folder / "frame.html").write_text(text, encoding="utf-8")
        command = [
            shutil.which("chromium") or "google-chrome",
            "--headless=new",
            "--no-sandbox",
            "--hide-scrollbars",
            "--allow-file-access-from-files",
            "--virtual-time-budget=2000",
            f"--user-data-dir={folder / 'profile'}",
            f"--window-size={SIZE[0]},{SIZE[1]}",
            f"--screenshot={folder / 'shot.png'}",
            (folder / "frame.html").as_uri(),
        ]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        picture = Image.open(folder / "shot.png").convert("RGB").quantize(256, kmeans=3, dither=Image.Dither.NONE)
    picture.save(out, optimize=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("page", type=pathlib.Path, help="report.html")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent / "images" / "report.png")
    given = parser.parse_args()
    draw(given.page, given.out)
