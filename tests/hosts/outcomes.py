"""A pytest plugin: one line of JSON for every test, with its outcome and the reason of a skip or a failure."""

from __future__ import annotations

import json
import os

import pytest


@pytest.hookimpl(trylast=True)
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    # A worker of xdist hands its reports to the process that began it, which writes them down.
    if os.environ.get("PYTEST_XDIST_WORKER") or (report.when != "call" and report.passed):
        return
    reason = ""
    if report.skipped:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        reason = reason.removeprefix("Skipped: ")
    elif report.failed:
        crash = getattr(report.longrepr, "reprcrash", None)
        reason = str(crash.message if crash is not None else report.longrepr).partition("\n")[0]
    line = {"test": report.nodeid.partition("::")[2], "outcome": report.outcome, "reason": reason[:300]}
    line["seconds"] = round(report.duration, 2)
    with open(os.environ["HOST_TESTS_OUTCOMES"], "a") as file:
        file.write(json.dumps(line) + "\n")
