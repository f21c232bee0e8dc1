"""The errors a user can meet. Each says what was given, what is allowed, and what to do next."""

from __future__ import annotations


class SecateurError(Exception):
    """Base of every error that is the user's to mend; the CLI prints it as one message, without a traceback."""


class InputError(SecateurError):
    """A bad argument, recipe key, file or folder."""


class ModelError(SecateurError):
    """The model cannot be opened, traced or cut."""


class PlanError(SecateurError):
    """The plan does not fit the model, or the budget cannot be met."""


class DataError(SecateurError):
    """Text is missing, unreadable or too short."""


class VerificationError(SecateurError):
    """Something that was written or cut does not compute what it should."""
