"""Tables of latencies: a row for each thing that is run, a column for each way of running it."""

from __future__ import annotations

from typing import Any

Line = dict[str, Any]

PARTS = ["layers", "quantizers", "networks"]
# Kind of reference -> how the names of such contestants begin. The fastest of a kind counts.
REFERENCES = {"fp32": "fp32", "int8": "int8", "MatMulNBits": "MatMulNBits", "QuantizeLinear": "QuantizeLinear"}


def markdown(lines: list[Line]) -> str:
    """One table per part: microseconds, and in brackets ratios by least times and by medians of rounds.

    Ratios of layers and networks are speeds (above 1: faster than the reference), those of quantizers are times.
    """
    tables = []
    for part in PARTS:
        chosen = [line for line in lines if line["part"] == part]
        if chosen:
            tables.append(_table(part, chosen))
    return "\n\n".join(tables)


def _table(part: str, lines: list[Line]) -> str:
    ways = list(dict.fromkeys(line["way"] for line in lines if line["way"]))
    kinds = [kind for kind in REFERENCES if any(_is_of(kind, line) for line in lines)]
    against = {way: [kinds[-1]] if part == "quantizers" else _against(way, kinds) for way in ways}
    heads = ["", "threads", *(f"{kind} us" for kind in kinds)]
    heads += [
        f"{way} us ({'; '.join(('x ' if part != 'quantizers' else '/ ') + k for k in against[way])})" for way in ways
    ]
    rows = ["| " + " | ".join(heads) + " |", "|---|" + "---:|" * (len(heads) - 1)]
    cases = dict.fromkeys((line["model"], line["setting"]) for line in lines)
    for model, setting in cases:
        case = [line for line in lines if (line["model"], line["setting"]) == (model, setting)]
        references = [_least(kind, case) for kind in kinds]
        for subject in dict.fromkeys(line["subject"] for line in case if line["way"]):
            by_way = {line["way"]: line for line in case if line["subject"] == subject}
            cells = [f"{model}, {subject}", setting.split()[0], *references]
            cells += [_cell(by_way.get(way), against[way], part == "quantizers") for way in ways]
            rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def _against(way: str, kinds: list[str]) -> list[str]:
    wanted = ["int8"] if way == "no library" else ["int8", "MatMulNBits"]
    return [kind for kind in wanted if kind in kinds]


def _is_of(kind: str, line: Line) -> bool:
    return not line["way"] and str(line["subject"]).startswith(REFERENCES[kind])


def _least(kind: str, case: list[Line]) -> str:
    times = [line["best_us"] for line in case if _is_of(kind, line) and "best_us" in line]
    return f"{min(times):.0f}" if times else ""


def _cell(line: Line | None, kinds: list[str], as_time: bool) -> str:
    if line is None or "best_us" not in line:
        return "failed" if line is not None else ""
    ratios = []
    for kind in kinds:
        if f"{kind}_best" in line:
            pair = [line[f"{kind}_best"], line[f"{kind}_median"]]
            ratios.append(", ".join(f"{1 / ratio if as_time else ratio:.2f}" for ratio in pair))
    return f"{line['best_us']:.0f} ({'; '.join(ratios)})"
