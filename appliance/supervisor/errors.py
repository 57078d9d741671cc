"""What the supervisor raises."""


class StartError(Exception):
    """The appliance cannot run like this; the text is one line and names the key and what was expected."""
