"""Settings become objects here, and only here; and what is wrong with a setting becomes a sentence."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from hydra.errors import HydraException, InstantiationException, MissingConfigException, OverrideParseException
from hydra.utils import get_method, instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from circuitkit import plugins
from circuitkit.core.errors import ConfigError, UserError, unknown_choice

T = TypeVar("T")

_FROM_EXTRAS = ("hydra/launcher", "hydra/sweeper")

# ${or:${dir},runs/now}: the first that is set.
OmegaConf.register_new_resolver("or", lambda *values: next((value for value in values if value is not None), None), replace=True)


def run_to_resume(folder: str | int | None) -> str | int | None:
    """``${run_to_resume:${resume}}``: the same folder, if there is a run in it. Asked before the folder could be made by mistake.

    Raises:
        ConfigError: There is none.
    """
    if folder is None or (Path(str(folder)) / "config.yaml").is_file():
        return folder
    found = "no such folder" if not Path(str(folder)).is_dir() else "a folder without a config.yaml"
    raise ConfigError(
        f"Expected the folder of a run to go on with, found {found}: {folder}. A run that was stopped before its model was loaded left "
        "nothing to go on with; start it once more."
    )


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


def build(node: DictConfig | Mapping[str, Any], expect: type[T], **kwargs: Any) -> Any:
    """Makes the object that a part of the configuration stands for.

    Args:
        node: A part with a ``_target_``. With ``_partial_: true`` a factory is made, for arguments that are known only later.
        expect: The class that the object must be an instance of.
        kwargs: Arguments that no configuration can hold.

    Returns:
        An instance of ``expect``, or a factory for one.

    Raises:
        ConfigError: The part cannot be used; the text names its key. A ``UserError`` of the constructor passes through.
    """
    node = node if isinstance(node, DictConfig) else OmegaConf.create(dict(node))
    key, settings = _checked(node, expect.__name__)
    factory = _factory(node, key)
    later = bool(settings.get("_partial_"))
    _check_fields(factory, key, kwargs, later)
    if later:
        return factory
    made = factory(**kwargs)
    if not isinstance(made, expect):
        raise ConfigError(f"{key}._target_ is {settings['_target_']!r}, which makes a {type(made).__name__}. Expected a {expect.__name__}.")
    return made


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
    """The function that a part of the configuration names with ``_target_``, not called.

    Raises:
        ConfigError: There is no such function.
    """
    key, settings = _checked(node, "function")
    try:
        return get_method(settings["_target_"])
    except ImportError as error:
        raise _not_loaded(key, settings["_target_"], error) from error


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


def _checked(node: DictConfig, expected: str) -> tuple[str, dict[str, Any]]:
    key = node._get_full_key(None) or "this part of the configuration"
    settings = _plain(node, key)
    if not isinstance(settings, dict) or "_target_" not in settings:
        raise ConfigError(f"{key} needs a _target_, the dotted name of a {expected}; found {settings!r}.")
    _check_targets(settings, key, {"circuitkit", *plugins.packages()}, set(OmegaConf.select(node._get_root(), "allow_targets") or ()))
    return key, settings


def _plain(node: DictConfig, key: str) -> Any:
    try:
        return OmegaConf.to_container(node, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ConfigError(_about_key(error)) from error


def _check_targets(settings: Any, key: str, own: set[str], trusted: set[str]) -> None:
    """Code is run by name only where the user installed it for that: configuration files are often copied from elsewhere."""
    for where, target in _targets(settings, key):
        package = str(target).partition(".")[0]
        if package in trusted:  # with all that it imports
            continue
        if package not in own:
            raise ConfigError(
                f"{where}._target_ is {target!r}, which is outside of {', '.join(sorted(own))}. If you trust that package, add "
                f"allow_targets=[{package}]."
            )
        found = _located(str(target), where)
        home = str(getattr(found, "__module__", None) or "")
        if not (inspect.isclass(found) or inspect.isroutine(found)) or home.partition(".")[0] not in own:
            raise ConfigError(
                f"{where}._target_ is {target!r}, which {', '.join(sorted(own))} does not define itself"
                f"{f', but {home}' if home else ''}. Expected the name of one of its own classes or functions."
            )


def _located(target: str, where: str) -> Any:
    """What a dotted name stands for. Names that a module merely imported lead out of the allowed packages, so they are not followed."""
    parts = target.split(".")
    try:
        found: Any = importlib.import_module(parts[0])
        for place, part in enumerate(parts[1:], start=2):
            if part.startswith("_") or not part.isidentifier():
                raise ConfigError(f"{where}._target_ is {target!r}. Expected a public name, found {part!r} in it.")
            if not hasattr(found, part) and inspect.ismodule(found):
                importlib.import_module(".".join(parts[:place]))
            found = getattr(found, part)
            if inspect.ismodule(found) and found.__name__ != ".".join(parts[:place]):
                raise ConfigError(f"{where}._target_ is {target!r}, which goes through the module {found.__name__}. Name its own module.")
    except (ImportError, AttributeError) as error:
        raise _not_loaded(where, target, error) from error
    return found


def _targets(settings: Any, key: str) -> Iterator[tuple[str, Any]]:
    if isinstance(settings, Mapping):
        if "_target_" in settings:
            yield key, settings["_target_"]
        for name, value in settings.items():
            yield from _targets(value, f"{key}.{name}")
    elif isinstance(settings, list):
        for place, value in enumerate(settings):
            yield from _targets(value, f"{key}[{place}]")


def _factory(node: DictConfig, key: str) -> partial[Any]:
    try:
        made = instantiate(node, _partial_=True, _convert_="all")
    except InstantiationException as error:
        for link in _chain(error):
            if isinstance(link, UserError):
                raise link from error
        raise _not_loaded(key, node._target_, error) from error
    # Hydra's own partial would check every argument and result against its policy; ours are made by us.
    return partial(made.func, *made.args, **made.keywords)


def _not_loaded(key: str, target: str, error: Exception) -> ConfigError:
    reason = " ".join(str(error.__cause__ or error).split())
    return ConfigError(f"{key}._target_ is {target!r}, which cannot be loaded: {reason}")


def _check_fields(factory: partial[Any], key: str, kwargs: Mapping[str, Any], later: bool) -> None:
    target: Callable[..., Any] = factory.func
    parameters = inspect.signature(target).parameters
    fields = [name for name, each in parameters.items() if each.kind not in (each.VAR_KEYWORD, each.VAR_POSITIONAL)]
    is_open = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
    for name in factory.keywords:
        if name not in fields and not is_open:
            raise ConfigError(unknown_choice(f"field of {key} ({target.__name__})", name, fields))
    needed = [name for name in fields if parameters[name].default is inspect.Parameter.empty]
    missing = [name for name in needed if name not in {*factory.keywords, *kwargs}]
    if missing and not later:
        raise ConfigError(f"{key} ({target.__name__}) needs {', '.join(missing)}. Set it with {key}.{missing[0]}=...")
    for name, hint in _hints(target).items():
        if name in factory.keywords and not _fits(factory.keywords[name], hint):
            found = factory.keywords[name]
            shown = "<removed>" if name.lower().endswith(("token", "key", "password", "secret")) else repr(found)
            raise ConfigError(f"{key}.{name} is {shown}, a {type(found).__name__}. Expected {_hint_name(hint)}.")


def _hints(target: Callable[..., Any]) -> dict[str, Any]:
    try:
        return get_type_hints(target.__init__ if inspect.isclass(target) else target)
    except (NameError, TypeError):  # a shape string, or a name that is imported for type checkers only
        return {}


def _fits(value: Any, hint: Any) -> bool:
    """Whether a plain value is of a plain type; what is not plain is left to the constructor."""
    if get_origin(hint) is UnionType:
        return any(_fits(value, choice) for choice in get_args(hint))
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint) if hint in (bool, str, NoneType) else True


def _hint_name(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(str(choice) for choice in get_args(hint))
    names = [_hint_name(choice) for choice in get_args(hint)] if get_origin(hint) is UnionType else []
    return " or ".join(names) or {NoneType: "null", int: "a whole number", float: "a number", bool: "true or false", str: "a text"}.get(
        hint, getattr(hint, "__name__", str(hint))
    )


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
