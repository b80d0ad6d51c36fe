"""Python code that a model folder brings along (``auto_map``): refused, left aside, or run because the user said so."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from circuitkit.core.errors import ModelError
from circuitkit.storage.reading import read_bytes, read_text

CODE = "*.py"

_log = logging.getLogger(__name__)

_TOKENIZER_SETTINGS = "tokenizer_config.json"


def code_of(folder: Path, settings: Mapping[str, Any], source: str, trust: bool | None) -> dict[str, str]:
    """The files of Python code that will be run when the model is loaded, each with its SHA-256; empty if none will.

    Args:
        folder: Of the model, looked at by ``settings_of``.
        settings: Its config.json.
        source: What to call the model.
        trust: As ``trust_remote_code`` of ``load_model``.

    Raises:
        ModelError: There is such code and nothing was said about it, or it lies elsewhere.
    """
    asked = settings.get("auto_map")
    if trust is None and asked:
        raise ModelError(
            f"{source} asks to run Python code that it brings along (auto_map in config.json), which is not done unasked. If you have "
            "read that code and trust it, say model.trust_remote_code=true. If transformers itself implements this model, "
            "model.trust_remote_code=false takes that implementation and leaves the code aside."
        )
    if not trust:
        if asked:
            _log.info("%s brings Python code of its own, which is left aside: transformers' own implementation is used.", source)
        return {}
    tokenizer = folder / _TOKENIZER_SETTINGS
    asked = [asked, json.loads(read_text(tokenizer, "model", ModelError)).get("auto_map") if tokenizer.exists() else None]
    if not any(asked):
        return {}
    if "--" in json.dumps(asked):
        raise ModelError(
            f"The Python code that {source} asks for lies in another repository, which may change at any time. Download both, put the code "
            "beside the weights, and take what stands before '--' out of auto_map."
        )
    files = {path.name: hashlib.sha256(read_bytes(path, "model", ModelError)).hexdigest() for path in sorted(folder.glob(CODE))}
    if not files:
        raise ModelError(f"{source} asks to run Python code (auto_map), and holds none. Download it again, with its {CODE} files.")
    listed = ", ".join(f"{name} (SHA-256 {digest[:12]})" for name, digest in files.items())
    _log.warning("Running Python code that %s brings along, because model.trust_remote_code=true: %s.", source, listed)
    return files
