"""What became of a call."""

from dataclasses import dataclass


class CallError(Exception):
    """A call that failed. The text is what the caller has seen, without numbers that differ from call to call."""


@dataclass
class Call:
    """One call of the load. `begun` and `ended` are seconds of the monotonic clock; `failure` is None for a good call."""

    kind: str
    identity: str
    begun: float
    ended: float
    failure: str | None


def refusal_of(status, fields):
    """A status other than 200, with the local reply of hopguard if it is one."""
    details = fields.get("proxy-status", "").partition('details="')[2]
    return f"{status} {details.partition(':')[0]}".strip()
