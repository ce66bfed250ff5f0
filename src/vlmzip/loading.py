"""Loading a checkpoint of any supported family: everything cheap is checked before the weights."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    PreTrainedConfig,
    ProcessorMixin,
)

from vlmzip.errors import UnsupportedModelError
from vlmzip.families import families, family_of
from vlmzip.tiny import NAMES, tiny_path

_PROCESSOR_FILES = {
    "processor": ("processor_config.json", "preprocessor_config.json"),
    "tokenizer": ("tokenizer.json", "tokenizer.model", "vocab.json"),
}
DTYPES = ("auto", "float32", "bfloat16", "float16")


def load(model: str, dtype: str = "auto", device: str = "auto") -> tuple[Any, Any]:
    """Load a model and its processor.

    Args:
        model: A checkpoint folder, a hub name, or the name of an embedded model.
        dtype: "auto" (the checkpoint's own), "float32", "bfloat16" or "float16".
        device: "auto" (a GPU if there is one), or a torch device such as "cpu" or "cuda:1".

    Returns:
        (model, processor), the model in eval mode on the device.

    Raises:
        ValueError: There is no such checkpoint, a file of it is missing or corrupt, weights are
            missing, or dtype or device cannot be had.
        UnsupportedModelError: Its family or configuration cannot be compressed.
    """
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; give one of {', '.join(DTYPES)}")
    target = find_device(device)
    source = find_checkpoint(model)
    config = load_config(source)
    processor = load_processor(source)
    return _load_model(source, config, dtype).eval().to(target), processor


def find_checkpoint(model: str) -> str:
    """The folder of an embedded model, or ``model`` itself if it can be a folder or a hub name.

    Raises:
        ValueError: It is a file, a folder without config.json, or a path that does not exist.
    """
    path = Path(model).expanduser()
    if model and path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"{path} holds no config.json, so it is not a checkpoint folder")
        return str(path)
    if model in NAMES:
        embedded = tiny_path(model)
        if not (embedded / "config.json").is_file():
            raise ValueError(
                f"the embedded model {model} is not part of this installation; give --model FOLDER, and "
                "for a tiny random checkpoint to try run: python -m vlmzip.tiny.random llava FOLDER"
            )
        return str(embedded)
    if model and path.exists():
        raise ValueError(f"{path} is a file; give the checkpoint's folder")
    if not model or model[0] in "./~" or model.count("/") != 1:
        raise ValueError(
            f"there is no checkpoint folder {model!r}; give a folder, a hub name such as owner/name, "
            f"or one of {', '.join(NAMES)}"
        )
    return model


def find_device(name: str) -> torch.device:
    """The device of that name, which is there and holds data.

    Raises:
        ValueError: It is unknown or not available.
    """
    if name == "auto":
        has_mps = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu"
    try:
        torch.ones(1, device=name).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(
            f"device {name!r} cannot be used: {reason}; give auto, cpu, or a GPU that torch sees"
        ) from error
    return torch.device(name)


def load_config(source: str, known: Collection[str] | None = None) -> Any:
    """The config alone, of a family that can be compressed.

    Args:
        source: A checkpoint folder or a hub name, as :func:`find_checkpoint` returns it.
        known: Model types to take; None: every family.

    Raises:
        ValueError: It cannot be read.
        UnsupportedModelError: Its model type is another, or its configuration cannot be compressed.
    """
    known = families() if known is None else sorted(known)
    with _explained("config", source):
        raw, _ = PreTrainedConfig.get_config_dict(source)
        if not isinstance(raw, dict):
            raise ValueError("its config.json holds no JSON object")
        model_type = raw.get("model_type")
    if model_type not in known:
        raise UnsupportedModelError(
            f"{source} is a model of type {model_type!r}, which is not supported; "
            f"supported: {', '.join(known)}"
        )
    with _explained("config", source):
        config = AutoConfig.from_pretrained(source)
    family_of(config)
    return config


def _load_model(source: str, config: Any, dtype: str) -> Any:
    """The model; weights that the checkpoint lacks would be random numbers, so they are an error."""
    with _explained("weights", source):
        model, info = AutoModelForImageTextToText.from_pretrained(
            source,
            config=config,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
        if wrong := sorted(name for name, *_ in info["mismatched_keys"]):
            raise ValueError(
                f"{len(wrong)} have other shapes than config.json says, {wrong[0]} the first"
            )
        if missing := sorted(info["missing_keys"]):
            raise ValueError(f"{len(missing)} are missing, {missing[0]} the first")
    return model


def load_processor(source: str) -> Any:
    """The processor of a checkpoint folder or hub name.

    Raises:
        ValueError: A file of it is missing or corrupt.
    """
    if Path(source).is_dir():
        for part, names in _PROCESSOR_FILES.items():
            if not any((Path(source) / name).is_file() for name in names):
                raise ValueError(f"{source} holds no {part}: none of {', '.join(names)}")
    with _explained("processor", source):
        processor = AutoProcessor.from_pretrained(source)
    if not isinstance(processor, ProcessorMixin):
        raise ValueError(
            f"{source} holds no processor, only a {type(processor).__name__}: its "
            "processor_config.json or preprocessor_config.json is missing"
        )
    return processor


@contextmanager
def _explained(part: str, source: str) -> Iterator[None]:
    """Whatever goes wrong is the checkpoint's fault: the loaders raise errors of many kinds."""
    try:
        yield
    except Exception as error:
        reason = str(error) if " " in str(error) else repr(error)  # a KeyError's text is the key
        raise ValueError(f"cannot load the {part} of {source}: {reason}") from error
