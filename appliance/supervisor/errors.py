"""What the supervisor raises."""


class StartError(Exception):
    """The appliance cannot run like this; the text is one line and names the key and what was expected."""


class RegistrationError(Exception):
    """A registration as another node than the one that this is."""


class NotReadyError(Exception):
    """What is asked for needs something that is still waited for; the text says what."""
