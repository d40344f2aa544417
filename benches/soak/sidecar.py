"""hopguard with its built-in values: once in front of the app (inbound) and once beside the caller (outbound)."""

import asyncio
import os
import subprocess
import time

from soak.http1 import Caller
from soak.outcome import CallError

POLICY = """apiVersion: hopguard.dev/v1alpha1
kind: Policy
service: soak
accessLog: { mode: errors }
listeners:
  - { name: inbound, bind: "127.0.0.1:INBOUND", to: inbound, direction: inbound }
  - { name: outbound, bind: "127.0.0.1:OUTBOUND", to: outbound, direction: outbound }
destinations:
"""
DESTINATION = """  - name: NAME
    endpoints: ["127.0.0.1:UPSTREAM"]
    routes:
      - { name: events, match: { path: /events }, stream: true }
      - { name: grpc-events, match: { grpc: peer.Peer/Events }, stream: true }
"""
SIDES = ("inbound", "outbound")
POLL_SECONDS = 0.1


class Sidecar:
    def __init__(self, binary, folder, upstream, ports):
        self.binary, self.folder, self.upstream = binary, folder, upstream
        self.ports = dict(zip((*SIDES, "admin"), ports))
        self.process = None
        # (moment, side, state) of each change of a circuit breaker.
        self.changes = []
        self.counts = {}

    async def start(self):
        text = POLICY + "".join(DESTINATION.replace("NAME", side) for side in SIDES)
        for name, port in (*self.ports.items(), ("upstream", self.upstream)):
            text = text.replace(name.upper(), str(port))
        policy = os.path.join(self.folder, "policy.yaml")
        with open(policy, "w", encoding="utf-8") as file:
            file.write(text)
        command = [self.binary, "run", "--policy", policy, "--admin", f"127.0.0.1:{self.ports['admin']}"]
        with open(os.path.join(self.folder, "hopguard.access"), "wb") as access, open(os.path.join(self.folder, "hopguard.log"), "wb") as log:
            self.process = await asyncio.create_subprocess_exec(*command, stdin=subprocess.DEVNULL, stdout=access, stderr=log)
        end = time.monotonic() + 10
        while time.monotonic() < end and self.process.returncode is None:
            try:
                await Caller(self.ports["admin"], keep=False).call("GET", "/metrics")
                return
            except CallError:
                await asyncio.sleep(0.05)
        raise RuntimeError(f"hopguard does not start; see {self.folder}/hopguard.log")

    async def watch(self):
        """Notes each change of a circuit breaker."""
        admin = Caller(self.ports["admin"])
        while True:
            for line in (await admin.call("GET", "/metrics")).decode().splitlines():
                if line.startswith("hopguard_circuit_breaker_changes_total{"):
                    self.note(line)
            await asyncio.sleep(POLL_SECONDS)

    def note(self, line):
        labels, _, value = line.rpartition(" ")
        side = next(side for side in SIDES if f'destination="{side}"' in labels)
        state = labels.partition('state="')[2].partition('"')[0]
        more = int(float(value)) - self.counts.get((side, state), 0)
        self.counts[side, state] = int(float(value))
        self.changes += [(time.monotonic(), side, state)] * more

    async def stop(self):
        if self.process and self.process.returncode is None:
            self.process.kill()
            await self.process.wait()
