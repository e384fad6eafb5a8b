"""The host's configuration: one TOML file, every key checked, nothing silently ignored.

base = "tiny"                # or the path of a base.json made by `edge-sdk base MODEL`
[federation]                 # fixed for the life of a data directory
rule = "carry"
ladder = [2, 4, 8, 16]
rank_cap = 32
scaling = 2.0
download_dtype = "int8"      # float32, float16 or int8; likewise upload_dtype
[training]                   # what each device does in an assignment; likewise fixed
steps = 20
[policy]                     # may change from one start to the next
buffer_size = 4
[admission]                  # likewise
over_norm = "clip"
[storage]                    # likewise
keep_versions = 20
[joining]                    # likewise: docs/HOSTING.md
approve = false
[serving]                    # likewise: addresses and proxies, docs/HOSTING.md
public_url = "https://federation.example.org"
[limits]                     # likewise: what strangers and members may cost, docs/LIMITS.md
devices = 20000
[privacy]                    # differential privacy, if wanted: docs/PRIVACY.md; on or off for life
noise_multiplier = 1.0
clip_norm = 5.0
"""

from __future__ import annotations

import dataclasses
import importlib.resources
from dataclasses import dataclass, field
from pathlib import Path

from coordinator.engine.policy import Policy
from coordinator.limits.limits import Limits
from coordinator.listening import Serving
from coordinator.merging.admission import Admission
from coordinator.privacy import accountant
from coordinator.privacy.mechanism import Privacy
from coordinator.rules.named import rule_named
from edge_sdk.core import toml_file
from edge_sdk.core.adapter_file.dtypes import WireDtype
from edge_sdk.core.errors import InputError, ProtocolError
from edge_sdk.core.flexlora import Split
from edge_sdk.core.messages import OWN_RULES, Base, Federation, Training
from edge_sdk.core.ranges import Factor, Interval, Rank
from edge_sdk.core.records import decode, encode

# Of a new federation's files: a quarter of the bytes for the same loss (docs/WIRE.md).
NEW_DTYPE: WireDtype = "int8"


@dataclass(frozen=True)
class Storage:
    """`[storage]`. Versions that a device may still need are kept as well."""

    keep_versions: int = 20  # the newest, which can be exported

    def __post_init__(self) -> None:
        if self.keep_versions < 1:
            raise InputError(f"storage.keep_versions is {self.keep_versions}; it must be 1 or more")


@dataclass(frozen=True)
class FederationSettings:
    """What the host chooses of a Federation record."""

    rule: str = "carry"
    ladder: tuple[int, ...] = (2, 4, 8, 16)
    rank_cap: Rank = 32
    scaling: Factor = 2.0
    split: Split = "balanced"
    heartbeat_s: Interval = 5.0
    mixed_ranks: tuple[tuple[int, int], ...] = ()
    # None: int8 in a new federation, and in one that began before there was a choice what it began with.
    download_dtype: WireDtype | None = None
    upload_dtype: WireDtype | None = None


@dataclass(frozen=True)
class Joining:
    """How devices come in, and how long what they show holds."""

    approve: bool = False  # nobody takes part before the host has said so: `edge-coordinator approve`
    credential_days: Interval = 30.0  # after which a device is told to fetch another credential


@dataclass(frozen=True)
class _File:
    """The file, table by table."""

    base: str = "tiny"  # or the path of a base.json
    federation: FederationSettings = field(default_factory=FederationSettings)
    training: Training = field(default_factory=Training)
    policy: Policy = field(default_factory=Policy)
    admission: Admission = field(default_factory=Admission)
    privacy: Privacy | None = None
    storage: Storage = field(default_factory=Storage)
    joining: Joining = field(default_factory=Joining)
    serving: Serving = field(default_factory=Serving)
    limits: Limits = field(default_factory=Limits)


@dataclass(frozen=True)
class Settings:
    """A checked configuration."""

    base: Base
    federation: FederationSettings
    training: Training
    policy: Policy
    admission: Admission
    privacy: Privacy | None = None
    storage: Storage = field(default_factory=Storage)
    joining: Joining = field(default_factory=Joining)
    serving: Serving = field(default_factory=Serving)
    limits: Limits = field(default_factory=Limits)

    @property
    def carries(self) -> bool:
        """Whether devices hold the global adapter frozen under the chosen rule."""
        return rule_named(self.federation.rule).carries

    def build(self, id: str, stored: Federation | None = None) -> Federation:
        """The federation that these settings describe; what they leave open is as in `stored`."""
        chosen = {f.name: getattr(self.federation, f.name) for f in dataclasses.fields(self.federation)}
        for name in ("download_dtype", "upload_dtype"):
            chosen[name] = chosen[name] or (getattr(stored, name) if stored else NEW_DTYPE)
        # An older record leaves it to the rule's name, which may say the same.
        chosen["holds_global"] = (
            stored.holds_global if stored and stored.carries == self.carries else self.carries
        )
        lease_s = self.policy.lease_s
        return Federation(id=id, base=self.base, training=self.training, lease_s=lease_s, **chosen)


TABLES = tuple(field.name for field in dataclasses.fields(_File) if field.name != "base")


