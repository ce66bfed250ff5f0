import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from vlmzip import Random, VisionZip, compress
from vlmzip.evaluation.intervals import paired_difference
from vlmzip.tiny import NAMES, load_tiny, tiny_path
from vlmzip.tiny.accuracy import accuracy_table, answer_all
from vlmzip.tiny.testset import exam_questions

MEGABYTE = 2**20


@pytest.mark.parametrize("name", NAMES)
def test_answers_most_of_the_first_questions_rightly(name):
    model, processor = load_tiny(name)
    table = accuracy_table(model, processor, exam_questions(70))
    assert table["accuracy"] >= 0.8


@pytest.mark.parametrize("name", NAMES)
def test_visionzip_keeps_more_than_random_at_a_ninth_of_the_tokens(name):
    model, processor = load_tiny(name)
    asked = exam_questions(210)

    def right(method):
        with compress(model, processor, method):
            given = answer_all(model, processor, asked)
        return [answer == question.answer for answer, question in zip(given, asked, strict=True)]

    ours = right(VisionZip(tokens=16))
    for seed in (0, 1):
        assert paired_difference(ours, right(Random(tokens=16, seed=seed))).low > 0


@pytest.mark.parametrize("name", NAMES)
def test_loads_by_plain_from_pretrained(name):
    model, info = AutoModelForImageTextToText.from_pretrained(tiny_path(name), output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    processor = AutoProcessor.from_pretrained(tiny_path(name))
    question = exam_questions(1)[0]
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question.question}]}]
    prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
    inputs = processor(images=question.images, text=prompt, return_tensors="pt")
    assert int((inputs["input_ids"] == model.config.image_token_id).sum()) == 144
    with torch.no_grad():
        assert torch.isfinite(model(**inputs).logits).all()


@pytest.mark.parametrize("name", NAMES)
def test_has_the_shape_that_engines_ask_for(name):
    config = json.loads((tiny_path(name) / "config.json").read_text())
    vision, text = config["vision_config"], config["text_config"]
    for part in (vision, text):
        heads = part["num_attention_heads"]
        assert heads % 2 == 0
        assert part["hidden_size"] // heads in (32, 64)
    assert vision["num_hidden_layers"] >= 6
    assert text["max_position_embeddings"] >= 2048
    assert config["vision_feature_layer"] == -2
    assert vision["model_type"] == (
        "clip_vision_model" if name == "tiny-llava" else "siglip_vision_model"
    )


@pytest.mark.parametrize("name", NAMES)
def test_is_small(name):
    files = {file.name: file.stat().st_size for file in tiny_path(name).iterdir()}
    assert files["model.safetensors"] <= 12 * MEGABYTE
    assert {"tokenizer.json", "config.json", "chat_template.jinja"} <= files.keys()


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match=r"tiny-llava, tiny-siglip"):
        tiny_path("tiny-lava")


def test_paths_need_no_heavy_import():
    code = (
        "import sys, types; sys.modules['vlmzip'] = p = types.ModuleType('vlmzip');"
        "p.__path__ = [sys.argv[1]];"
        "import vlmzip.tiny; vlmzip.tiny.tiny_path('tiny-llava');"
        "assert not {'torch', 'transformers'} & sys.modules.keys()"
    )
    package = str(tiny_path("tiny-llava").parents[2])
    subprocess.run([sys.executable, "-c", code, package], check=True, env=dict(os.environ))
