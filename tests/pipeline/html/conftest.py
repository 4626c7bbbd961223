"""A result folder of the small network with narrow formats, what pages are drawn from; and a browser."""

from __future__ import annotations

import dataclasses
import html
import html.parser
import json
import pathlib
import re
import shutil
import subprocess
import tempfile
from typing import Any

import numpy as np
import pytest

from postquant.pipeline.api import quantize
from postquant.pipeline.config import Method, QuantConfig

BROWSERS = ("chromium", "chromium-browser", "google-chrome")

# Opens a page in a frame of a given width, looks at it, and writes down what it saw.
_FRAME = """<!doctype html><meta charset="utf-8"><body><iframe id="f" src="{name}" style="width:{width}px;height:900px;
border:0"></iframe><pre id="seen"></pre><script>
document.getElementById("f").addEventListener("load", event => {{
  const page = event.target.contentDocument, root = page.documentElement;
  const pictures = [...page.querySelectorAll("svg[role=img]")];
  const inside = e => e.closest(".box, nav") !== null;
  const beyond = e => e.getBoundingClientRect().right > root.clientWidth + 1;
  document.getElementById("seen").textContent = JSON.stringify({{
    overflow: root.scrollWidth - root.clientWidth,
    wide: [...page.querySelectorAll("body *")].filter(e => !inside(e) && beyond(e))
      .map(e => e.tagName + "." + e.getAttribute("class")).slice(0, 5),
    pictures: pictures.length,
    empty: pictures.filter(p => p.checkVisibility() && p.getBoundingClientRect().height < 20).length,
    background: getComputedStyle(page.body).backgroundColor,
    title: page.title,
  }});
}});
</script>"""


@dataclasses.dataclass(frozen=True)
class Browser:
    """A headless browser.

    Attributes:
        program: Its file.
    """

    program: str

    def look(self, page: bytes, *, width: int, dark: bool = False) -> tuple[dict[str, Any], list[str]]:
        """Opens a page.

        Args:
            page: HTML.
            width: Width of the window, CSS pixels.
            dark: Whether the reader prefers dark pages.

        Returns:
            What the frame's script saw, and the lines of the console.
        """
        with tempfile.TemporaryDirectory() as name:
            folder = pathlib.Path(name)
            (folder / "page.html").write_bytes(page)
            (folder / "frame.html").write_text(_FRAME.format(name="page.html", width=width), encoding="utf-8")
            command = [
                self.program,
                "--headless=new",
                "--no-sandbox",  # which root cannot have
                "--disable-gpu",
                "--hide-scrollbars",
                "--allow-file-access-from-files",
                "--enable-logging=stderr",
                f"--user-data-dir={folder / 'profile'}",
                f"--blink-settings=preferredColorScheme={0 if dark else 1}",
                "--virtual-time-budget=3000",
                "--dump-dom",
                (folder / "frame.html").as_uri(),
            ]
            done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
            found = re.search(r'<pre id="seen">(.*?)</pre>', done.stdout, re.DOTALL)
            assert found is not None, done.stderr
            assert found.group(1), done.stderr
            console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
            return json.loads(html.unescape(found.group(1))), console


@pytest.fixture(scope="session")
def browser() -> Browser:
    """Chromium, or one of its family."""
    program = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if program is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is installed")
    return Browser(program)


@pytest.fixture(scope="session")
def result(cases: Any, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Folder of a real result: 4-bit weights and activations, a residual sum, nodes in float."""
    out: pathlib.Path = tmp_path_factory.mktemp("result") / "out"
    rng = np.random.default_rng(5)
    samples = [{"image": rng.normal(size=(1, 3, 16, 16)).astype(np.float32)} for _ in range(4)]
    config = QuantConfig(wbits=4, abits=4, method=Method.MINMAX, bundle=False, compare_onnxruntime=True)
    quantize(cases.float_model(cases.cnn), samples, config, out=out)
    return out


class Outline(html.parser.HTMLParser):
    """Elements that are open, texts and ids of a page; complains about unbalanced elements."""

    EMPTY = frozenset({"meta", "link", "br", "rect", "line", "circle", "path"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.problems: list[str] = []
        self.tags: dict[str, int] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] = self.tags.get(tag, 0) + 1
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("href", "src"):
                self.links.append(value or "")
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.EMPTY:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.problems.append(f"</{tag}> at {self.getpos()}")


@pytest.fixture
def outline() -> Outline:
    """A reader of pages."""
    return Outline()
