"""Counts the calls of a run and judges them; the tables of the soak in Markdown."""

import math
from collections import Counter

from soak.sidecar import SIDES

TARGETS = ("direct", *SIDES)
# A circuit breaker may open when fresh connections failed at most this time before: its change is read every 100 ms.
BEFORE_SECONDS = 1.0
# Share of the calls that may fail through hopguard beyond those that fail directly: the callers of both begin and end an outage at moments
# of their own.
ALLOWANCE = 0.001
WITH_IDENTITY = ("POST", "upload", "gRPC", "gRPC spread")


class Result:
    """What became of the calls to one upstream."""

    def __init__(self, server, version, loads, sidecar):
        self.name, self.version = server.kind.name, version
        self.restarts = Counter(way for _, way in server.restarts)
        self.probes = server.probes
        self.calls = {load.target: load.calls for load in loads}
        self.skipped = {load.target: load.skipped for load in loads}
        self.executed = Counter(server.executed())
        self.changes = sidecar.changes

    def kinds(self):
        return list(dict.fromkeys(call.kind for calls in self.calls.values() for call in calls))

    def of(self, target, kind):
        return [call for call in self.calls[target] if call.kind == kind]

    def failed(self, target, kind):
        return [call for call in self.of(target, kind) if call.failure]

    def in_outage(self, call):
        """Whether a fresh connection failed while the call was under way."""
        return any(not reached and begun <= call.ended and ended >= call.begun - 0.06 for begun, ended, reached in self.probes)

    def stray(self, target, kind):
        """Failed calls to a server that fresh connections reached."""
        return [call for call in self.failed(target, kind) if not self.in_outage(call)]

    def openings(self, side):
        """How often the circuit breaker opened, and how often of these while fresh connections reached the server."""
        moments = [moment for moment, of, state in self.changes if (of, state) == (side, "open")]
        failed = [ended for _, ended, reached in self.probes if not reached]
        unfounded = [moment for moment in moments if not any(moment - BEFORE_SECONDS <= end <= moment + 0.2 for end in failed)]
        return len(moments), len(unfounded)

    def outage_seconds(self):
        total, since = 0.0, None
        for begun, _, reached in self.probes:
            if not reached and since is None:
                since = begun
            if reached and since is not None:
                total, since = total + begun - since, None
        return total

    def fates(self, target, kind):
        """Of failed calls with an identity: never executed, executed although the caller got no answer. Of all: executed twice."""
        failed = self.failed(target, kind)
        executed = sum(1 for call in failed if self.executed[call.identity])
        twice = sum(1 for call in self.of(target, kind) if self.executed[call.identity] > 1)
        return len(failed) - executed, executed, twice

    def faults(self):
        found = []
        for kind in self.kinds():
            allowed = math.ceil(ALLOWANCE * len(self.of("direct", kind)))
            for side in SIDES:
                found += self.faults_of(side, kind, allowed)
        for side in SIDES:
            if unfounded := self.openings(side)[1]:
                found.append(f"{self.name}, {side}: the circuit breaker opened {unfounded} times while fresh connections were answered")
        return found

    def faults_of(self, side, kind, allowed):
        found = []
        for failed, when in ((self.failed, ""), (self.stray, " while fresh connections were answered")):
            directly, through = len(failed("direct", kind)), len(failed(side, kind))
            if through > directly + allowed:
                found.append(f"{self.name}, {kind}, {side}: {through} failed{when}, {directly} directly")
        if kind in WITH_IDENTITY:
            unrecorded = sum(1 for call in self.of(side, kind) if not call.failure and not self.executed[call.identity])
            counts = ((self.fates(side, kind)[2], "executed twice"), (unrecorded, "answered and not executed"))
            found += [f"{self.name}, {kind}, {side}: {count} {what}" for count, what in counts if count]
        return found


def row(cells):
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def table(head, rows):
    return "\n".join([row(head), "|" + "---|" * len(head), *(row(cells) for cells in rows)])


def counted(failed, stray):
    return f"{failed} ({stray})" if failed else "0"


def markdown(results):
    head = ["upstream", "call", "sent", "failed directly", *(f"failed, {side}" for side in SIDES)]
    rows = [
        [result.name, kind, "/".join(str(len(result.of(target, kind))) for target in TARGETS),
         *(counted(len(result.failed(target, kind)), len(result.stray(target, kind))) for target in TARGETS)]
        for result in results for kind in result.kinds()
    ]
    parts = [
        "Failed calls; in brackets those of them that failed while fresh connections were answered. Sent: directly/inbound/outbound.",
        table(head, rows),
        servers(results),
        identities(results),
        failures(results),
        verdict(results),
    ]
    return "\n\n".join(parts) + "\n"


def servers(results):
    head = ["upstream", "version", "restarts", "outage", *(f"breaker opened, {side}" for side in SIDES)]
    rows = []
    for result in results:
        restarts = ", ".join(f"{count} x SIG{way}" for way, count in result.restarts.items())
        openings = [counted(*result.openings(side)) for side in SIDES]
        rows.append([result.name, result.version, restarts, f"{result.outage_seconds():.1f} s", *openings])
    note = "Outage: time in which fresh connections failed. Breaker: in brackets the openings while fresh connections were answered."
    return note + "\n\n" + table(head, rows)


def identities(results):
    rows = [
        [result.name, kind, target, *result.fates(target, kind)]
        for result in results for kind in result.kinds() if kind in WITH_IDENTITY for target in TARGETS
        if any(result.fates(target, kind))
    ]
    return "Calls with an identity, which the app records.\n\n" + table(
        ["upstream", "call", "target", "failed, not executed", "failed, executed", "executed twice"], rows)


def failures(results):
    rows = []
    for result in results:
        for target in TARGETS:
            seen = Counter((call.failure, result.in_outage(call)) for call in result.calls[target] if call.failure)
            rows += [[result.name, target, text, "outage" if outage else "answered", count] for (text, outage), count in seen.most_common()]
    return "What the callers saw.\n\n" + table(["upstream", "target", "seen", "fresh connections", "calls"], rows)


def verdict(results):
    faults = [fault for result in results for fault in result.faults()]
    return "\n".join(["It does not hold:", *(f"- {fault}" for fault in faults)]) if faults else "It holds."
