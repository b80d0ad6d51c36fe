"""Folders from the Hugging Face hub: asked once and with a time limit, so that a machine without a network says so at once instead of
retrying for minutes, and uses what it has in its cache."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

from circuitkit.core.errors import ModelError, ModelNotAtHand
from circuitkit.models.zoo import ZOO

SMALL_FILES = ("*.json", "*.model", "*.txt", "*.jinja")

_HUB_SECONDS = 10
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_COMMIT = re.compile(r"[0-9a-f]{40}")
# Sub-folders and consolidated files hold the same weights again, in formats of other tools.
_NOT_FILES = ["*/*", "consolidated*"]


def is_hub_id(source: str) -> bool:
    """Whether a text looks like the id of something on the hub."""
    return bool(_HUB_ID.fullmatch(source)) and not source.startswith(".")


def snapshot(repo: str, revision: str | None, local_files_only: bool, files: Sequence[str]) -> tuple[Path, str | None]:
    """The cached copy of a repository, brought up to date if the hub answers, and its commit.

    Args:
        repo: Its id.
        revision: Branch, tag or commit; None for the newest.
        local_files_only: Do not ask the hub.
        files: Patterns of the files to fetch.

    Raises:
        ModelNotAtHand: It is not in the cache and cannot be fetched.
        ModelError: There is no such repository or revision.
    """
    at = f" at revision {revision!r}" if revision else ""
    offline = local_files_only or not _hub_answers(repo, revision)
    try:
        folder = Path(snapshot_download(
            repo, revision=revision, local_files_only=offline, allow_patterns=list(files), ignore_patterns=_NOT_FILES
        ))  # fmt: skip
    except GatedRepoError as error:
        raise ModelNotAtHand(
            f"{repo} is gated and your account has no access. Accept its licence at https://huggingface.co/{repo}, then log in with "
            "`hf auth login` or set HF_TOKEN; or take an open model such as tinyllama, qwen2_5_0_5b or gpt2."
        ) from error
    except RevisionNotFoundError as error:
        raise ModelError(f"{repo} has no revision {revision!r}. Expected a branch, a tag or a commit of that repository.") from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"There is no model {repo} on the hub, or it is private. Check the spelling; for a private one log in with `hf auth login` "
            "or set HF_TOKEN."
        ) from error
    # Beside its own classes the hub client lets those of its HTTP library through (requests, httpx or httpx2, by version).
    except Exception as error:
        why = "only local files may be used" if local_files_only else "the hub does not answer, or HF_HUB_OFFLINE is set"
        why = why if offline else f"the download failed ({brief(error.__cause__ or error).rstrip('.')})"
        raise ModelNotAtHand(
            f"{repo}{at} is not (completely) in the cache of this machine, and {why}. Connect, or download it elsewhere with "
            f"`hf download {repo}` and give the folder: model=local model.path=<folder>. Without any download: {', '.join(ZOO)}."
        ) from error
    return folder, folder.name if _COMMIT.fullmatch(folder.name) else None


def _hub_answers(repo: str, revision: str | None) -> bool:
    """Whether the hub can be reached, asked once with a time limit; the download itself has none and would hang behind a firewall."""
    try:
        HfApi().model_info(repo, revision=revision, timeout=_HUB_SECONDS)
    except HfHubHTTPError:
        return True  # It answered, if only to refuse; the download says why.
    except Exception:  # No address, no route, no answer, HF_HUB_OFFLINE: classes of whichever HTTP library the client uses.
        return False
    return True


def brief(error: BaseException) -> str:
    """The first line of an error's text, as one sentence."""
    text = str(error).strip().split("\n", 1)[0][:300].rstrip()
    return f"{type(error).__name__}: {text}".rstrip(".: ") + "."
