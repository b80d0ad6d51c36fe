"""Settings as they may be written down: plain values, and no secrets."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

REMOVED = "<removed>"

# Whole words at the end of a key, so that `n_tokens`, `tokenizer` and `token_budget` stay.
_SECRET = re.compile(r"(^|[^a-z0-9])(token|password|passwd|passphrase|secret|credentials?|(api|access|private|secret)[^a-z0-9]?key)$")
# A tokenizer's own tokens are called the same as the ones that open doors.
_SPECIAL_TOKEN = re.compile(r"(^|[^a-z0-9])(bos|eos|pad|unk|sep|cls|mask|answer|wrong|first|last|next)[^a-z0-9]token$")
# Whatever they are called: keys of Hugging Face, GitHub, OpenAI and the like, AWS; and a password in an address.
_KEY = re.compile(r"\b(hf_[A-Za-z0-9]{16,}|gh[pousr]_[A-Za-z0-9]{16,}|github_pat_\w{16,}|sk-[\w-]{16,}|AKIA[A-Z0-9]{16})\b")
_ADDRESS = re.compile(r"(?<=://)[^/\s:@]*:[^/\s@]+(?=@)")
_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")


def redacted(value: Any) -> Any:
    """A copy as plain dicts, lists and scalars in which whatever is stored under a secret's name is ``"<removed>"``.

    Also ``name=value`` texts are looked at, since a command line's overrides come as a list of those, and texts that hold a key of a known
    form or an address with a password.

    Args:
        value: Settings, or any part of them.
    """
    if isinstance(value, Mapping):
        return {str(key): REMOVED if _hides(key, inner) else redacted(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [redacted(inner) for inner in value]
    if isinstance(value, str):
        name, equals, text = value.partition("=")
        return f"{name}={REMOVED}" if equals and text and _is_secret(name) else _ADDRESS.sub(REMOVED, _KEY.sub(REMOVED, str(value)))
    return value if value is None or type(value) in (bool, int, float) else str(value)


def _hides(key: Any, value: Any) -> bool:
    # None and booleans say whether there is a secret, not which.
    return value is not None and not isinstance(value, bool) and _is_secret(str(key))


def _is_secret(name: str) -> bool:
    words = _CAMEL.sub("_", name.strip()).lower()
    return bool(_SECRET.search(words)) and not _SPECIAL_TOKEN.search(words)
