"""What is fuzzed: whatever reads bytes of a stranger, of an owner's files, or of a disk that failed.

The contract of each target: only errors of the documented kinds, and what decodes encodes back to the same.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from coordinator.engine.policy import Policy
from coordinator.settings import FederationSettings
from edge_sdk.commands import destination
from edge_sdk.commands.device_config import load_device_config
from edge_sdk.connection.link_speed import LinkSpeed, load_link, save_link
from edge_sdk.connection.refusals import error_of
from edge_sdk.core import profile as profiles
from edge_sdk.core import records, toml_file
from edge_sdk.core.adapter_file import codec
from edge_sdk.core.choice.setting import Ranks, Setting
from edge_sdk.core.errors import AdapterError, EdgeError, InputError, ProtocolError, TooLarge
from edge_sdk.core.invitation import parse
from edge_sdk.core.messages import PROBLEM_CONTENT_TYPE, Assignment, JoinReply, Update
from edge_sdk.core.routes import ROUTES
from edge_sdk.membership import session as sessions
from edge_sdk.membership.journal import SESSION, Journal
from edge_sdk.model.files import file_digests
from edge_sdk.participation.corrections import Correction, Corrections
from edge_sdk.training.checkpoint import Progress, read_checkpoint, write_checkpoint
from tests.coordinator.devices import SCALING, SHAPES, random_adapter

Record = TypeVar("Record")
GOLDEN = Path(__file__).resolve().parents[1] / "golden"
KINDS: tuple[type[Any], ...] = tuple(
    dict.fromkeys(
        kind
        for route in ROUTES
        for kind in (route.body, *(answer.content for answer in route.answers))
        if isinstance(kind, type)
    )
)


@dataclass(frozen=True)
class HostFile:
    """Tables of a host's configuration."""

    base: str = "tiny"
    federation: FederationSettings = field(default_factory=FederationSettings)
    policy: Policy = field(default_factory=Policy)


@dataclass(frozen=True)
class Fuzzed:
    """What is fuzzed: `read` raises AssertionError where the contract is broken; `samples` are honest."""

    read: Callable[[bytes], None]
    samples: tuple[bytes, ...]


def adapter(content: bytes) -> None:
    """A file is refused by name, or its values encode to a file with the same values."""
    with held(content) as path:
        try:
            found = dict(codec.open_adapter(path, SHAPES, 4, SCALING, 1 << 20).modules())
        except (AdapterError, TooLarge) as error:
            assert "\n" not in str(error)
            return
        again = codec.encode(found, SCALING)
    with held(again) as path:
        reread = codec.open_adapter(path, SHAPES, 4, SCALING, 1 << 20)
        assert codec.encode(dict(reread.modules()), SCALING) == again


def header(content: bytes) -> None:
    """The check for a file that a coordinator sent: whole, or refused by name."""
    with held(content) as path:
        try:
            codec.require_whole(path)
        except (AdapterError, TooLarge) as error:
            assert "\n" not in str(error)


def record(content: bytes) -> None:
    """The first byte chooses the kind; what decodes is the same after a round."""
    kind = KINDS[content[0] % len(KINDS)] if content else KINDS[0]
    try:
        decoded = records.decode(kind, content[1:])
    except (ProtocolError, InputError, ValueError) as error:
        assert isinstance(error, EdgeError | UnicodeDecodeError | json.JSONDecodeError) or str(error)
        return
    assert records.decode(kind, records.encode(decoded)) == decoded


def problem(content: bytes) -> None:
    """Any answer becomes an error of the tree; the first byte chooses the status."""
    import httpx

    status = 400 + (content[0] if content else 0) % 200
    answer = httpx.Response(
        status,
        headers={"Content-Type": PROBLEM_CONTENT_TYPE},
        content=content[1:],
        request=httpx.Request("GET", "http://x/"),
    )
    assert isinstance(error_of(answer), EdgeError)


def toml(content: bytes) -> None:
    """A host's file is its tables or one error of input."""
    with held(content) as path, contextlib.suppress(InputError):
        toml_file.load(HostFile, path)


def device(content: bytes) -> None:
    """An owner's file is the options of its device or one error of input."""
    with held(content) as path, contextlib.suppress(InputError):
        load_device_config(path).options()


def invitation(content: bytes) -> None:
    """Whatever an owner pastes is an invitation with one form, or one error of input in a line."""
    with held(content) as path:
        try:
            found = destination.find(f"@{path}")
        except InputError as error:
            assert len(str(error).splitlines()) == 1
            return
    assert found is not None
    assert parse(str(found.invitation)) == found.invitation


def profile(content: bytes) -> None:
    """A class of devices is one error of input, or the same when it is written and read again."""
    with held(content) as path:
        try:
            found = toml_file.load(profiles.DeviceProfile, path)
        except InputError:
            return
    assert profiles.from_toml(profiles.to_toml(found), "again") == found
    assert found.trainable_memory_bytes() >= 0
    assert all(isinstance(value, str) for value in found.summary().values())


# --- what a device left on its own disk, which may have failed since ------------------------------


def session(content: bytes) -> None:
    """A session is refused by its file's name, or it is the same when it is kept and taken up again."""
    with tempfile.TemporaryDirectory() as folder:
        journal = Journal(Path(folder))
        (journal.folder / SESSION).write_bytes(content)
        try:
            found = journal.load()
        except InputError as error:
            assert SESSION in str(error)
            return
        assert found is not None
        journal.save(found)
        assert journal.load() == found


