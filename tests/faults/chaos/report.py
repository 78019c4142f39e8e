"""Report of a run, as JSON for programs and as Markdown for people."""

import subprocess
from pathlib import Path

import msgspec

from tests.faults.chaos.run import Report

__all__ = ["write"]

#: Violations that the page names; the JSON has them all.
SHOWN_MAX = 30


def write(report: Report, folder: Path) -> str:
    """Write the report as JSON and as a page into this folder; returns the page."""
    folder.mkdir(parents=True, exist_ok=True)
    summary = msgspec.to_builtins(report) | {"violations": report.violations}
    (folder / "chaos.json").write_bytes(msgspec.json.format(msgspec.json.encode(summary)))
    page = page_of(report)
    (folder / "chaos.md").write_text(page, encoding="utf-8")
    return page


def commit() -> str:
    """The commit of the working tree."""
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return found.stdout.strip() or "none"


def page_of(report: Report) -> str:
    """The page: the verdict first, then its evidence."""
    violations = report.violations
    judged = [sale.judgement for sale in report.sales]
    rows = [
        ("seed", report.plan.seed),
        ("attack, s", f"{report.seconds:.0f}"),
        ("all settled after another, s", f"{report.settled_seconds:.0f}"),
        ("sales", len(report.sales)),
        ("calls", f"{report.calls:,}"),
        ("responses checked", f"{report.answers:,}"),
        ("refusals among them", f"{sum(one.refusals for one in judged):,}"),
        ("events folded", f"{report.events:,}"),
        ("observations compared", f"{sum(one.heads for one in judged):,}"),
        ("orders compared with SQL", f"{sum(one.orders_compared for one in judged):,}"),
        ("orders compared with the PG's money", f"{sum(one.money_compared for one in judged):,}"),
        ("calls of unknown outcome", f"{sum(one.unknown for one in judged):,}"),
        ("answers that say nothing of the sale", f"{sum(one.not_judged for one in judged):,}"),
        ("faults", len(report.faults)),
        ("kinds of faults", len(report.kinds)),
        ("calls cut off by their client", report.disconnects),
        ("payments undecided at the end", report.undecided),
        ("violations", len(violations)),
    ]
    if report.plan.hosts:
        rows[1:1] = [("layout", report.plan.hosts), ("commit", commit())]
        rows[-1:-1] = [
            (
                "outcomes withheld until replicas acknowledge",
                sum(one.unacknowledged for one in judged),
            ),
            ("rebuilds of sales that lost events", report.rebuilds),
            (
                "payments of lost holds left undecided",
                sum(one.payments_left for one in report.sales),
            ),
            ("holds lost, each told so", sum(sale.holds_lost for sale in report.sales)),
            (
                "longest time from a fork to its rebuild, s",
                f"{max((sale.loss_seconds for sale in report.sales), default=0.0):.0f}",
            ),
            ("answers of the time of a loss", f"{sum(one.unjudged for one in report.sales):,}"),
        ]
    lines = ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows), ""]
    lines += ["| fault | times |", "|---|---|"]
    lines += [f"| {kind} | {count} |" for kind, count in report.kinds.most_common()]
    lines += ["", *(f"- {one}" for one in violations[:SHOWN_MAX])]
    return "\n".join(lines).rstrip() + "\n"
