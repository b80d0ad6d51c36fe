"""Settings become objects here, and only here; and what is wrong with a setting becomes a sentence."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from circuitkit import targets
from circuitkit.core.errors import ConfigError, UserError, unknown_choice

T = TypeVar("T")

_FROM_EXTRAS = ("hydra/launcher", "hydra/sweeper")

# ${or:${dir},runs/now}: the first that is set.
OmegaConf.register_new_resolver("or", lambda *values: next((value for value in values if value is not None), None), replace=True)


def run_to_resume(folder: str | int | None) -> str | int | None:
    """``${run_to_resume:${resume}}``: the same folder, if there is a run in it. Asked before the folder could be made by mistake.

    Raises:
        ConfigError: There is none, or writing into it would write elsewhere.
    """
    if folder is None:
        return folder
    if (Path(str(folder)) / "config.yaml").is_file():
        check_plain(Path(str(folder)))
        return folder
    found = "no such folder" if not Path(str(folder)).is_dir() else "a folder without a config.yaml"
    raise ConfigError(
        f"Expected the folder of a run to go on with, found {found}: {folder}. A run that was stopped before its model was loaded left "
        "nothing to go on with; start it once more."
    )


def check_plain(folder: Path, paths: Iterable[Path] | None = None) -> None:
    """Refuses a folder in which a link leads out of it, or something is neither file nor folder: it may come from elsewhere, and what is
    written into ``run.log`` would be written into whatever file that stands for.

    Args:
        folder: The folder.
        paths: What to look at; all that is in the folder if None.

    Raises:
        ConfigError: There is such an entry.
    """
    root = Path(os.path.realpath(folder))
    for path in _below(folder) if paths is None else paths:
        if path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(root):
            found = "a link that leads out of it"
        elif path.exists() and not (path.is_file() or path.is_dir()):
            found = "neither a file nor a folder"
        else:
            continue
        raise ConfigError(
            f"Expected plain files and folders in {folder}, since it is written into, but {path.relative_to(folder)} there is {found}. "
            "Remove it, if you know what it is for."
        )


def _below(folder: Path) -> Iterator[Path]:
    for place, folders, files in os.walk(folder):
        yield from (Path(place, name) for name in (*folders, *files))
        folders[:] = [name for name in folders if name != "wandb"]  # which keeps links to its own logs elsewhere, and makes them anew


def file_name(name: object) -> str:
    """``${file_name:${name}}``: a text as the name of one file, which leads to no other folder."""
    return re.sub(r"[^\w.+=@,-]+", "-", str(name)).lstrip(".-")[:150] or "run"


OmegaConf.register_new_resolver("run_to_resume", run_to_resume, replace=True)
OmegaConf.register_new_resolver("file_name", file_name, replace=True)


def conf_dir() -> Path:
    """The folder of the YAML files: inside the installed package, or beside it in a checkout.

    Raises:
        ConfigError: Neither is there.
    """
    package = Path(__file__).parent
    places = (package / "conf", package.parent / "conf")
    for place in places:
        if (place / "config.yaml").is_file():
            return place
    raise ConfigError(f"The configuration files are missing: expected config.yaml in {places[0]} or {places[1]}. Install circuitkit again.")


def build(node: DictConfig | Mapping[str, Any], expect: type[T], *, allow_targets: Iterable[str] = (), **kwargs: Any) -> Any:
    """Makes the object that a part of the configuration stands for.

    The text may come from elsewhere, so before anything is made, every ``_target_`` in it must be a class of what is expected there, or
    of one of ``targets.GROUPS`` where it stands inside of another part; and of circuitkit, an installed plugin or a trusted package.

    Args:
        node: A part with a ``_target_``. For an engine ``_partial_: true`` makes a factory, for arguments that are known only later.
        expect: The class that the object must be an instance of.
        allow_targets: Trusted packages besides those of ``allow_targets=[...]`` on the command line.
        kwargs: Arguments that no configuration can hold.

    Returns:
        An instance of ``expect``, or a factory for one.

    Raises:
        ConfigError: The part cannot be used; the text names its key. A ``UserError`` of the constructor passes through.
    """
    key, settings = _settings(node, expect.__name__)
    later = settings.pop("_partial_", False)
    part = targets.looked_up(settings, key, expect, frozenset(allow_targets) | allowed_on_command_line())
    if not isinstance(later, bool) or (later and not targets.made_later(expect)):
        raise ConfigError(f"{key} has _partial_, which is {later!r}. Only an engine is made later, with true; leave it out elsewhere.")
    return part.factory() if later else part.make(**kwargs)


def build_each(node: DictConfig | None, expect: type[T]) -> list[T]:
    """Makes the objects of a part that holds several, by name. An entry that is null is left out.

    Args:
        node: A mapping of names to parts, a single part, or None.
        expect: The class of each object.
    """
    if node is None:
        return []
    if "_target_" in node:
        return [build(node, expect)]
    return [build(node[name], expect) for name in node if node[name] is not None]


def function(node: DictConfig) -> Callable[..., Any]:
    """The job that a part of the configuration names with ``_target_``, not called.

    Raises:
        ConfigError: There is no such job.
    """
    key, settings = _settings(node, "job")
    return targets.job(settings["_target_"], key, allowed_on_command_line())


def allowed_on_command_line() -> frozenset[str]:
    """The packages that the running command trusts with ``allow_targets=[...]``. What a file says under that name counts for nothing.

    Raises:
        ConfigError: It is no list of names.
    """
    given = [text for text in HydraConfig.get().overrides.task if "allow_targets" in text] if HydraConfig.initialized() else []
    found = [each.value() for each in OverridesParser.create().parse_overrides(given) if each.key_or_group == "allow_targets"]
    if not found:
        return frozenset()
    if not isinstance(found[-1], list) or not all(isinstance(name, str) and name.isidentifier() for name in found[-1]):
        raise ConfigError(f"allow_targets must be a list of packages by name, such as [mypackage]; found {found[-1]}.")
    return frozenset(map(str, found[-1]))


def in_words(error: Exception) -> UserError | None:
    """What an error of Hydra or OmegaConf means to the user; None if the error is none of theirs."""
    own: BaseException | None = error
    while isinstance(own, OmegaConfBaseException):  # what one of our resolvers raised is wrapped in two of OmegaConf's
        own = own.__context__
    if isinstance(own, UserError):
        return own
    if isinstance(error, MissingConfigException) and "/" in (error.missing_cfg_file or ""):
        group, _, name = str(error.missing_cfg_file).rpartition("/")
        remedy = "More come with `pip install circuitkit-nnsight[sweep]`." if group in _FROM_EXTRAS else ""
        # Hydra does not say what a list of choices can hold.
        options = [path.stem for path in (conf_dir() / group).glob("*.yaml")] if error.options is None else error.options
        return ConfigError(unknown_choice(group, name, options, remedy))
    if isinstance(error, OverrideParseException):
        found = error.override or ""
        return ConfigError(
            f"The setting {found!r} cannot be read: {_first_line(error)}. Expected key=value, such as method.threshold=0.8; put quotes "
            "around values with blanks, commas or brackets."
        )
    if str(error).startswith("Ambiguous value"):
        found = _first_line(error).partition("'")[2].rstrip("'")
        return ConfigError(f"{found} has several values, and this is no sweep. Add -m to run each of them, or write [a,b] for one list.")
    if str(error).startswith("Config group override must be"):
        return ConfigError(
            "A group takes the name of a choice, and null is none. Expected one such as logger=jsonl, which writes to the run folder "
            "alone; `circuitkit job=list` shows all choices."
        )
    cause = next((link for link in _chain(error) if isinstance(link, OmegaConfBaseException)), None)
    if cause is not None:
        return ConfigError(_about_key(cause))
    if isinstance(error, HydraException):
        return ConfigError(" ".join(str(error).split()))
    return None


def _settings(node: Any, expected: str) -> tuple[str, dict[str, Any]]:
    """The full key of a part, and its plain values."""
    node = node if isinstance(node, DictConfig) or not isinstance(node, Mapping) else OmegaConf.create(dict(node))
    key = (node._get_full_key(None) if isinstance(node, DictConfig) else None) or "this part of the configuration"
    try:
        settings: Any = OmegaConf.to_container(node, resolve=True, throw_on_missing=True) if isinstance(node, DictConfig) else node
    except OmegaConfBaseException as error:
        raise ConfigError(_about_key(error)) from error
    if not isinstance(settings, dict) or "_target_" not in settings:
        raise ConfigError(f"{key} needs a _target_, the dotted name of a {expected}; found {settings!r}.")
    return key, settings


def _about_key(error: OmegaConfBaseException) -> str:
    parent, key = getattr(error, "parent_node", None), getattr(error, "key", None)
    full_key = getattr(error, "full_key", None) or key
    if "Missing mandatory value" in str(error):
        return f"{full_key} must be given. Set it with {full_key}=..."
    if "is not in struct" in str(error) and isinstance(parent, DictConfig):
        group = str(full_key).rpartition(".")[0]
        known = [name for name in parent if name not in ("hydra", "_target_")]
        return unknown_choice(f"setting of {group}" if group else "setting", key, known)
    return f"{full_key}: {_first_line(error)}." if full_key else f"{_first_line(error)}."


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
