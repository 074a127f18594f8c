"""One class for each kind of failure. A message says what is wrong, where, and what to do about it."""

from __future__ import annotations


class LibraGradError(Exception):
    """Base of every error this package raises on purpose."""


class CaptureError(LibraGradError):
    """The model could not be captured as a graph."""


class ExportError(CaptureError):
    """``torch.export`` refuses the model as one graph."""


class NoPathError(CaptureError):
    """No gradient path leads from an output to an input."""


class InputError(LibraGradError):
    """An argument does not fit the model, the captured graph or the method asked for."""


class GuardError(InputError):
    """A call differs from the captured one in shape, container, dtype or constant.

    A module whose original is in memory captures it again for such a call; others raise this.
    """


class RuleError(LibraGradError):
    """A rules file or an added row is malformed; the message starts with ``file:line``."""


class UnknownOpError(LibraGradError):
    """Ops without a fact or a policy row lie on a live gradient path; all of them are listed."""


class ModeError(LibraGradError):
    """The captured graph cannot do what was asked (another mode or dtype, forward AD, a changed tree)."""


class VerificationError(LibraGradError):
    """The result broke a promise: another forward, a backward that does not add up, edits not undone."""


class CustomBackwardWarning(UserWarning):
    """The model calls a user-written ``autograd.Function``, whose own backward was not captured."""


class GateOutputWarning(UserWarning):
    """An output of the model is a gate (a softmax, a sigmoid): explain the logits instead."""


class CutWarning(UserWarning):
    """The model is no single graph: it is balanced in several, and roles end where they are cut."""


class TargetWarning(UserWarning):
    """The target is no sum of outputs times constants: maps of it do not add up to it."""


class BranchWarning(UserWarning):
    """The model's repeated modules are branches, and the method misses what flows past them."""
