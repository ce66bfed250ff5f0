"""``vlmzip models``: the model families, and what is supported of each."""

from dataclasses import asdict
from typing import Any

from vlmzip.commands import options

_LABELS = {
    "models": "models",
    "tower": "vision tower",
    "layer": "layer read",
    "compressed": "compressed",
    "count": "image tokens",
    "tested": "tested",
    "untested": "not tested",
}


def models(as_json: options.Json = False) -> None:
    """List the model families, and what is supported of each."""
    import transformers

    from vlmzip.families import families
    from vlmzip.families.base import REGISTRY
    from vlmzip.methods import methods
    from vlmzip.vllm.engine import installed_version
    from vlmzip.vllm.registry import SERVED

    document = {
        "families": [{"family": name} | asdict(REGISTRY[name].card) for name in families()],
        "methods": list(methods()),
        "engines": [
            {
                "engine": "transformers",
                "version": transformers.__version__,
                "families": list(families()),
            },
            {"engine": "vllm", "version": installed_version(), "families": sorted(SERVED)},
        ],
    }
    if as_json:
        options.print_json(document)
    else:
        _print_cards(document)


def _print_cards(document: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    families = [card["family"] for card in document["families"]]
    for card in document["families"]:
        table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 3, 0, 0))
        table.add_column(style="dim", no_wrap=True)
        table.add_column()
        for name, label in _LABELS.items():
            table.add_row(label, card[name])
        console.print(card["family"], style="bold", markup=False)
        console.print(table)
        console.print()
    for engine in document["engines"]:
        served = "all families" if engine["families"] == families else ", ".join(engine["families"])
        version = engine["version"] or "(not installed)"
        console.print(f"{engine['engine']} {version}: {served}", markup=False)
    console.print(f"methods: {', '.join(document['methods'])}", markup=False)