def remembered(content: bytes) -> None:
    """What can be measured again is begun anew; the first byte chooses among the files."""
    number, text = (content[0] if content else 0) % 3, content[1:]
    with held(text) as path:
        if number == 0:
            link = load_link(path)
            save_link(path, link.with_upload(1 << 20, 1.0))
            assert load_link(path).upload_bytes_s is not None
        elif number == 1:
            known = Corrections(path)
            known.keep("f", "cpu", "float32", known.of("f", "cpu", "float32").after_failure(10, 20))
            assert Corrections(path).of("f", "cpu", "float32").failures > 0
        else:
            digest = codec.sha256_file(GOLDEN / "Ask.json")
            assert file_digests([GOLDEN / "Ask.json"], path) == {"Ask.json": digest}


def checkpoint(content: bytes) -> None:
    """A checkpoint is taken up or begun anew."""
    with held(content) as path:
        if found := read_checkpoint(path, lambda identity: True):
            write_checkpoint(path, found.identity, found.progress, found.tensors)
            again = read_checkpoint(path, lambda identity: identity == found.identity)
            assert again is not None
            assert again.progress == found.progress


@contextlib.contextmanager
def held(content: bytes) -> Iterator[Path]:
    """A file that ends with the block."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file"
        path.write_bytes(content)
        yield path


def _adapters() -> tuple[bytes, ...]:
    dtypes: tuple[Any, ...] = ("float32", "float16", "int8")
    return tuple(codec.encode(random_adapter(2, seed, 0.1), SCALING, d) for seed, d in enumerate(dtypes))


def _records() -> tuple[bytes, ...]:
    return tuple(
        bytes([number]) + (GOLDEN / f"{kind.__name__}.json").read_bytes()
        for number, kind in enumerate(KINDS)
        if (GOLDEN / f"{kind.__name__}.json").exists()
    )


PROBLEMS = (
    b'\x16{"title": "adapter refused", "status": 422, "detail": "x", "retry_after_s": 3}',
    b'\x09{"title": "wrong upload offset", "status": 409, "detail": "x", "offset": 7}',
    b'\x09{"title": "stale update", "status": 409, "detail": "x", "current": 3}',
)
TOML = (b"base = 'base.json'\n[federation]\nladder = [2, 4]\nrank_cap = 8\n[policy]\nbuffer_size = 2\n",)
DEVICE = (
    b"""url = "http://192.168.1.20:8765"
data = "notes.jsonl"
memory_budget = "6GB"
rank = "attention=30,mlp=200"
duty = 0.3
threads = 2
profile = "rtx-3060-12gb"
[conditions]
on_mains = true
hours = "22:00-07:00"
""",
)
INVITATIONS = (
    b"flexlora+https://host.example:8765/prefix#t0ken.47DEQpj8HBSa-_TImW-5JCeuQeRkm5NMpJWZG3hSuFU",
    b"flexlora+http://[::1]:8765/#t0ken",
    b"'FLEXLORA+HTTPS://10.0.0.1#_-'\n",
)
PROFILES = tuple(
    profiles.to_toml(profiles.load_profile(name)).encode() for name in profiles.known_profiles()[:3]
)


def _sessions() -> tuple[bytes, ...]:
    """A device at rest, at work, and with something to deliver."""
    reply = _golden(JoinReply)
    idle = sessions.joined("http://x", reply)
    training = sessions.assigned(idle, _golden(Assignment), Setting(Ranks(4, 4), 0, 32, 1))
    outbox = sessions.trained(training, _golden(Update))
    return tuple(records.encode(one, indent=1) for one in (idle, training, outbox))


def _golden(kind: type[Record]) -> Record:
    return records.decode(kind, (GOLDEN / f"{kind.__name__}.json").read_bytes())


def _remembered() -> tuple[bytes, ...]:
    link = records.encode(LinkSpeed((1e6, 2e6), (3e6,)))
    digests = json.dumps({"/a/model.safetensors|12|34": "ab" * 32}).encode()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "memory.json"
        Corrections(path).keep("f", "cpu", "float32", Correction(1.5, 0.7, 1, 2, 3))
        return b"\0" + link, b"\1" + path.read_bytes(), b"\2" + digests


def _checkpoints() -> tuple[bytes, ...]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint.safetensors"
        tensors = {"x.a": np.ones((2, 3), np.float32), "x.b": np.zeros((4, 2), np.float32)}
        write_checkpoint(path, {"assignment": "a-1", "ranks": "4"}, Progress(3, 24, 2.5, 2.0, 1.5), tensors)
        return (path.read_bytes(),)


TARGETS = {
    "adapter": Fuzzed(adapter, _adapters()),
    "header": Fuzzed(header, _adapters()),
    "record": Fuzzed(record, _records()),
    "problem": Fuzzed(problem, PROBLEMS),
    "toml": Fuzzed(toml, TOML),
    "device": Fuzzed(device, DEVICE),
    "invitation": Fuzzed(invitation, INVITATIONS),
    "profile": Fuzzed(profile, PROFILES),
    "session": Fuzzed(session, _sessions()),
    "remembered": Fuzzed(remembered, _remembered()),
    "checkpoint": Fuzzed(checkpoint, _checkpoints()),
}
