"""What a user can do wrong, as exceptions whose text is a sentence.

Every message says what was expected, what was found, what to do, and which choices there are.
The command line prints it without a traceback; any other exception is a bug of ours and keeps its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches


class UserError(Exception):
    """Something that the user can put right. Shown as one sentence, without a traceback."""


class ConfigError(UserError):
    """A setting, a name or a combination of settings that cannot be used."""


class ModelError(UserError):
    """A model that cannot be found, loaded or understood."""


class ModelNotAtHand(ModelError):
    """A model that the hub has, and this machine cannot get."""


class PromptError(UserError):
    """Prompts that the method cannot be applied to.

    Attributes:
        row: Which prompt is to blame, in the order given; None if it is none in particular.
    """

    def __init__(self, message: str, row: int | None = None) -> None:
        super().__init__(message)
        self.row = row


class CircuitError(UserError):
    """A circuit file that is broken or belongs to another model or level."""


class MeasurementError(UserError):
    """A number that would be meaningless, so it is not given."""


class FailedElsewhere(UserError):
    """A run of several processes ended early because of another one, which says why; so this is no failure of its own."""


def noted(error: BaseException, text: str) -> None:
    """Adds to an exception where it happened, for its traceback; Python shows it from 3.11 on."""
    notes = [*getattr(error, "__notes__", ()), text]
    error.__notes__ = notes  # add_note is newer than 3.10


@contextmanager
def noting(where: Callable[[], str]) -> Iterator[None]:
    """Adds to any exception from the body where it happened. What ``where`` gives is made only then."""
    try:
        yield
    except Exception as error:
        noted(error, where())
        raise


def unknown_choice(what: str, found: object, choices: Iterable[object], remedy: str = "") -> str:
    """The sentence for a name that is not among the known ones.

    Args:
        what: The kind of thing that was named, such as ``"task"``.
        found: What the user wrote.
        choices: What could have been written.
        remedy: A sentence to add at the end.
    """
    names = sorted(str(choice) for choice in choices)
    close = get_close_matches(str(found), names, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    listed = ", ".join(names) if names else "none"
    return f"There is no {what} named {str(found)!r}.{hint} Choices: {listed}.{' ' + remedy if remedy else ''}"
