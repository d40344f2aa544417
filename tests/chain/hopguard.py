"""hopguard as a subject of the chain lab. Binary: $HOPGUARD, else target/release/hopguard of this checkout.

Each sidecar is one process with an outbound listener (`forward: true`) and one inbound listener for each app. What a case
does not ask for is left at hopguard's built-in values. Differences to what the lab asks:

- The lab's breaker takes an endpoint out after so many failures in a row: hopguard's `ejection`. hopguard has a
  `circuitBreaker` for the whole destination too, which counts the same; how long it stays open is left at the built-in value,
  because it looks for recovery by itself. Where the lab asks for no breaker, both are off.
- The budget is a token bucket and always on; the lab's share of calls becomes its `ratio`.
- `everything` and `503` are turned into conditions; which methods may be tried again stays hopguard's own rule.
- gRPC methods are not declared idempotent: without that, hopguard does not try them again.
"""
import json
import os
import urllib.request
from pathlib import Path

SUPPORTS = {"outbound", "inbound", "retry", "breaker", "deadline", "reload", "grpc"}
ROOT = Path(__file__).resolve().parent.parent.parent
CONDITIONS = {
    "503": [502, 503, 504, "reset", "timeout", "unavailable"],
    "recommended": ["reset"],
    "everything": [502, 503, 504, "reset", "timeout", "unavailable"],
}


def command(spec):
    write(spec)
    binary = os.environ.get("HOPGUARD") or ROOT / "target/release/hopguard"
    return [binary, "run", "--policy", spec.folder / "policy.yaml", "--admin", f"127.0.0.1:{spec.admin}",
            "--workers", "1", "--drain-delay", "0s"]


def change(spec):
    """The rules in the spec have changed: put them in force."""
    write(spec)


def break_config(spec, number):
    """Write a policy that is wrong, each time in another way."""
    good = json.dumps(policy(spec), indent=1)
    broken = ["destinations: [", good.replace('"timeouts"', '"timeout"', 1), good.replace('"kind": "Policy"', '"kind": 7')]
    replace(spec.folder / "policy.yaml", broken[number % len(broken)])


def reload_counts(spec):
    """(changes taken up, changes refused), since the start."""
    found = metrics(spec, "hopguard_policy_reloads_total")
    count = lambda result: int(sum(value for name, value in found.items() if f'result="{result}"' in name))
    return count("ok"), count("failed")


def evidence(spec):
    """hopguard's own counters of what the lab measures from outside; only those that are not zero."""
    names = ("hopguard_requests_total", "hopguard_retries", "hopguard_circuit_breaker", "hopguard_ejection", "hopguard_correlations")
    return {name: value for prefix in names for name, value in metrics(spec, prefix).items() if value}


def metrics(spec, prefix):
    with urllib.request.urlopen(f"http://127.0.0.1:{spec.admin}/metrics", timeout=5) as answer:
        lines = answer.read().decode().splitlines()
    pairs = (line.rsplit(" ", 1) for line in lines if line.startswith(prefix))
    return {name: float(value) for name, value in pairs}


def write(spec):
    replace(spec.folder / "policy.yaml", json.dumps(policy(spec), indent=1))


def replace(path, text):
    fresh = path.with_suffix(".new")
    fresh.write_text(text)
    fresh.rename(path)


def policy(spec):
    listeners = [{"name": f"in{app}", "bind": f"127.0.0.1:{listen}", "to": f"app{app}"} for listen, app in spec.inbound]
    destinations = [{"name": f"app{app}", "endpoints": [f"127.0.0.1:{app}"], "timeouts": {"request": "30s"}}
                    for _, app in spec.inbound]
    if spec.destinations:
        listeners.append({"name": "out", "bind": f"127.0.0.1:{spec.outbound}", "forward": True})
        destinations += [destination(host, ports, spec.rules[host]) for host, ports in spec.destinations.items()]
    modes = {} if all(rules.deadline for rules in spec.rules.values()) else {"rules": {"deadline": "off"}}
    return {"apiVersion": "hopguard.dev/v1alpha1", "kind": "Policy", "service": spec.service, **modes,
            "accessLog": {"mode": "all", "format": "text"}, "listeners": listeners, "destinations": destinations}


def destination(host, ports, rules):
    timeouts = {"request": f"{rules.timeout_ms}ms"}
    if rules.retry.per_try_ms:
        timeouts["perTry"] = f"{rules.retry.per_try_ms}ms"
    made = {"name": host, "hosts": [host], "endpoints": [f"127.0.0.1:{port}" for port in ports], "timeouts": timeouts,
            "circuitBreaker": "off", "ejection": "off"}
    if rules.retry.on == "off":
        made["retry"] = "off"
    elif rules.retry.on != "default":
        made["retry"] = {"attempts": rules.retry.attempts, "on": CONDITIONS[rules.retry.on]}
        if rules.retry.budget_percent:
            made["retry"]["budget"] = {"ratio": rules.retry.budget_percent / 100}
    if rules.breaker:
        made["circuitBreaker"] = {"consecutiveFailures": rules.breaker.consecutive}
        made["ejection"] = {"consecutiveFailures": rules.breaker.consecutive, "ejectFor": f"{round(rules.breaker.open_s * 1000)}ms"}
    limits = {"inFlight": rules.in_flight, "queue": rules.queue}
    if any(value is not None for value in limits.values()):
        made["limits"] = {name: value for name, value in limits.items() if value is not None}
    if rules.idle_ms:
        made["connections"] = {"idle": f"{rules.idle_ms}ms"}
    return made
