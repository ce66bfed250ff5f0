"""The one error type of our own."""


class UnsupportedModelError(ValueError):
    """A model, tower or configuration that vlmzip cannot compress; the message says why."""
