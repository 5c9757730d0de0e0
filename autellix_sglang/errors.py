"""Every error this package raises on purpose.

    AutellixError
    ├── ConfigError          a flag has a value that cannot work
    │   ├── UnsupportedModeError   an SGLang mode that program scheduling cannot honour
    │   └── PortInUseError         another process has the port, maybe only for now
    ├── IdentityError        an id in a request is malformed            -> HTTP 400
    ├── UnknownProgramError  no such program for this tenant            -> HTTP 404
    ├── ActivationError      SGLang started without our scheduler in place
    ├── ModelCacheError      no place for the built-in model
    ├── SwapError            KV rows cannot be moved as asked; raised before anything is moved
    ├── KernelError          the swap kernel cannot be compiled, loaded or launched
    └── ControlError         the scheduler did not answer a control message -> HTTP 503

Errors are for the user's mistakes and the world's; our own bugs are assertions.
"""

from __future__ import annotations

import os


class AutellixError(Exception):
    """Base of all errors raised on purpose by this package."""

    exit_status = 2  # of a command that it ends


class ConfigError(AutellixError):
    """A setting has a value that cannot work; names the field and the allowed values."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field}: {reason}")
        self.field = field
        self.reason = reason


class UnsupportedModeError(ConfigError):
    """An SGLang mode that program scheduling cannot honour; names the flag and why."""


class PortInUseError(ConfigError):
    """Another process has the port; by the time of the next try it may be free."""

    exit_status = os.EX_TEMPFAIL


class IdentityError(AutellixError, ValueError):
    """An id in a request is malformed; names the header or body field.

    A `ValueError` too, because that is what SGLang's endpoints answer with HTTP 400.
    """

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field}: {reason}")
        self.field = field


class UnknownProgramError(AutellixError):
    """The tenant has no program of this id (never had, ended, or forgotten after its TTL)."""

    def __init__(self, program_id: str) -> None:
        super().__init__(f"program {program_id!r} is not known (ended, or idle beyond its TTL)")
        self.program_id = program_id


class ActivationError(AutellixError):
    """SGLang came up without the program scheduler; serving on would be silently stock."""


class ModelCacheError(AutellixError):
    """There is no cache directory for the built-in model that only this user can write to."""


class SwapError(AutellixError, ValueError):
    """KV rows cannot be moved as asked (device, dtype, layout, bounds); nothing was moved."""


class KernelError(AutellixError):
    """The swap kernel cannot be compiled, loaded or launched; says what was tried."""


class ControlError(AutellixError):
    """The scheduler process did not answer a control message in time."""
