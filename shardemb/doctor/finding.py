"""What was found, and the table of it. Looks at nothing itself."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        subject: What.
        state: "ok", "note" (works, could be better) or "problem" (does not work).
        text: What was found.
        remedy: What to type, where it is not ok.
    """

    subject: str
    state: Literal["ok", "note", "problem"]
    text: str
    remedy: str = ""


def report(findings: list[Finding]) -> str:
    """The findings as a table, with what to type under each that is not ok, and their number."""
    width = max(len(finding.subject) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{finding.state:<7}  {finding.subject:<{width}}  {finding.text}")
        if finding.remedy:
            lines.append(f"{'':<7}  {'':<{width}}  -> {finding.remedy}")
    states = [finding.state for finding in findings]
    problems, notes = states.count("problem"), states.count("note")
    plural = "problem" if problems == 1 else "problems", "note" if notes == 1 else "notes"
    return "\n".join([*lines, "", f"{problems} {plural[0]}, {notes} {plural[1]}"])
