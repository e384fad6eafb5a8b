"""Devices made of numpy: they join, get work and hand in random adapters, over the production transport."""

from __future__ import annotations

import contextlib
import hashlib
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edge_sdk.connection.transport import Transport
from edge_sdk.core.adapter_file.codec import encode
from edge_sdk.core.lora import LoraFactors
from edge_sdk.core.messages import Ask, Assignment, JoinRequest, NotNow, Status, Update, UpdateReply
from tests.processes import CoordinatorProcess, toml

SHAPES = {
    "model.layers.0.q_proj": (24, 16),
    "model.layers.0.up_proj": (40, 16),
    "model.layers.1.k_proj": (6, 16),
}
FINGERPRINT = "ab" * 32
SCALING = 2.0
LADDER = [2, 4, 8]


def configuration(
    folder: Path,
    policy: dict[str, object] | None = None,
    rule: str = "carry",
    privacy: dict[str, object] | None = None,
    limits: dict[str, object] | None = None,
    **admission: object,
) -> str:
    """A TOML file for the base of SHAPES, whose record it writes into `folder`."""
    base = folder / "base.json"
    base.write_text(json.dumps({"model": "made of numpy", "fingerprint": FINGERPRINT, "modules": SHAPES}))
    sections: dict[str, dict[str, object]] = {
        "federation": {"ladder": LADDER, "rank_cap": 12, "scaling": SCALING, "rule": rule},
        "policy": {"buffer_size": 2, "timeout_s": 600.0, "retry_s": 0.1} | (policy or {}),
        # Random adapters are no training: how far that gets does not bound them.
        "admission": {"reach_factor": 1e9} | admission,
    }
    if limits is not None:
        sections |= {"limits": limits}
    if privacy is not None:
        sections |= {"privacy": privacy, "admission": admission}
    return toml(sections, base)


def random_adapter(rank: int, seed: int, scale: float = 0.1) -> dict[str, LoraFactors]:
    draw = np.random.default_rng(seed)
    adapter = {}
    for name, (out, in_) in SHAPES.items():
        r = min(rank, out, in_)
        b, a = scale * draw.standard_normal((out, r)), draw.standard_normal((r, in_))
        adapter[name] = LoraFactors(b.astype(np.float32), a.astype(np.float32))
    return adapter


def update_of(content: bytes, rank: int, examples: int = 10) -> Update:
    """The record of an adapter file."""
    return Update(hashlib.sha256(content).hexdigest(), len(content), rank, examples, 20, 2.5, 1.5, 3.0)


@dataclass
class Device:
    """A member: its connection and what the coordinator calls it."""

    transport: Transport
    id: str
    credential: str
    host: Transport | None = None  # the host's own connection

    def status(self) -> Status:
        assert self.host is not None
        return self.host.status()

    def work(self, rank: int = 4) -> Assignment:
        answer = self.transport.ask(Ask(rank))
        assert isinstance(answer, Assignment), answer
        return answer

    def waits(self) -> bool:
        return isinstance(self.transport.ask(Ask(4)), NotNow)

    def send(self, assignment: Assignment, content: bytes) -> None:
        """Upload without saying what it is."""
        with tempfile.NamedTemporaryFile() as file:
            file.write(content)
            file.flush()
            self.transport.upload(assignment.id, Path(file.name))

    def hand_in(
        self, assignment: Assignment, content: bytes | None = None, seed: int = 0, rank: int | None = None
    ) -> UpdateReply:
        """Upload and deliver an adapter; random unless given, of the assigned rank unless it is another."""
        if content is None:
            content = encode(random_adapter(rank or assignment.rank, seed), SCALING)
        self.send(assignment, content)
        return self.transport.deliver(assignment.id, update_of(content, rank or assignment.rank))


@contextlib.contextmanager
def member(coordinator: CoordinatorProcess, name: str = "attic") -> Iterator[Device]:
    """Join and, at the end, hang up."""
    joining = Transport(coordinator.url, coordinator.join_token)
    try:
        reply = joining.join(JoinRequest(name, FINGERPRINT, {"system": "Linux"}))
    finally:
        joining.close()
    transport = Transport(coordinator.url, reply.credential)
    host = Transport(coordinator.url, coordinator.host_token)
    try:
        yield Device(transport, reply.device_id, reply.credential, host)
    finally:
        transport.close()
        host.close()
