"""The ``vllm.general_plugins`` entry point: makes vLLM know our model classes."""

from vlmzip.vllm.registry import SERVED


def register() -> None:
    """Register our architecture names, and our classes under the stock names.

    vLLM calls this in every process: front end, engine core, workers, and the one that inspects a
    model class. The classes are named, not imported. Under a stock name they compress only if the
    config holds ``vlmzip`` settings, and are the stock model otherwise; under our own names they
    refuse a config without settings.
    """
    from vllm import ModelRegistry

    for row in SERVED.values():
        ModelRegistry.register_model(row.architecture, row.target)
        ModelRegistry.register_model(row.stock, row.target)
