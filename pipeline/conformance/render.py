"""A comparison as JSON, JUnit XML or HTML: :func:`json_values`, :func:`to_junit`, :func:`to_html`."""

from __future__ import annotations

import html
import math
from typing import Any
from xml.etree import ElementTree

from postquant.pipeline.conformance.result import OutputResult, Result, Status, TensorResult


def json_values(result: Result) -> Any:
    """JSON values; numbers that JSON does not have become None."""
    return _finite(result.to_json())


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def to_junit(result: Result) -> str:
    """JUnit XML: one test case per tensor and output, as continuous integration reads it."""
    count = len(result.tensors) + len(result.outputs)
    failures = sum(tensor.failed for tensor in result.tensors) + sum(output.failed for output in result.outputs)
    skipped = sum(tensor.status is Status.MISSING for tensor in result.tensors)
    suite = ElementTree.Element(
        "testsuite", name="conformance", tests=str(count), failures=str(failures), skipped=str(skipped), errors="0"
    )
    for tensor in result.tensors:
        name = _printable(tensor.tensor.codes)
        case = ElementTree.SubElement(suite, "testcase", classname=f"tensor.{tensor.tensor.operator}", name=name)
        if tensor.failed:
            ElementTree.SubElement(case, "failure", message=_printable(tensor.text), type=tensor.status.value)
        elif tensor.status is Status.MISSING:
            ElementTree.SubElement(case, "skipped", message=tensor.status.value)
    for output in result.outputs:
        case = ElementTree.SubElement(suite, "testcase", classname="output", name=_printable(output.name))
        if output.failed:
            ElementTree.SubElement(case, "failure", message=_printable(output.text), type="output")
    ElementTree.indent(suite)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(suite, encoding="unicode") + "\n"


def _printable(text: str) -> str:
    """XML has no control characters."""
    return "".join(c if c.isprintable() else "?" for c in text)


_STYLE = """
:root { color-scheme: light dark; --line: #d0d4da; --bad: #b3261e; --good: #1b6e3c; --dim: #667 }
@media (prefers-color-scheme: dark) { :root { --line: #444a52; --bad: #ff8a80; --good: #7fd6a0; --dim: #9aa4b2 } }
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem }
.box { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; width: 100% }
th, td { border-bottom: 1px solid var(--line); padding: .3rem .6rem; text-align: left; vertical-align: top }
td.n, th.n { text-align: right }
.bad { color: var(--bad); font-weight: 600 } .good { color: var(--good) } .dim { color: var(--dim) }
p { overflow-wrap: anywhere }
"""


def to_html(result: Result) -> str:
    """One self-contained page."""
    verdict = "conforms" if result.passed else "departs"
    kind = "good" if result.passed else "bad"
    rows = "\n".join(_row(tensor) for tensor in result.tensors)
    outputs = "".join(_item(output) for output in result.outputs)
    unknown = ""
    if result.unknown:
        names = html.escape(", ".join(result.unknown[:20]))
        unknown = f'<p class="dim">Names that the bundle does not know: {names}.</p>'
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Conformance: {verdict}</title><style>{_STYLE}</style></head>
<body><main><h1>Conformance: <span class="{kind}">{verdict}</span></h1>
<p>{html.escape(result.summary)}.</p>{f"<ul>{outputs}</ul>" if outputs else ""}{unknown}
<div class="box"><table><thead><tr><th>tensor</th><th>operator</th><th>result</th><th class="n">codes</th>
<th class="n">ties</th><th class="n">wrong</th><th class="n">worst</th><th>explanation</th></tr></thead>
<tbody>
{rows}
</tbody></table></div></main></body></html>
"""


def _item(output: OutputResult) -> str:
    kind = "bad" if output.failed else "good"
    return f'<li class="{kind}">{html.escape(output.text or f"output {output.name} agrees")}</li>'


def _row(tensor: TensorResult) -> str:
    kind = "bad" if tensor.failed else "dim" if tensor.status is Status.MISSING else "good"
    why = tensor.detail or "; ".join(fit.text for fit in tensor.fits)
    if not why and tensor.failed:
        why = "no rule that was tried explains it"
    numbers = "".join(f'<td class="n">{n}</td>' for n in (tensor.codes, tensor.ties, tensor.mismatches, tensor.worst))
    name, operator = html.escape(tensor.tensor.codes), html.escape(tensor.tensor.operator)
    status = html.escape(tensor.status.value)
    cells = f'<td>{name}</td><td>{operator}</td><td class="{kind}">{status}</td>{numbers}<td>{html.escape(why)}</td>'
    return f"<tr>{cells}</tr>"
