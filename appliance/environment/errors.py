"""What the environment raises."""


class EnvironmentError_(Exception):  # noqa: N801, N818 -- EnvironmentError is a builtin
    """The environment is not as wanted; the message names what, and what was expected or refused."""


class AddressesExhausted(EnvironmentError_):
    """No subnet of a family has an address to give out now."""


class AttachmentRefused(EnvironmentError_):
    """A link cannot be as it is wanted. Nothing was done: what was attached is as it was."""
