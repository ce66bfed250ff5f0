"""Bad input, one table: what is given, and what must be said about it.

New rows go here: COMMANDS for the command line, CALLS for Python. ``test_bad_input.py`` runs them.
"""

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import BertConfig, LlamaConfig, PixtralVisionConfig

import vlmzip
from vlmzip import Random, UnsupportedModelError, VisionZip, compress, zip_tokens
from vlmzip.methods import from_settings
from vlmzip.tiny.random.llava import build

QUESTION = "What is it?"


@dataclass(frozen=True)
class Bench:
    """What the rows are about: a good model of 65 tokens a view, a good image, and bad ones of both.

    Attributes:
        folder: Holds the checkpoint ``good``, each of ``CHECKPOINTS`` and each of ``IMAGES``.
        model: A tiny LLaVA; each row gets its own.
        processor: Its processor.
        image: An image.
    """

    folder: Path
    model: Any
    processor: Any
    image: Image.Image

    def inputs(self, processor: Any = None, text: str = "<image>\nhi") -> Any:
        """Inputs for the model."""
        return (processor or self.processor)(images=[self.image], text=[text], return_tensors="pt")


@dataclass(frozen=True)
class Command:
    """A command line that must end with exit code 2 and one line that matches ``says``.

    ``{dir}`` is the bench's folder; ``{image}`` and ``{model}`` are a good image and model in it.
    """

    name: str
    line: str
    says: str
    question: str = QUESTION

    def words(self, folder: Path) -> list[str]:
        """The arguments; QUESTION stands for the question, spaces and all."""
        known = {"dir": folder, "image": folder / "good.png", "model": folder / "good"}
        words = [word.format(**known) for word in self.line.split()]
        return [self.question if word == "QUESTION" else word for word in words]


@dataclass(frozen=True)
class Call:
    """A Python call that must raise ``error`` with a message that matches ``says``."""

    name: str
    run: Callable[[Bench], Any]
    error: type[Exception]
    says: str


# --- bad checkpoints: each is a copy of a good one that the function spoils ---------------------------


def edit_json(name: str, **changes: Any) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return spoil


def remove(*names: str) -> Callable[[Path], None]:
    return lambda folder: [(folder / name).unlink() for name in names] and None


def write(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text) and None


def cut_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])


def edit_weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", {"format": "pt"})

    return spoil


def spoil_weight(part: str, value: float) -> Callable[[Path], None]:
    def change(weights: dict[str, torch.Tensor]) -> None:
        (name,) = [name for name in weights if name.endswith(part)]
        weights[name].fill_(value)

    return edit_weights(change)


def pixtral(folder: Path) -> None:
    edit_json("config.json", vision_config=PixtralVisionConfig().to_dict())(folder)


def other_size(folder: Path) -> None:
    build(224)[1].save_pretrained(folder)


def text_only(config: Any) -> Callable[[Path], None]:
    return lambda folder: config.save_pretrained(folder)


SMALL_LLAMA = LlamaConfig(
    vocab_size=300, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
)
PROJECTOR = "multi_modal_projector.linear_1.weight"

CHECKPOINTS: dict[str, Callable[[Path], None]] = {
    "no_config": remove("config.json"),
    "corrupt_config": write("config.json", '{"model_type": "llava", '),
    "list_config": write("config.json", "[1, 2]"),
    "unknown_type": edit_json("config.json", model_type="spaceship"),
    "no_type": write("config.json", "{}"),
    "text_only": text_only(LlamaConfig(num_hidden_layers=1)),
    "bert": text_only(BertConfig(num_hidden_layers=1)),
    "pixtral": pixtral,
    "bad_layer": edit_json("config.json", vision_feature_layer=-9),
    "bad_field": edit_json("config.json", vision_feature_select_strategy=7),
    "bad_settings": edit_json("config.json", vlmzip={"method": "visionzip", "tokens": 900}),
    "odd_settings": edit_json("config.json", vlmzip={"method": "nonsense", "tokens": 9}),
    "list_settings": edit_json("config.json", vlmzip=[64]),
    "no_weights": remove("model.safetensors"),
    "cut_weights": cut_weights,
    "empty_weights": write("model.safetensors", ""),
    "fewer_weights": edit_weights(
        lambda weights: weights.pop(next(n for n in weights if n.endswith(PROJECTOR)))
    ),
    "other_shape": edit_json("config.json", text_config=SMALL_LLAMA.to_dict()),
    "nan_tower": spoil_weight("layers.1.mlp.fc1.weight", float("nan")),
    "nan_projector": spoil_weight(PROJECTOR, float("nan")),
    "inf_head": spoil_weight("lm_head.weight", float("inf")),
    "no_processor": remove("processor_config.json"),
    "corrupt_processor": write("processor_config.json", "{"),
    "no_tokenizer": remove("tokenizer.json", "tokenizer_config.json"),
    "corrupt_tokenizer": write("tokenizer.json", "{}"),
    "other_size": other_size,
    "other_patch": edit_json("processor_config.json", patch_size=16),
    "other_strategy": edit_json("processor_config.json", vision_feature_select_strategy="full"),
    "other_image_id": edit_json("config.json", image_token_index=7),
}


