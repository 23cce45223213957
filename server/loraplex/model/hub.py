"""From what `--model` says to a checkpoint folder on this machine."""

import re
from collections.abc import Sequence
from pathlib import Path

from loraplex.config import DEFAULT_MODEL
from loraplex.errors import ModelError
from loraplex.model.default import ensure_default_model

# Weights and tokenizer; never pickles, never code.
HUB_FILES = ("*.json", "*.safetensors", "*.jinja")

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def resolve_model(name: str, cache_dir: Path, files: Sequence[str] = HUB_FILES) -> Path:
    """A folder, the default's name, or a hub id, whose `files` are downloaded at first use."""
    if name == DEFAULT_MODEL:
        return ensure_default_model(cache_dir)
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if _HUB_ID.fullmatch(name) is None:
        raise ModelError(
            f"--model {name}: no such folder, and neither {DEFAULT_MODEL} nor a hub id (owner/name)"
        )
    return _download(name, files)


def _download(hub_id: str, files: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(hub_id, allow_patterns=list(files)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(f"--model {hub_id} cannot be fetched from the hub: {reason[0]}") from error