def load_settings(path: Path | None) -> Settings:
    """Read a configuration file; None gives the defaults with the embedded base.

    Raises:
        InputError: the file cannot be read, or a key is unknown or has an unusable value; names file and key.
    """
    where = str(path) if path else "defaults"
    file = toml_file.load(_File, path) if path else _File()
    try:
        base = load_base(file.base, path.parent if path else Path.cwd())
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    try:
        rule_named(file.federation.rule)
    except InputError as error:
        raise InputError(f"{where}: federation.{error}") from error
    tables = {name: getattr(file, name) for name in TABLES}
    settings = Settings(base=base, **tables)
    _check(settings, where)
    _check_privacy(settings, where)
    return settings


def load_base(name: str, folder: Path) -> Base:
    """The Base record of the embedded `tiny` model, or one from a JSON file (relative to `folder`)."""
    if name == "tiny":
        text = (importlib.resources.files("edge_sdk") / "tiny" / "base.json").read_text()
        return decode(Base, text)
    path = folder / name
    try:
        return decode(Base, path.read_bytes())
    except OSError as error:
        raise InputError(
            f"base {path}: {error.strerror}; make it with `edge-sdk base MODEL -o FILE`"
        ) from error
    except (ValueError, ProtocolError) as error:
        raise InputError(f"base {path}: not a base record ({error}); make it with `edge-sdk base`") from error


def _check(settings: Settings, where: str) -> None:
    """What no single field can tell."""
    chosen, training = settings.federation, settings.training
    ladder = chosen.ladder
    if not settings.base.modules:
        raise InputError(f"{where}: base {settings.base.model} names no modules; make it by `edge-sdk base`")
    widest = max(min(shape) for shape in settings.base.modules.values())
    if not ladder or list(ladder) != sorted(set(ladder)) or ladder[0] < 1:
        raise InputError(f"{where}: federation.ladder must be rising ranks from 1 on, not {list(ladder)}")
    if ladder[-1] > widest:
        raise InputError(
            f"{where}: federation.ladder reaches rank {ladder[-1]}, larger than any module of "
            f"{settings.base.model} can hold ({widest}); lower it"
        )
    if chosen.rank_cap < ladder[-1]:
        raise InputError(f"{where}: federation.rank_cap {chosen.rank_cap} is below the ladder's {ladder[-1]}")
    _check_limits(settings, where)
    _check_mixed_ranks(chosen, where)
    _check_rule(chosen, widest, where)
    _check_admission(settings, where)
    _check_training(training, chosen.rule, where)
    try:
        decode(Federation, encode(settings.build("new")))
    except ProtocolError as error:
        raise InputError(f"{where}: no device would take this federation: {error}") from error


def _check_limits(settings: Settings, where: str) -> None:
    """A federation can live within its limits."""
    try:
        settings.limits.require_room_for(settings.policy.buffer_size, settings.federation.heartbeat_s)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def _check_training(training: Training, rule: str, where: str) -> None:
    """What a rule makes of what devices do."""
    if training.sparse_versions and not rule_named(rule).warms_up:
        raise InputError(
            f"{where}: training.sparse_versions is {training.sparse_versions}; it must be 0 "
            f"under any rule but {' or '.join(_those('warms_up'))}, not {rule}"
        )


def _check_privacy(settings: Settings, where: str) -> None:
    """Differential privacy needs its accountant, and a rule that merges changes."""
    rule = settings.federation.rule
    if settings.privacy is None:
        return
    if settings.admission != Admission():
        raise InputError(
            f"{where}: [admission] goes by the updates of other devices, which [privacy] must not; leave it "
            "out: privacy.clip_norm is the bound"
        )
    accountant.library()
    if not rule_named(rule).adds_changes:
        names = " or ".join(map(repr, _those("adds_changes")))
        raise InputError(
            f"{where}: [privacy] needs federation.rule {names}, not {rule!r}: what one of "
            "its devices adds to a version has no useful bound"
        )


def _those(able: str) -> list[str]:
    """This project's rules that have an ability, which is the name of an attribute."""
    return [name for name in sorted(OWN_RULES) if getattr(rule_named(name), able)]


def _check_rule(chosen: FederationSettings, widest: int, where: str) -> None:
    """What a rule can do with ranks."""
    rule = rule_named(chosen.rule)
    if wrong := rule.objection(chosen.ladder, bool(chosen.mixed_ranks), chosen.rank_cap, widest):
        raise InputError(f"{where}: {wrong}")


def _check_admission(settings: Settings, where: str) -> None:
    """Robust rules want a merge that sums products."""
    robust, rule = settings.admission.robust, settings.federation.rule
    if robust != "none" and not rule_named(rule).sums_products:
        raise InputError(
            f'{where}: admission.robust is "{robust}", but rule {rule} averages factors, of which distances '
            'between products say nothing; set it to "none" or choose another rule'
        )


def _check_mixed_ranks(chosen: FederationSettings, where: str) -> None:
    """Ranks by kind of module stay within what the ladder allows."""
    top = chosen.ladder[-1]
    for pair in chosen.mixed_ranks:
        if not 1 <= min(pair) <= max(pair) <= top:
            raise InputError(
                f"{where}: federation.mixed_ranks has {list(pair)}; ranks (attention, feed-forward) lie "
                f"between 1 and the ladder's {top}"
            )
