"""Whether a written result keeps its budget: :func:`with_budget`.

The bits are chosen on quick scales. What counts is the file as it is written, and its outputs after all stages.
"""

from __future__ import annotations

import dataclasses

from postquant.pipeline.budget import Budget, BudgetKind
from postquant.pipeline.report import Report, StageReport


def with_budget(report: Report) -> Report:
    """The report with a stage that says that a budget of size or quality is kept, or a note that it is not.

    Bit operations depend on the bits alone, which no later stage changes; nothing is added for them.

    Args:
        report: Complete with ``size_after`` and ``outputs``.
    """
    text = report.settings.get("budget")
    if text is None:
        return report
    budget = Budget.read(text)
    if budget.kind is BudgetKind.SIZE:
        limit = budget.limit(report.size_before)
        kept, found = report.size_after <= limit, f"the file has {report.size_after:,} of {limit:,.0f} bytes"
    elif budget.kind is BudgetKind.SQNR and report.outputs:
        worst = min(output.sqnr_db for output in report.outputs)
        kept, found = worst >= budget.value, f"the outputs have {worst:.2f} dB, {budget.value:g} were asked for"
    else:
        return report
    if kept:
        stage = StageReport(name="budget", detail=f"{text} is kept: {found}")
        return dataclasses.replace(report, stages=(*report.stages, stage))
    return dataclasses.replace(report, notes=(*report.notes, f"the budget {text} is not kept: {found}"))
