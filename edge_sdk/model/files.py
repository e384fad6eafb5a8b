"""The files of a base model: where they lie, which of them count, and their digests. No model code."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edge_sdk.core.adapter_file.codec import sha256_file
from edge_sdk.core.errors import InputError, Unwritable
from edge_sdk.system.durable import write_durably
from edge_sdk.system.terminal import logger

log = logger("edge_sdk")

TINY = "tiny"

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)
WITH_CODE = ("config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json")
# Keys of config.json that differ between copies of one model and change nothing in what it computes here.
VOLATILE_KEYS = frozenset({"_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache"})


def resolve(model: str) -> Path:
    """The directory of a model: the embedded `tiny`, a directory, or a Hugging Face id (downloaded once).

    Raises:
        InputError: nothing there, or the hub cannot be reached or does not give it; one line.
    """
    directory = Path(__file__).parents[1] / TINY if model == TINY else Path(model).expanduser()
    if directory.is_dir():
        if not (directory / "config.json").is_file():
            raise InputError(f"{directory}: holds no config.json; name the directory of a Hugging Face model")
        return directory
    if model == TINY or model.startswith((".", "/", "~")) or "\\" in model or model.count("/") > 1:
        raise InputError(f"{model}: no such model directory")
    return _download(model)


def find(model: str) -> Path | None:
    """As `resolve`, but without the network: None for a hub model that was never downloaded.

    Raises:
        InputError: as `resolve` for a directory, or no hub model can be called so.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    _say_nothing_of_this_machine()
    if model == TINY or model.startswith((".", "/", "~")) or Path(model).expanduser().is_dir():
        return resolve(model)
    try:
        return Path(snapshot_download(model, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    except HFValidationError as error:
        raise InputError(f"{model}: no such directory, and no such model on the Hugging Face hub") from error


def _say_nothing_of_this_machine() -> None:
    """Switch off the hub client's telemetry, as HF_HUB_DISABLE_TELEMETRY=1 would have done at its import."""
    from huggingface_hub import constants

    constants.HF_HUB_DISABLE_TELEMETRY = True


def _download(model: str) -> Path:
    """A snapshot of a hub model: configuration, tokeniser and safetensors, not its other formats."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    _say_nothing_of_this_machine()
    wanted = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]
    unwanted = ["*/*", "consolidated*"]
    try:
        return Path(snapshot_download(model, allow_patterns=wanted, ignore_patterns=unwanted))
    except GatedRepoError as error:
        raise InputError(f"{model}: this model is gated; accept its licence on the hub and log in") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise InputError(f"{model}: no such directory, and no such model on the Hugging Face hub") from error
    except OSError as error:  # LocalEntryNotFoundError among them
        raise InputError(
            f"{model}: not downloaded yet, and the Hugging Face hub cannot be reached; "
            f"check the network, or name a directory or {TINY!r}"
        ) from error


def read_config(directory: Path) -> dict[str, Any]:
    """The model's config.json.

    Raises:
        InputError: it is not a JSON object.
    """
    return read_json_object(directory / "config.json")


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON object from a file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not readable as JSON; download the model again") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: not a JSON object; download the model again")
    return value


def require_no_code(
    directory: Path, trusted: bool, mend: str = "if you trust it, add --trust-remote-code"
) -> None:
    """Raise InputError for a model with code of its own (`auto_map`), unless its owner trusts that.

    Transformers would ask on the terminal, or take another architecture's code in its place.

    Args:
        directory: of a model, or a bare `config.json`.
        trusted: whether that code may run.
        mend: what its owner may do.
    """
    named = (directory / name for name in WITH_CODE) if directory.is_dir() else (directory,)
    for path in named:
        if not trusted and path.is_file() and read_json_object(path).get("auto_map"):
            raise InputError(
                f"{directory}: this model brings code of its own ({path.name} has auto_map), which would run "
                f"on this machine; {mend}"
            )


def tokenizer_files(directory: Path) -> list[Path]:
    """Those of TOKENIZER_FILES that are there."""
    return [directory / name for name in TOKENIZER_FILES if (directory / name).is_file()]


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files that loading would read; other copies beside them do not count."""
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(read_json_object(index).get("weight_map", {}).values())) or [index.name]
    else:
        names = ["model.safetensors"]
    for name in names:
        if name == index.name:
            raise InputError(f"{index}: names no weight files; download the model again")
        if not (directory / name).is_file():
            raise InputError(f"{directory}: {name} is missing; the weights must be there as safetensors")
    return [directory / name for name in names]


def normalised(value: Any) -> Any:
    """A configuration without its volatile keys, at every depth."""
    if isinstance(value, dict):
        return {key: normalised(item) for key, item in value.items() if key not in VOLATILE_KEYS}
    return [normalised(item) for item in value] if isinstance(value, list) else value


def file_digests(files: list[Path], remembered: Path | None = None) -> dict[str, str]:
    """File name -> SHA-256 in hex; digests in `remembered` are used while size and mtime stay the same."""
    known = _remembered(remembered) if remembered else {}
    found, fresh = {}, False
    for path in files:
        stat = path.stat()
        key = f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}"
        if key not in known:
            known[key], fresh = sha256_file(path), True
        found[path.name] = known[key]
    if remembered and fresh:
        try:
            write_durably(remembered, json.dumps(known, indent=0).encode())
        except Unwritable as error:
            log.warning("%s; the weights are read again next time", error)
    return found


def _remembered(path: Path) -> dict[str, str]:
    """What `file_digests` wrote; a missing or damaged file only means that the files are read again."""
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return {str(k): str(v) for k, v in known.items()} if isinstance(known, Mapping) else {}
