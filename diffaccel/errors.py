"""What can go wrong, as a tree. Every message is one sentence a user can act on: rule, values met, remedy."""


class DiffaccelError(Exception):
    """Root of every error this package raises on purpose."""


class KnobError(DiffaccelError, ValueError):
    """A knob of a policy has a value outside its range."""


class UnsupportedError(DiffaccelError):
    """A technique, kernel or combination was asked of something that cannot take it."""


class KernelError(UnsupportedError):
    """The kernel that was asked for cannot compute this call here. An explicit choice never falls back."""


class NotEngagedError(DiffaccelError):
    """A technique was asked for and never fired; raised when the run ends, with the reason."""
