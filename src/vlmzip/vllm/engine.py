"""What a compressed vLLM is started with, checked before anything is started."""

import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import metadata
from typing import TYPE_CHECKING, Any

from vlmzip.errors import UnsupportedModelError

if TYPE_CHECKING:
    from vlmzip.methods import Method
    from vlmzip.vllm.settings import Compression

PLUGIN_GROUP = "vllm.general_plugins"
PLUGIN_NAME = "vlmzip"
# vLLM's default on a CPU is 128: a compressed prompt is often shorter than one such block, and the
# prefix cache holds whole blocks only.
CPU_BLOCK_SIZE = 32
# On a CPU vLLM asks for 92 % of the machine's memory, and does not start if other programs have more
# than the rest.
CPU_CACHE_BYTES = 4 << 30
_CACHE_SIZES = ("kv_cache_memory_bytes", "gpu_memory_utilization")

# Engine arguments that would have the model, or its config, come from elsewhere than what was checked.
_ALLOWED = {"model_impl": ("auto", "vllm"), "config_format": ("auto", "hf"), "hf_config_path": (None,)}


@dataclass(frozen=True)
class Plan:
    """A checkpoint and the settings that it is served with; both fit each other.

    Attributes:
        model: The checkpoint folder, or the hub name.
        config: Its transformers config, with these settings.
        compression: What the settings mean for this model.
        architecture: The name that only the plugin registers.
        stored: The checkpoint stores settings, these or others: vLLM alone refuses it.
    """

    model: str
    config: Any
    compression: "Compression"
    architecture: str
    stored: bool

    @property
    def settings(self) -> dict[str, Any]:
        """The ``vlmzip`` dict of the served model's config."""
        return self.compression.method.settings()

    def overrides(self, own: Any = None) -> dict[str, Any]:
        """vLLM's ``hf_overrides``: ``own`` ones of the caller, and what makes the engine strict.

        Raises:
            TypeError: ``own`` is not a dict.
            ValueError: ``own`` sets what is set here.
        """
        if own is not None and not isinstance(own, Mapping):
            raise TypeError(
                f"hf_overrides must be a dict to be merged with the compression's, got {own!r}"
            )
        ours = {"architectures": [self.architecture], "vlmzip": self.settings}
        if taken := sorted({*ours, "model_type"} & dict(own or {}).keys()):
            raise ValueError(
                f"hf_overrides must not set {' or '.join(taken)}: the compression sets or relies on it; "
                "give a method and its budget instead"
            )
        return {**(own or {}), **ours}


def engine_args(
    model: str | os.PathLike[str],
    method: "Method | None" = None,
    *,
    max_visual_tokens: int | None = None,
    **kw: Any,
) -> dict[str, Any]:
    """Keyword arguments for ``vllm.LLM(**...)``: an engine that is compressed or does not start.

    Reads the checkpoint's config only, and imports no vLLM. On vLLM's CPU build ``block_size`` is 32
    unless given: its own 128 is more than most compressed prompts have, so that they would never be
    found in the prefix cache. There, too, the KV cache has 4 GiB unless its size is given: vLLM would
    ask for nearly all of the memory.

    Args:
        model: A checkpoint folder, a hub name, or the name of an embedded model.
        method: An encoder method such as ``VisionZip(tokens=64)``. None: what the checkpoint stores.
        max_visual_tokens: The most tokens a view that a request may ask for, by
            ``mm_processor_kwargs={"visual_tokens": k}``. None: no more than the method's own budget.
        kw: Engine arguments of vLLM, passed on; ``hf_overrides`` is merged.

    Raises:
        TypeError: ``method`` is no method, or ``hf_overrides`` is no dict.
        ValueError: The budget does not fit, there is no such checkpoint or no method, or an argument
            would undo the compression.
        UnsupportedModelError: The plugin does not serve this model.
        RuntimeError: vLLM or the plugin is not installed, or VLLM_PLUGINS switches the plugin off.
    """
    check_arguments(kw)
    plan = make_plan(os.fspath(model), method, max_visual_tokens)
    rest = dict(kw)
    arguments = {"model": plan.model, "hf_overrides": plan.overrides(rest.pop("hf_overrides", None))}
    check_installed()
    return arguments | default_arguments(rest) | rest