# --- bad images -----------------------------------------------------------------------------------


def make_images(folder: Path, good: Image.Image) -> None:
    """Write the images that the rows name."""
    good.save(folder / "good.png")
    good.save(folder / "good.jpg")
    good.save(folder / "good.tif")
    for name in ("png", "jpg", "tif"):
        data = (folder / f"good.{name}").read_bytes()
        (folder / f"truncated.{name}").write_bytes(data[: len(data) // 2])
    (folder / "empty.png").touch()
    (folder / "text.png").write_text("not an image, whatever its name says")
    (folder / "drawing.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>')
    Image.new("RGB", (1, 5000)).save(folder / "tall.png")
    Image.new("RGB", (5000, 1)).save(folder / "wide.png")
    for name, values in (("hdr", [[0.0, 900.0]]), ("nan", [[0.5, np.nan]])):
        Image.fromarray(np.array(values, dtype=np.float32)).save(folder / f"{name}.tif")
    Image.fromarray(np.array([[-5, 70_000]], dtype=np.int32)).save(folder / "int32.tif")


def make_checkpoints(folder: Path) -> None:
    """Write the good checkpoint and the spoilt copies of it."""
    model, processor = build(112)
    model.save_pretrained(folder / "good")
    processor.save_pretrained(folder / "good")
    for name, spoil in CHECKPOINTS.items():
        shutil.copytree(folder / "good", folder / name)
        spoil(folder / name)


# --- the command line -----------------------------------------------------------------------------

ASK = "ask {image} QUESTION --model {model} "
ON = "ask {image} QUESTION --model {dir}/"
LOOK = "show {image} --json --model {model} "
EVAL = "eval --model {model} --questions 1 --tokens 9 "

COMMANDS = [
    Command("unknown verb", "explain", r"No such command 'explain'"),
    Command("mistyped verb", "shw", r"Did you mean 'show'"),
    Command("no image", "ask", r"Missing argument 'IMAGE'"),
    Command("no question", "ask {image}", r"Missing argument 'QUESTION'"),
    Command("unknown option", ASK + "--speed 3", r"No such option.*--speed"),
    Command("too many arguments", ASK + "more", r"unexpected extra argument.*more"),
    # budgets
    Command("tokens 0", ASK + "--tokens 0", r"tokens must be at least 1, got 0"),
    Command("tokens negative", ASK + "--tokens -3", r"tokens must be at least 1, got -3"),
    Command("tokens not a number", ASK + "--tokens many", r"'--tokens'.*integer"),
    Command("tokens a fraction", ASK + "--tokens 6.5", r"'--tokens'.*integer"),
    Command("too many tokens", ASK + "--tokens 66", r"66 tokens does not fit: a view has only 65"),
    Command("too many tokens, show", LOOK + "--tokens 66", r"66 tokens does not fit"),
    Command("two budgets", ASK + "--tokens 6 --keep 0.5", r"exactly one budget.*tokens, keep"),
    Command("pair and tokens", ASK + "--tokens 6 --dominant 3 --contextual 3", r"exactly one budget"),
    Command("dominant alone", ASK + "--dominant 5", r"dominant= and contextual= go together"),
    Command("contextual alone", ASK + "--contextual 5", r"go together"),
    Command("dominant 0", ASK + "--dominant 0 --contextual 5", r"dominant must be at least 1, got 0"),
    Command("contextual negative", ASK + "--dominant 5 --contextual -1", r"at least 0, got -1"),
    Command("pair too large", ASK + "--dominant 60 --contextual 6", r"66 tokens does not fit"),
    Command("keep 0", ASK + "--keep 0", r"keep must be a share in \(0, 1\], got 0"),
    Command("keep above 1", ASK + "--keep 1.5", r"keep must be a share.*got 1\.5"),
    Command("keep nan", ASK + "--keep nan", r"keep must be a share.*got nan"),
    Command("total_tokens 1", ASK + "--total-tokens 1", r"total_tokens must be at least 2, got 1"),
    Command("total_tokens too many", ASK + "--total-tokens 66", r"66 tokens does not fit"),
    # methods
    Command("unknown method", ASK + "--method magic", r"unknown method 'magic'; known: .*visionzip"),
    Command("unknown merge", ASK + "--merge sum", r"merge must be one of 'reference', 'average'"),
    Command("unknown order", ASK + "--order random", r"order must be one of 'grouped', 'raster'"),
    Command(
        "merge of a method without", ASK + "--method random --merge average", r"unknown setting merge"
    ),
    Command(
        "pair of a method without", ASK + "--method uniform --dominant 3 --contextual 2", r"dominant"
    ),
    # other options
    Command("max-new-tokens 0", ASK + "--max-new-tokens 0", r"--max-new-tokens must be at least 1"),
    Command("unknown dtype", ASK + "--dtype int8", r"unknown dtype 'int8'; give one of auto, float32"),
    Command("unknown device", ASK + "--device toaster", r"device 'toaster' cannot be used"),
    Command("device that is not there", ASK + "--device cuda:99", r"device 'cuda:99' cannot be used"),
    Command("device without data", ASK + "--device meta", r"device 'meta' cannot be used"),
    Command("show without output", "show {image} --model {model}", r"give -o FILE .* or --json"),
    Command("show, unknown ending", LOOK + "-o {dir}/a.xyz", r"must end in one of .*\.png"),
    Command("show, no ending", LOOK + "-o {dir}/map", r"must end in one of"),
    Command("show into no folder", LOOK + "-o {dir}/nowhere/a.png", r"there is no folder .*nowhere"),
    Command("show onto the image", LOOK + "-o {image}", r"it is the image itself"),
    # eval, demo, path
    Command("eval, unknown method", EVAL + "--methods vision", r"unknown method 'vision'; known: .*zip"),
    Command("eval, no method", EVAL + "--methods=", r"--methods must be a list with commas"),
    Command(
        "eval, method twice", EVAL + "--methods random,random", r"one of the methods was given twice"
    ),
    Command("eval, tokens no number", EVAL + "--tokens 16,x", r"--tokens must be whole numbers.*'x'"),
    Command("eval, tokens 0", EVAL + "--tokens 16,0", r"tokens must be at least 1, got 0"),
    Command(
        "eval, too many tokens", EVAL + "--tokens 9,66", r"66 tokens does not fit: a view has only 65"
    ),
    Command("eval, tokens twice", EVAL + "--tokens 9,9", r"one of the tokens was given twice"),
    Command("eval, no questions", EVAL + "--questions 0", r"between 1 and 3150, got 0"),
    Command("eval, too many questions", EVAL + "--questions 3151", r"between 1 and 3150, got 3151"),
    Command("eval, no batch", EVAL + "--batch 0", r"a batch must have at least 1 question, got 0"),
    Command(
        "eval, seed for nobody", EVAL + "--methods uniform --seed 1", r"none of uniform draws at random"
    ),
    Command("eval, negative seed", EVAL + "--seed -1", r"seed must be at least 0, got -1"),
    Command("eval into no folder", EVAL + "-o {dir}/nowhere/a", r"there is no folder .*nowhere"),
    Command("eval into a folder", EVAL + "-o {dir}", r"it is a folder"),
    Command("eval into an image", EVAL + "-o {image}", r"good.png is no file of answers"),
    Command("eval, unknown model", "eval --model nothing", r"there is no checkpoint folder 'nothing'"),
    Command("demo, unknown ending", "demo -o map.xyz", r"must end in one of .*\.png"),
    Command("demo into no folder", "demo -o {dir}/nowhere/map.png", r"there is no folder .*nowhere"),
    Command("path, unknown name", "path tiny-lava", r"choose one of: tiny-llava, tiny-siglip"),
    Command("path, no name", "path", r"Missing argument 'NAME'"),
    # questions
    Command("empty question", ASK, r"the question is empty", question=""),
    Command("blank question", ASK, r"the question is empty", question=" \n "),
    Command(
        "question with <image>", ASK, r"holds the image placeholder <image>", question="<image> what?"
    ),
    Command("question beyond the context", ASK, r"model's context of 4096", question="why " * 1100),
    Command(
        "question that fits compressed only",
        ASK + "--compare --max-new-tokens 1",
        r"the prompt has 41\d\d tokens.*context of 4096",
        question="x" * 4050,
    ),
    Command("answer beyond the context", ASK + "--max-new-tokens 5000", r"lower --max-new-tokens"),
    # images
    Command(
        "no such image", "ask {dir}/none.png QUESTION --model {model}", r"there is no file .*none.png"
    ),
    Command("folder as image", "ask {dir} QUESTION --model {model}", r"is a folder; give an image file"),
    Command("empty image", "ask {dir}/empty.png QUESTION --model {model}", r"empty.png is empty"),
    Command("text as image", "ask {dir}/text.png QUESTION --model {model}", r"not an image of a kind"),
    Command("svg", "show {dir}/drawing.svg --json --model {model}", r"not an image of a kind"),
    Command("truncated png", "ask {dir}/truncated.png QUESTION --model {model}", r"truncated or damaged"),
    Command(
        "truncated jpeg", "ask {dir}/truncated.jpg QUESTION --model {model}", r"truncated or damaged"
    ),
    Command(
        "truncated tiff", "show {dir}/truncated.tif --json --model {model}", r"truncated|not an image"
    ),
    Command("1 x 5000", "ask {dir}/tall.png QUESTION --model {model}", r"1 x 5000 pixels"),
    Command("5000 x 1", "show {dir}/wide.png --json --model {model}", r"5000 x 1 pixels"),
    Command("hdr", "ask {dir}/hdr.tif QUESTION --model {model}", r"F numbers from 0 to 900"),
    Command("nan pixels", "ask {dir}/nan.tif QUESTION --model {model}", r"pixels hold NaN"),
    Command("32 bits", "ask {dir}/int32.tif QUESTION --model {model}", r"I numbers from -5 to 70000"),
    # checkpoints
    Command("no such folder", ON + "nowhere", r"there is no checkpoint folder .*nowhere"),
    Command(
        "no such name", "ask {image} QUESTION --model nothing", r"there is no checkpoint folder 'nothing'"
    ),
    Command("empty name", "ask {image} QUESTION --model=", r"there is no checkpoint folder ''"),
    Command(
        "hub name offline", "ask {image} QUESTION --model no/such", r"cannot load the config of no/such"
    ),
    Command(
        "file as model", ON + "good/config.json", r"config.json is a file; give the checkpoint's folder"
    ),
    Command("no config", ON + "no_config", r"no_config holds no config.json"),
    Command("corrupt config", ON + "corrupt_config", r"cannot load the config of .*JSON"),
    Command("config of another kind", ON + "list_config", r"config.json holds no JSON object"),
    Command(
        "unknown model type",
        ON + "unknown_type",
        r"'spaceship', which is not supported; supported: .*llava",
    ),
    Command("no model type", ON + "no_type", r"no_type is a model of type None, which is not supported"),
    Command("text-only model", ON + "text_only", r"'llama', which is not supported; supported:"),
    Command("bert, show", "show {image} --json --model {dir}/bert", r"'bert', which is not supported"),
    Command("pixtral tower", ON + "pixtral", r"'pixtral' vision tower cannot be compressed"),
    Command("layer out of range", ON + "bad_layer", r"vision_feature_layer=-9 does not exist"),
    Command("config of the wrong type", ON + "bad_field", r"cannot load the config .*select_strategy"),
    Command("stored budget too large", ON + "bad_settings", r"900 tokens does not fit"),
    Command("stored method unknown", ON + "odd_settings", r"unknown method 'nonsense'"),
    Command("stored settings no dict", ON + "list_settings", r"must be a settings dict, got \[64\]"),
    Command("no weights", ON + "no_weights", r"cannot load the weights of .*no_weights"),
    Command("cut weights", ON + "cut_weights", r"cannot load the weights of .*cut_weights"),
    Command("empty weights", ON + "empty_weights", r"cannot load the weights of .*empty_weights"),
    Command("missing weights", ON + "fewer_weights", r"1 are missing, .*linear_1\.weight the first"),
    Command(
        "weights of other shapes",
        ON + "other_shape",
        r"have other shapes than config.json says, lm_head.weight the first",
    ),
    Command("NaN in the tower", ON + "nan_tower", r"vision tower gave NaN or infinite values"),
    Command(
        "NaN in the tower, show", "show {image} --json --model {dir}/nan_tower", r"gave NaN or infinite"
    ),
    Command("NaN in the projector", ON + "nan_projector", r"gave NaN or infinite logits"),
    Command("infinite head", ON + "inf_head", r"gave NaN or infinite logits"),
    Command("no processor", ON + "no_processor", r"holds no processor: none of processor_config.json"),
    Command("corrupt processor", ON + "corrupt_processor", r"cannot load the processor of"),
    Command("no tokenizer", ON + "no_tokenizer", r"holds no tokenizer: none of tokenizer.json"),
    Command("corrupt tokenizer", ON + "corrupt_tokenizer", r"cannot load the processor of"),
    Command("processor of another size", ON + "other_size", r"another model's"),
    Command("processor of another patch", ON + "other_patch", r"another model's"),
    Command("processor of another strategy", ON + "other_strategy", r"makes 65 image tokens .* has 64"),
    Command("other image token", ON + "other_image_id", r"image token has id 3, the model's 7"),
]


# --- Python ---------------------------------------------------------------------------------------


def tensors(n: int = 9, **changes: Any) -> dict[str, Any]:
    """Good arguments of zip_tokens, with changes."""
    generator = torch.Generator().manual_seed(0)
    good: dict[str, Any] = {
        "hidden": torch.randn(2, n, 8, generator=generator),
        "scores": torch.rand(2, n, generator=generator),
        "keys": torch.randn(2, n, 4, generator=generator),
        "dominant": 3,
        "contextual": 2,
    }
    return good | changes


def spoilt(name: str, value: float) -> dict[str, Any]:
    arguments = tensors()
    arguments[name][1, 4] = value
    return arguments


def twice(bench: Bench) -> None:
    compress(bench.model, bench.processor, VisionZip(tokens=9))
    compress(bench.model, copy.deepcopy(build(112)[1]), VisionZip(tokens=9))


def processor_twice(bench: Bench) -> None:
    compress(bench.model, bench.processor, VisionZip(tokens=9))
    compress(build(112)[0], bench.processor, VisionZip(tokens=9))


def after_removal(read: Callable[[Any], Any]) -> Callable[[Bench], Any]:
    def run(bench: Bench) -> Any:
        zipped = compress(bench.model, bench.processor, VisionZip(tokens=9))
        zipped.remove()
        zipped.remove()  # harmless
        bench.model(**bench.inputs())  # and the model works as before
        return read(zipped)

    return run


def other_processor(tokens: int | None) -> Callable[[Bench], Any]:
    """Run a model that keeps 9 tokens on a prompt sized by another processor."""

    def run(bench: Bench) -> None:
        model, processor = build(112)
        if tokens is not None:
            compress(model, processor, VisionZip(tokens=tokens))
        compress(bench.model, None, VisionZip(tokens=9))
        bench.model.generate(**bench.inputs(processor), max_new_tokens=1)

    return run


def uncompressed_model(bench: Bench) -> None:
    model, _ = build(112)
    compress(bench.model, bench.processor, VisionZip(tokens=9))
    model(**bench.inputs())


def prompt(text: str, images: int = 1) -> Callable[[Bench], Any]:
    def run(bench: Bench) -> Any:
        compress(bench.model, bench.processor, VisionZip(tokens=9))
        pictures = [bench.image] * images or None
        return bench.processor(images=pictures, text=[text], return_tensors="pt")

    return run


def forward_with(**arguments: Any) -> Callable[[Bench], Any]:
    def run(bench: Bench) -> Any:
        compress(bench.model, bench.processor, VisionZip(tokens=9))
        return bench.model.get_image_features(bench.inputs()["pixel_values"], **arguments)

    return run


def nan_weights(bench: Bench) -> None:
    with torch.no_grad():
        bench.model.base_model.vision_tower.encoder.layers[0].mlp.fc1.weight.fill_(float("nan"))
    with compress(bench.model, bench.processor, VisionZip(tokens=9)):
        bench.model(**bench.inputs())


def odd_model(**settings: Any) -> Callable[[Bench], Any]:
    def run(bench: Bench) -> Any:
        for name, value in settings.items():
            setattr(bench.model.config, name, value)
        return compress(bench.model, None, VisionZip(tokens=9))

    return run


def siglip_default(bench: Bench) -> Any:
    model, processor = build(112, "siglip")
    model.config.vision_feature_select_strategy = "default"
    return compress(model, processor, VisionZip(tokens=9))


def stored(settings: Any) -> Callable[[Bench], Any]:
    def run(bench: Bench) -> Any:
        bench.model.config.vlmzip = settings
        return compress(bench.model, bench.processor)

    return run


def text_model(bench: Bench) -> Any:
    return compress(bench.model.base_model.language_model, None, VisionZip(tokens=9))


V, T, U = ValueError, TypeError, UnsupportedModelError
WRONG: Any = "wrong on purpose"

CALLS = [
    # settings
    Call("no budget", lambda b: VisionZip(), V, r"exactly one budget.*got none"),
    Call("two budgets", lambda b: VisionZip(tokens=8, keep=0.1), V, r"got tokens, keep"),
    Call("budget and pair", lambda b: VisionZip(tokens=8, dominant=4, contextual=4), V, r"dominant"),
    Call("dominant alone", lambda b: VisionZip(dominant=4), V, r"go together"),
    Call("tokens 0", lambda b: VisionZip(tokens=0), V, r"tokens must be at least 1"),
    Call("tokens a float", lambda b: VisionZip(tokens=WRONG and 8.0), V, r"must be an integer, got 8\.0"),
    Call("tokens a bool", lambda b: VisionZip(tokens=True), V, r"must be an integer, got True"),
    Call("tokens a string", lambda b: VisionZip(tokens=WRONG), V, r"must be an integer"),
    Call("tokens a tensor", lambda b: VisionZip(tokens=WRONG and torch.tensor(8)), V, r"integer"),
    Call("keep nan", lambda b: VisionZip(keep=float("nan")), V, r"share in \(0, 1\], got nan"),
    Call("keep a string", lambda b: VisionZip(keep=WRONG), V, r"share in \(0, 1\]"),
    Call("merge", lambda b: VisionZip(tokens=8, merge=WRONG), V, r"merge must be one of"),
    Call("order", lambda b: VisionZip(tokens=8, order=WRONG), V, r"order must be one of"),
    Call("send_cls", lambda b: VisionZip(tokens=8, send_cls=WRONG), V, r"send_cls must be True or False"),
    Call("seed", lambda b: Random(tokens=8, seed=-1), V, r"seed must be at least 0"),
    Call("settings no dict", lambda b: from_settings(WRONG), T, r"settings must be a dict, got str"),
    Call(
        "settings of no method", lambda b: from_settings({"tokens": 8}), V, r"unknown method None; known"
    ),
    Call("unknown setting", lambda b: from_settings({"method": "random", "tone": 1}), V, r"setting tone"),
    # zip_tokens
    Call(
        "numpy",
        lambda b: zip_tokens(**tensors(hidden=np.zeros((2, 9, 8)))),
        T,
        r"torch.Tensor, got ndarray",
    ),
    Call(
        "integers",
        lambda b: zip_tokens(**tensors(keys=torch.ones(2, 9, 4, dtype=torch.int64))),
        T,
        r"keys",
    ),
    Call(
        "axes", lambda b: zip_tokens(**tensors(hidden=torch.zeros(9, 8))), V, r"hidden must have 3 axes"
    ),
    Call("scores of others", lambda b: zip_tokens(**tensors(scores=torch.rand(2, 8))), V, r"\[2, 8\]"),
    Call("keys of others", lambda b: zip_tokens(**tensors(keys=torch.rand(1, 9, 4))), V, r"\[1, 9\]"),
    Call("too many kept", lambda b: zip_tokens(**tensors(dominant=8)), V, r"8 \+ 2 exceeds the 9 tokens"),
    Call("no dominant", lambda b: zip_tokens(**tensors(dominant=0)), V, r"dominant must be at least 1"),
    Call("contextual -1", lambda b: zip_tokens(**tensors(contextual=-1)), V, r"at least 0, got -1"),
    Call("merge unknown", lambda b: zip_tokens(**tensors(merge=WRONG)), V, r"merge must be one of"),
    Call("order None", lambda b: zip_tokens(**tensors(order=None)), V, r"order must be one of"),
    Call("NaN hidden", lambda b: zip_tokens(**spoilt("hidden", float("nan"))), V, r"hidden holds NaN"),
    Call("NaN scores", lambda b: zip_tokens(**spoilt("scores", float("nan"))), V, r"scores holds NaN"),
    Call("infinite keys", lambda b: zip_tokens(**spoilt("keys", float("inf"))), V, r"keys holds NaN"),
    # compress
    Call("no model", lambda b: compress(WRONG, None, VisionZip(tokens=9)), T, r"must be a transformers"),
    Call(
        "bare module",
        lambda b: compress(torch.nn.Linear(2, 2), None, VisionZip(tokens=9)),
        T,
        r"got Linear",
    ),
    Call(
        "compiled model",
        lambda b: compress(torch.compile(b.model), None, VisionZip(tokens=9)),
        T,
        r"compress it first",
    ),
    Call("text model", text_model, U, r"model_type 'llama' is not supported; supported: .*llava"),
    Call("no method", lambda b: compress(b.model, b.processor), V, r"pass one, such as VisionZip"),
    Call(
        "method a dict",
        lambda b: compress(b.model, b.processor, WRONG and {"tokens": 9}),
        T,
        r"method must be",
    ),
    Call(
        "method a class",
        lambda b: compress(b.model, b.processor, WRONG and VisionZip),
        T,
        r"method must be",
    ),
    Call(
        "budget too large", lambda b: compress(b.model, None, VisionZip(tokens=66)), V, r"only 65 tokens"
    ),
    Call(
        "without CLS one fewer",
        lambda b: compress(b.model, None, VisionZip(tokens=65, send_cls=False)),
        V,
        r"only 64",
    ),
    Call("stored settings a list", stored([9]), V, r"must be a settings dict"),
    Call(
        "stored settings unknown",
        stored({"method": "visionzip", "speed": 9}),
        V,
        r"unknown setting speed",
    ),
    Call(
        "tokenizer as processor",
        lambda b: compress(b.model, b.processor.tokenizer, VisionZip(tokens=9)),
        T,
        r"must be a transformers processor",
    ),
    Call(
        "processor of another size",
        lambda b: compress(b.model, build(224)[1], VisionZip(tokens=9)),
        V,
        r"another model's",
    ),
    Call("siglip under default", siglip_default, U, r"an image patch would be lost"),
    Call("embedding layer", odd_model(vision_feature_layer=0), U, r"is the embedding"),
    Call("layer out of range", odd_model(vision_feature_layer=-9), U, r"tower of 4 layers"),
    Call("model twice", twice, V, r"model is already compressed; call remove"),
    Call("processor twice", processor_twice, V, r"processor is already compressed; call remove"),
    Call(
        "handle of a stock model",
        lambda b: vlmzip.Compressed(b.model),
        V,
        r"not compressed; call compress",
    ),
    Call(
        "last after two removes",
        after_removal(lambda z: z.last),
        RuntimeError,
        r"compression was removed",
    ),
    Call(
        "save after removal",
        after_removal(lambda z: z.save_pretrained("x")),
        RuntimeError,
        r"save before",
    ),
    # running
    Call(
        "stock processor, compressed model",
        other_processor(None),
        V,
        r"not made by the processor that was compressed",
    ),
    Call(
        "other budget's processor",
        other_processor(12),
        V,
        r"not made by the processor that was compressed",
    ),
    Call("compressed processor, stock model", uncompressed_model, V, r"do not match"),
    Call("no placeholder", prompt("hello"), V, r"0 <image> placeholders for 1 images"),
    Call("two placeholders", prompt("<image> <image>"), V, r"2 <image> placeholders for 1 images"),
    Call("two images", prompt("<image>", images=2), V, r"1 <image> placeholders for 2 images"),
    Call("placeholder without image", prompt("<image> hi", images=0), V, r"no images were given"),
    Call("other layer", forward_with(vision_feature_layer=-1), V, r"differs from -2, which compress"),
    Call(
        "other strategy",
        forward_with(vision_feature_select_strategy="full"),
        V,
        r"leave the argument out",
    ),
    Call("NaN weights", nan_weights, RuntimeError, r"vision tower gave NaN or infinite values"),
    # names
    Call("unknown embedded model", lambda b: vlmzip.tiny_path(WRONG), V, r"no embedded model is called"),
    Call(
        "unknown tiny family",
        lambda b: __import__("vlmzip.tiny.random", fromlist=["build"]).build(WRONG),
        V,
        r"unknown family",
    ),
    Call("unknown public name", lambda b: vlmzip.zip_token, AttributeError, r"no attribute 'zip_token'"),
]
