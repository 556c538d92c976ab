"""A diagnosis on the terminal."""

from __future__ import annotations

from rich.console import Group
from rich.table import Table
from rich.text import Text

from parley.data.doctor.findings import Diagnosis, Finding
from parley.text import visible

STYLES = {"error": "bold red", "warning": "yellow", "note": "cyan"}
NOTHING = "no faults found"


def to_terminal(diagnosis: Diagnosis) -> Group:
    """What the data set holds, then its findings, worst first, each with its cure."""
    facts = Table(box=None, pad_edge=False, show_header=False)
    facts.add_column(style="dim", no_wrap=True)
    facts.add_column(overflow="fold")
    for name, value in diagnosis.facts():
        facts.add_row(name, Text(visible(value)))
    if not diagnosis.findings:
        return Group(facts, Text(f"\n{NOTHING}", "green"))
    findings = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 1, 0))
    findings.add_column(justify="right", no_wrap=True)
    findings.add_column(overflow="fold")
    for finding in diagnosis.findings:
        findings.add_row(*_cells(finding))
    return Group(facts, Text(), findings)


def _cells(finding: Finding) -> tuple[Text, Text]:
    style = STYLES[finding.severity]
    count = Text.assemble((f"{finding.rows.count:,}", style), "\n", (finding.share_text(), "dim"))
    found = Text.assemble((finding.severity, style), f": {finding.what} ", (visible(str(finding.rows)), "dim"))
    if finding.example:
        found.append(f"\n{visible(finding.example)}", "dim italic")
    found.append(f"\ncure: {finding.cure}")
    return count, found