def make_plan(model: str, method: "Method | None", max_visual_tokens: int | None = None) -> Plan:
    """Check a checkpoint's config, a method and its budget against each other.

    Args:
        model: A checkpoint folder, a hub name, or the name of an embedded model.
        method: What compresses it; None: what the checkpoint stores.
        max_visual_tokens: The most tokens a view that a request may ask for.

    Raises:
        TypeError: ``method`` is no method.
        ValueError: The budget does not fit, or there is no such checkpoint or no method.
        UnsupportedModelError: The plugin does not serve this model.
    """
    from vlmzip.compress import settle, stored_method
    from vlmzip.families import family_of
    from vlmzip.loading import find_checkpoint, load_config
    from vlmzip.vllm.registry import SERVED, served
    from vlmzip.vllm.settings import compression_of

    source = find_checkpoint(model)
    config = load_config(source, SERVED)
    row = served(config)
    named = getattr(config, "architectures", None) or [row.stock]
    if named[0] not in (row.stock, row.architecture):
        raise UnsupportedModelError(
            f"{source} is of the architecture {named[0]!r}, which vLLM runs with a model of its own; "
            f"served of type {config.model_type!r}: {row.stock}"
        )
    stored = getattr(config, "vlmzip", None) is not None
    if method is None and not stored:
        raise ValueError(
            f"no method was given and {source} stores none; give a budget, such as --tokens 64 on the "
            "command line or VisionZip(tokens=64) in Python"
        )
    method = settle(stored_method(config) if method is None else method, family_of(config))
    if max_visual_tokens is not None:
        method = replace(method, max_visual_tokens=max_visual_tokens)
    config.architectures = [row.architecture]
    config.vlmzip = method.settings()
    compression = compression_of(config)
    assert compression is not None
    return Plan(source, config, compression, row.architecture, stored)


def check_arguments(arguments: Mapping[str, Any]) -> None:
    """Refuse engine arguments that would undo the compression or make its checks worthless.

    Raises:
        ValueError: There is one.
    """
    for name, allowed in _ALLOWED.items():
        if (value := arguments.get(name, allowed[0])) not in allowed:
            shown = " or ".join(str(choice) for choice in allowed)
            raise ValueError(
                f"{name}={value!r} takes the model or its config from elsewhere than the compression; "
                f"leave it at {shown}"
            )
    if arguments.get("enable_mm_embeds"):
        raise ValueError(
            "enable_mm_embeds lets requests bring image embeddings of their own, which are not "
            "compressed; leave it off"
        )


def check_installed() -> None:
    """Check that vLLM is there and will load the plugin.

    Raises:
        RuntimeError: It is not, or it will not.
    """
    found = importlib.util.find_spec("vllm")
    if found is None or found.origin is None:  # without origin it is some folder of that name
        raise RuntimeError(
            "vLLM is not installed for this Python; on a GPU run: pip install 'vlmzip[vllm]', in a "
            "checkout without a GPU: bash scripts/install_vllm.sh .venv-vllm (docs/serving.md)"
        )
    points = metadata.entry_points(group=PLUGIN_GROUP)
    if not any(point.name == PLUGIN_NAME and point.module.startswith("vlmzip.") for point in points):
        raise RuntimeError(
            f"vLLM would not find the plugin: no entry point {PLUGIN_NAME!r} in the group "
            f"{PLUGIN_GROUP}; install vlmzip anew for this Python (pip install 'vlmzip[vllm]')"
        )
    listed = os.environ.get("VLLM_PLUGINS")
    if listed is not None and PLUGIN_NAME not in listed.split(","):
        raise RuntimeError(
            f"VLLM_PLUGINS={listed!r} keeps vLLM from loading the plugin; unset it, or add "
            f"{PLUGIN_NAME!r} to its list"
        )


def default_arguments(given: Mapping[str, Any]) -> dict[str, Any]:
    """Engine arguments that suit a CPU better than vLLM's own, unless ``given``; none elsewhere."""
    if not _on_cpu():
        return {}
    arguments = {} if "block_size" in given else {"block_size": CPU_BLOCK_SIZE}
    if not any(name in given for name in _CACHE_SIZES) and "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
        arguments["kv_cache_memory_bytes"] = CPU_CACHE_BYTES
    return arguments


def installed_version() -> str | None:
    """The version of the vLLM that is installed; None without one."""
    try:
        return metadata.version("vllm")
    except metadata.PackageNotFoundError:
        return None


def _on_cpu() -> bool:
    """Whether the vLLM installed is a CPU build, which vLLM itself tells by its version, too."""
    return "cpu" in (installed_version() or "")
