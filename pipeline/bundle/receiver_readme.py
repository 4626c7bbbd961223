"""``README.md`` of a bundle: what its receiver needs to know, in two minutes (:func:`receiver_readme`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from postquant.pipeline.bundle.manifest import ModelEntry
from postquant.pipeline.conformance.expected import Conformance
from postquant.pipeline.report import Report

_FILES = (
    ("model.onnx", "the quantized model; operators of `ai.postquant`, if any, are defined in it by standard ones"),
    ("model.qdq.onnx", "the same in standard ONNX operators only (QuantizeLinear, DequantizeLinear)"),
    ("plan.safetensors", "every decision: scales, zero points, codes"),
    ("encodings/", "the same numbers in the formats of tool chains; `index.json` says what each could not say"),
    ("conformance/", "inputs, the integers that every quantized tensor must have for them, and the outputs"),
    ("report.html", "how the model was quantized and how good it is, for a browser"),
    ("report.json", "the same for programs"),
    ("statistics.json", "histograms that the report is drawn from"),
    ("quant.toml", "the settings that it was made with"),
    ("manifest.json", "digests of all files, versions, operators, what a runtime must support"),
)


def receiver_readme(
    report: Report, models: Mapping[str, ModelEntry], conformance: Conformance | None, notes: Sequence[str]
) -> bytes:
    """The text.

    Args:
        report: What was done.
        models: What each model file needs.
        conformance: The conformance data, None where there are none.
        notes: What is not as one might expect.
    """
    widths = sorted({(layer.wbits or 8, layer.abits or 8) for layer in report.layers}, reverse=True)
    made = (
        f"Made by postquant {report.versions.get('postquant', '')} for the target `{report.target}` from "
        f"{report.samples} calibration samples: {len(report.layers)} layers with weights and activations of "
        f"{', '.join(f'{w}/{a}' for w, a in widths) or '8/8'} bits, {report.size_before / 1e6:.2f} MB before, "
        f"{report.size_after / 1e6:.2f} MB after."
    )
    lines = [f"# {report.model}, quantized", "", made, ""]
    for output in report.outputs:
        agreement = "" if output.agreement is None else f", same largest class in {100 * output.agreement:.2f} %"
        lines.append(f"* output `{output.name}`: SQNR {output.sqnr_db:.1f} dB against the float model{agreement}")
    lines += ["", "| file | what it is |", "|---|---|"]
    present = {name.split("/")[0] for name in report.files} | {"report.json", "quant.toml", "manifest.json"}
    present |= {*models, "encodings", "report.html"} | ({"conformance"} if conformance is not None else set())
    lines += [f"| `{name}` | {text} |" for name, text in _FILES if name.rstrip("/") in present]
    if notes:
        lines += ["", "## Note", "", *(f"* {note}" for note in notes)]
    for name, entry in models.items():
        operators = ", ".join(f"{op} ({count})" for op, count in entry.operators.items())
        opsets = ", ".join(f"{domain or 'ONNX'} {version}" for domain, version in entry.opsets.items())
        lines += ["", f"## What `{name}` needs", "", f"Operator sets: {opsets}. Operators: {operators}."]
        if entry.features:
            lines += ["", "A runtime must support:", "", *(f"* {feature}" for feature in entry.features)]
    lines += ["", "## Check it", "", "    postquant verify .          # digests, signature, integers"]
    if conformance is not None:
        feed = (
            f"`conformance/` holds {conformance.samples} samples ({conformance.source}). Feed `0/inputs.npz` to your "
            "runtime, dump the quantized tensors as `.npy`, `.npz` or raw files named like the tensors, and run"
        )
        lines += [
            "",
            feed,
            "",
            "    postquant conformance . --outputs DUMPS",
            "",
            "It names the first layer that departs, by how much, and which rounding rule would explain it.",
            "",
            conformance.tolerance,
        ]
    return ("\n".join(lines) + "\n").encode()
