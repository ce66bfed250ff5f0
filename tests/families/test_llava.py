"""LLaVA as people use it, each use against the slow path: compressed by hand, fed as embeddings."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    PixtralVisionConfig,
    Trainer,
    TrainingArguments,
    pipeline,
)

import slow.llava as slow_llava
import vlmzip
from contract import METHODS, NEW_TOKENS, TOLERANCE, Case, embedded, fresh, image, placeholders
from vlmzip import Random, Uniform, UnsupportedModelError, VisionZip
from vlmzip.tiny.random.llava import build

METHOD = METHODS[0]
K = 12


@pytest.fixture(params=["clip", "siglip"])
def case(request: pytest.FixtureRequest) -> Case:
    return fresh("llava", request.param)


@pytest.fixture
def clip() -> Case:
    return fresh("llava", "clip")


def zipped_inputs(case: Case, counts: list[int], method: Any = METHOD) -> dict[str, Any]:
    with vlmzip.compress(case.model, case.processor, method):
        return case.inputs(counts)


def by_hand(case: Case, inputs: dict[str, Any], method: Any = METHOD) -> dict[str, Tensor]:
    """What the stock model takes in place of images: embeddings."""
    with torch.no_grad():
        embeds = embedded(case.model, inputs["input_ids"], case.features(inputs, method))
    return {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]}


# --- generation -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "how",
    [
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 3, "top_k": 0},
        {"do_sample": True, "num_beams": 2, "temperature": 0.7},
    ],
    ids=["beams", "sampling", "beam sampling"],
)
def test_decoding_strategies(case: Case, how: dict[str, Any]) -> None:
    inputs = zipped_inputs(case, [1, 2, 0])
    how |= {"max_new_tokens": 6, "output_scores": True, "return_dict_in_generate": True}
    torch.manual_seed(1)
    expected = case.model.generate(**by_hand(case, inputs), **how)
    torch.manual_seed(1)
    with vlmzip.compress(case.model, None, METHOD):
        out = case.model.generate(**inputs, **how)
    assert torch.equal(out.sequences[:, inputs["input_ids"].shape[1] :], expected.sequences)
    for fast, slow in zip(out.scores, expected.scores, strict=True):
        torch.testing.assert_close(fast, slow, **TOLERANCE)


def test_assisted_generation_with_a_compressed_assistant(clip: Case) -> None:
    inputs = zipped_inputs(clip, [2])
    expected = clip.greedy(inputs, METHOD)
    assistant = copy.deepcopy(clip.model)
    with torch.no_grad():  # it guesses well, but not always
        assistant.lm_head.weight += 0.01 * torch.randn_like(assistant.lm_head.weight)
    calls = count_calls(assistant)
    with vlmzip.compress(clip.model, None, METHOD), vlmzip.compress(assistant, None, METHOD):
        out = clip.generate(inputs, assistant_model=assistant)
    assert calls
    clip.assert_generates(out, expected)


@pytest.mark.parametrize("cache", ["static", "dynamic", None])
def test_caches(clip: Case, cache: str | None) -> None:
    inputs = zipped_inputs(clip, [1, 2])
    expected = clip.greedy(inputs, METHOD)
    how = {"use_cache": False} if cache is None else {"cache_implementation": cache}
    with vlmzip.compress(clip.model, None, METHOD):
        clip.assert_generates(clip.generate(inputs, **how), expected)


class Listener:
    """A streamer that keeps what it is sent."""

    def __init__(self) -> None:
        self.heard: list[int] = []

    def put(self, tokens: Tensor) -> None:
        self.heard += tokens.flatten().tolist()

    def end(self) -> None:
        self.heard.append(-1)


def test_streamer(clip: Case) -> None:
    inputs = zipped_inputs(clip, [1])
    listener = Listener()
    with vlmzip.compress(clip.model, None, METHOD):
        out = clip.generate(inputs, streamer=listener)
    assert listener.heard == [*out.sequences[0].tolist(), -1]
    clip.assert_generates(out, clip.greedy(inputs, METHOD))


def test_encode_once_ask_often(case: Case) -> None:
    asked = [case.prompt(1, "what? "), case.prompt(1, "and where is it, then? ")]
    with vlmzip.compress(case.model, case.processor, METHOD):
        singles = [
            dict(case.processor(images=case.images[0], text=text, return_tensors="pt")) for text in asked
        ]
        calls = count_calls(case.model.model.vision_tower)
        encoded = case.model.get_image_features(singles[0]["pixel_values"])
        outs = []
        for text, single in zip(asked, singles, strict=True):
            token = case.processor.image_token
            prompt = case.processor(text=text.replace(token, token * K), return_tensors="pt")
            assert torch.equal(prompt["input_ids"], single["input_ids"])
            outs.append(case.generate(dict(prompt), mm_encoder_outputs={"image": copy.copy(encoded)}))
        assert len(calls) == 1
    for out, single in zip(outs, singles, strict=True):
        case.assert_generates(out, case.greedy(single, METHOD))


def count_calls(module: torch.nn.Module) -> list[int]:
    """A list that grows by one with each call."""
    calls: list[int] = []
    module.register_forward_pre_hook(lambda *_: calls.append(1))
    return calls


def dialogue(*pictures: Any) -> list[dict[str, Any]]:
    """A conversation of two questions, the second with the rest of the images."""
    first, *rest = pictures
    return [
        {"role": "user", "content": [picture(first), {"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
        {"role": "user", "content": [*map(picture, rest), {"type": "text", "text": "And now?"}]},
    ]


def picture(one: Any) -> dict[str, Any]:
    return {"type": "image", "image": one}


def chat_inputs(case: Case, *pictures: Any) -> dict[str, Any]:
    return dict(
        case.processor.apply_chat_template(
            dialogue(*pictures),
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
    )


def test_chat_template(case: Case) -> None:
    with vlmzip.compress(case.model, case.processor, METHOD):
        inputs = chat_inputs(case, *case.images)
        out = case.generate(inputs)
    assert placeholders(case.model, inputs["input_ids"]).sum() == 3 * K
    case.assert_generates(out, case.greedy(inputs, METHOD))


@pytest.mark.parametrize("chat", [False, True], ids=["plain", "chat"])
def test_pipeline(case: Case, chat: bool) -> None:
    how = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
    with vlmzip.compress(case.model, case.processor, METHOD):
        pipe = pipeline("image-text-to-text", model=case.model, processor=case.processor)
        if chat:
            inputs = chat_inputs(case, *case.images[:2])
            (found,) = pipe(text=dialogue(*case.images[:2]), return_tensors=True, generate_kwargs=how)
        else:
            text = case.prompt(1, "what? ")
            inputs = dict(case.processor(images=case.images[0], text=text, return_tensors="pt"))
            (found,) = pipe(images=case.images[:1], text=text, return_tensors=True, generate_kwargs=how)
    expected = torch.cat([case.choose(step) for step in case.greedy(inputs, METHOD)], 1)
    tokens = torch.as_tensor(found["generated_token_ids"]).flatten()
    assert tokens.tolist() == [*inputs["input_ids"][0].tolist(), *expected[0].tolist()]


# --- training ---------------------------------------------------------------------------------


def labelled(case: Case, counts: list[int]) -> dict[str, Any]:
    """A right-padded batch from the compressed processor, text as labels."""
    inputs = case.inputs(counts, "right")
    labels = inputs["input_ids"].clone()
    labels[placeholders(case.model, labels) | (inputs["attention_mask"] == 0)] = -100
    return inputs | {"labels": labels}


def features_with_gradient(model: Any, inputs: dict[str, Any], method: Any) -> list[Tensor]:
    """The slow path's features, as a product that autograd sees through."""
    found = []
    for pixels in inputs["pixel_values"]:
        zipped, _ = slow_llava.zip_image(model, pixels, method)
        states = model.model.vision_tower(pixels[None], output_hidden_states=True).hidden_states
        hidden = states[model.config.vision_feature_layer][0]
        found.append(slow_llava.project(model, merge_matrix(zipped).float() @ hidden))
    return found


def merge_matrix(zipped: Any) -> Tensor:
    """[K, N]: what each token weighs in each kept one, merge="reference"."""
    assignment = zipped.assignment[0]
    matrix = torch.zeros(zipped.tokens.shape[1], len(assignment), dtype=torch.float64)
    kept = zipped.dominant[0].tolist() + zipped.contextual[0].tolist()
    for index in kept:
        row = assignment[index]
        others = [j for j in range(len(assignment)) if assignment[j] == row and j != index]
        matrix[row, others] = 1 / max(1, len(others))
        matrix[row, index] = 1
    return matrix


def test_every_gradient_equals_the_slow_paths(case: Case) -> None:
    with vlmzip.compress(case.model, case.processor, METHOD):
        batch = labelled(case, [1, 2])
        out = case.model(**batch)
        out.loss.backward()
    found = gradients(case.model)
    features = features_with_gradient(case.model, batch, METHOD)
    embeds = embedded(case.model, batch["input_ids"], features)
    slow = case.model(
        inputs_embeds=embeds, attention_mask=batch["attention_mask"], labels=batch["labels"]
    )
    slow.loss.backward()
    expected = gradients(case.model)
    torch.testing.assert_close(out.loss, slow.loss, **TOLERANCE)
    assert any("vision_tower.encoder.layers.2" in name for name in expected)
    assert any("multi_modal_projector" in name for name in expected)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-6, msg=name)


def gradients(model: Any) -> dict[str, Tensor]:
    """All gradients, by name; the model then has none."""
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


class Batches(torch.utils.data.Dataset):
    """Rows for the Trainer; the collator makes the batch."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, int]:
        return {"row": index}


def trainer(case: Case, folder: Any, **how: Any) -> Trainer:
    args = TrainingArguments(
        output_dir=folder,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        remove_unused_columns=False,
        disable_tqdm=True,
        logging_steps=1,
        **how,
    )
    rows = Batches(2)
    return Trainer(
        model=case.model,
        args=args,
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=lambda batch: labelled(case, [row["row"] + 1 for row in batch]),
        compute_metrics=lambda seen: {
            "same_shape": float(logits_of(seen).shape[:2] == seen.label_ids.shape)
        },
    )


def logits_of(seen: Any) -> Any:
    return seen.predictions[0] if isinstance(seen.predictions, tuple) else seen.predictions


def slow_loss(case: Case, batch: dict[str, Any]) -> float:
    with torch.no_grad():
        fed = by_hand(case, batch)
        return float(case.model(**fed, labels=batch["labels"]).loss)


def test_trainer_trains(case: Case, tmp_path: Any) -> None:
    with vlmzip.compress(case.model, case.processor, METHOD):
        batch = labelled(case, [1, 2])
    expected = slow_loss(case, batch)
    with vlmzip.compress(case.model, case.processor, METHOD):
        run = trainer(case, tmp_path, max_steps=8, learning_rate=5e-3, per_device_train_batch_size=2)
        run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(expected, abs=1e-3)
    assert losses[-1] < 0.9 * losses[0]


def test_trainer_evaluates(case: Case, tmp_path: Any) -> None:
    # With a cache, the Trainer of stock transformers fails on the DynamicCache in LLaVA's output.
    case.model.config.use_cache = case.model.config.text_config.use_cache = False
    with vlmzip.compress(case.model, case.processor, METHOD):
        batches = [labelled(case, [count]) for count in (1, 2)]
    expected = sum(slow_loss(case, batch) for batch in batches) / 2
    with vlmzip.compress(case.model, case.processor, METHOD):
        found = trainer(case, tmp_path, per_device_eval_batch_size=1).evaluate()
    assert found["eval_same_shape"] == 1
    assert found["eval_loss"] == pytest.approx(expected, abs=1e-3)


# --- methods and settings ---------------------------------------------------------------------

SETTINGS = [
    VisionZip(tokens=K, merge="average"),
    VisionZip(tokens=K, order="raster"),
    VisionZip(tokens=K, merge="average", order="raster", send_cls=False),
    VisionZip(tokens=K, send_cls=False),
    VisionZip(dominant=1, contextual=7),
    VisionZip(dominant=6, contextual=0, order="raster"),
    VisionZip(dominant=6, contextual=0, send_cls=False),
    VisionZip(tokens=1),
    VisionZip(tokens=64),
    VisionZip(tokens=64, send_cls=False),
    VisionZip(total_tokens=K),
    VisionZip(keep=0.01),
]


@pytest.mark.parametrize("method", SETTINGS, ids=repr)
def test_settings(case: Case, method: VisionZip) -> None:
    inputs = zipped_inputs(case, [1, 1], method)
    expected = case.features(inputs, method)
    with vlmzip.compress(case.model, None, method), torch.no_grad():
        found = case.model.get_image_features(inputs["pixel_values"]).pooler_output
        logits = case.model(**inputs).logits
    torch.testing.assert_close(list(found), expected, **TOLERANCE)
    with torch.no_grad():
        slow = case.logits(inputs, expected, method)
    torch.testing.assert_close(logits[:, -1], slow[:, -1], **TOLERANCE)


@pytest.fixture(scope="module")
def paper() -> Any:
    return build(image_size=336)


@pytest.mark.parametrize("tokens", [32, 64, 128, 192])
def test_the_papers_budgets_at_the_papers_577_tokens(paper: Any, tokens: int) -> None:
    model, processor = paper
    method = VisionZip(tokens=tokens)
    with vlmzip.compress(model, processor, method), torch.no_grad():
        inputs = processor(images=image(5, 400, 300), text="<image> what?", return_tensors="pt")
        logits = model(**inputs).logits
    features = slow_llava.features(model, inputs, method)
    assert placeholders(model, inputs["input_ids"]).sum() == len(features[0]) == tokens
    with torch.no_grad():
        embeds = embedded(model, inputs["input_ids"], features)
        torch.testing.assert_close(logits, model(inputs_embeds=embeds).logits, **TOLERANCE)


@pytest.mark.parametrize("send_cls", [True, False])
@pytest.mark.parametrize("kind", [Random, Uniform])
def test_baselines_keep_tokens_as_they_are(case: Case, kind: Any, send_cls: bool) -> None:
    method = kind(tokens=K, send_cls=send_cls)
    inputs = zipped_inputs(case, [2], method)
    has_cls = case.model.config.vision_config.model_type == "clip_vision_model"
    first = int(has_cls and send_cls)
    with vlmzip.compress(case.model, None, method) as zipped, torch.no_grad():
        found = case.model.get_image_features(inputs["pixel_values"]).pooler_output
        kept = [one.dominant[0].tolist() for one in zipped.last]
    with torch.no_grad():
        states = case.model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True)
        hidden = states.hidden_states[-2][:, int(has_cls and not send_cls) :]
        expected = [slow_llava.project(case.model, hidden[i, kept[i]]) for i in range(2)]
    torch.testing.assert_close(list(found), expected, **TOLERANCE)
    assert kept[0] == kept[1] == sorted(set(kept[0]))
    assert kept[0][:first] == [0][:first]
    if kind is Uniform:
        places = [int((i + 0.5) * 64 / (K - first)) + first for i in range(K - first)]
        assert kept[0][first:] == places


# --- layers and strategies --------------------------------------------------------------------


def built_with(**changes: Any) -> Case:
    """A CLIP LLaVA of another configuration."""
    model, processor = build(image_size=112)
    config = copy.deepcopy(model.config)
    for name, value in changes.items():
        setattr(config, name, value)
    torch.manual_seed(3)
    return Case(slow_llava, LlavaForConditionalGeneration(config).eval(), processor)


@pytest.mark.parametrize("layer", [-1, -3, 1, 2, 4, [-2, -3], [-3, -2], [1, 4], [-2]], ids=repr)
def test_other_feature_layers_are_read(layer: Any) -> None:
    case = built_with(vision_feature_layer=layer)
    inputs = zipped_inputs(case, [1, 1])
    expected = case.greedy(inputs, METHOD)
    with vlmzip.compress(case.model, None, METHOD):
        case.assert_generates(case.generate(inputs), expected)


@pytest.mark.parametrize(
    ("layer", "words"),
    [(0, "embedding"), (-5, "embedding"), (5, "not exist"), (-6, "not exist"), ([], "exist")],
)
def test_feature_layers_that_cannot_be_read_are_refused(layer: Any, words: str) -> None:
    case = built_with()
    case.model.config.vision_feature_layer = layer
    with pytest.raises(UnsupportedModelError, match=words):
        vlmzip.compress(case.model, case.processor, METHOD)


def test_another_layer_than_the_attached_one_is_refused(clip: Case) -> None:
    inputs = zipped_inputs(clip, [1])
    zipped = vlmzip.compress(clip.model, None, METHOD)
    clip.model(**inputs, vision_feature_layer=-2)
    with pytest.raises(ValueError, match="vision_feature_layer=-1"):
        clip.model(**inputs, vision_feature_layer=-1)
    with pytest.raises(ValueError, match="vision_feature_layer=-1"):
        clip.model.generate(**inputs, vision_feature_layer=-1, max_new_tokens=1)
    clip.model.config.vision_feature_layer = -3
    with pytest.raises(ValueError, match="vision_feature_layer=-3"):
        clip.model(**inputs)
    clip.model.config.vision_feature_layer = -2
    zipped.remove()


def test_strategy_full_on_a_tower_with_cls() -> None:
    case = built_with(vision_feature_select_strategy="full")
    case.processor.vision_feature_select_strategy = "full"
    for method in (METHOD, VisionZip(tokens=K, send_cls=False)):
        inputs = zipped_inputs(case, [1, 2], method)
        expected = case.greedy(inputs, method)
        with vlmzip.compress(case.model, None, method):
            case.assert_generates(case.generate(inputs), expected)


def test_another_strategy_than_the_attached_one_is_refused(clip: Case) -> None:
    inputs = zipped_inputs(clip, [1])
    with vlmzip.compress(clip.model, None, METHOD):
        clip.model(**inputs, vision_feature_select_strategy="default")
        with pytest.raises(ValueError, match="vision_feature_select_strategy='full'"):
            clip.model(**inputs, vision_feature_select_strategy="full")
        clip.model.config.vision_feature_select_strategy = "full"
        with pytest.raises(ValueError, match="was changed after compress"):
            clip.model(**inputs)


def test_siglip_under_default_is_refused() -> None:
    case = fresh("llava", "siglip")
    case.model.config.vision_feature_select_strategy = "default"
    with pytest.raises(UnsupportedModelError, match="an image patch would be lost"):
        vlmzip.compress(case.model, case.processor, METHOD)


def test_pixtral_tower_is_refused_with_a_reason(clip: Case) -> None:
    config = LlavaConfig(
        vision_config=PixtralVisionConfig(
            hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
        ),
        text_config=clip.model.config.text_config,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    with pytest.raises(UnsupportedModelError, match="packs images of any size"):
        vlmzip.compress(LlavaForConditionalGeneration(config), None, METHOD)


# --- bad input --------------------------------------------------------------------------------


def test_a_budget_that_does_not_fit_is_refused_at_once(case: Case) -> None:
    n = 65 if case.model.config.vision_config.model_type == "clip_vision_model" else 64
    for method in (VisionZip(tokens=n + 1), VisionZip(dominant=n, contextual=1)):
        with pytest.raises(ValueError, match=f"only {n} tokens"):
            vlmzip.compress(case.model, case.processor, method)
    with pytest.raises(ValueError, match="only 64 tokens"):
        vlmzip.compress(case.model, case.processor, VisionZip(tokens=65, send_cls=False))
    assert "_vlmzip" not in vars(case.model.base_model)


def test_wrong_numbers_of_placeholders(clip: Case) -> None:
    one, two = clip.images[:2]
    with vlmzip.compress(clip.model, clip.processor, METHOD):
        for text, pictures, words in (
            (clip.prompt(2, ""), [one], "2 <image> placeholders for 1 images"),
            (clip.prompt(1, ""), [one, two], "1 <image> placeholders for 2 images"),
            (clip.prompt(0, ""), [one], "0 <image> placeholders for 1 images"),
            (clip.prompt(1, ""), None, "no images were given"),
        ):
            with pytest.raises(ValueError, match=words):
                clip.processor(images=pictures, text=text, return_tensors="pt")


def test_prompt_of_a_processor_that_was_not_compressed(clip: Case) -> None:
    inputs = clip.inputs([1])
    with (
        vlmzip.compress(clip.model, None, METHOD),
        pytest.raises(ValueError, match=r"tokens: 64.*not\s+made by the processor that was compressed"),
    ):
        clip.model.generate(**inputs, max_new_tokens=1)


def test_prompt_of_another_budget(clip: Case) -> None:
    inputs = zipped_inputs(clip, [1], VisionZip(tokens=20))
    with vlmzip.compress(clip.model, None, METHOD), pytest.raises(ValueError, match="not match"):
        clip.model(**inputs)


def test_resized_pixels_are_refused(clip: Case) -> None:
    pixels = torch.randn(1, 3, 140, 140)
    with (
        vlmzip.compress(clip.model, None, METHOD),
        pytest.raises(ValueError, match="does not make 101 tokens"),
    ):
        clip.model.get_image_features(pixels, interpolate_pos_encoding=True)


@torch.no_grad()
def test_what_was_not_computed_is_nan(case: Case) -> None:
    """The layer after the tapped one does not run: nobody may take its output for the stock one's."""
    pixels = case.inputs([1])["pixel_values"]
    stock = case.model.get_image_features(pixels).hidden_states
    with vlmzip.compress(case.model, None, METHOD):
        features = case.model.get_image_features(pixels)
    torch.testing.assert_close(features.hidden_states[-2], stock[-2])
    last = features.hidden_states[-1]  # newer transformers keep only what is asked for
    assert last is None or last.isnan().all()
    assert features.last_hidden_state.isnan().all()


@pytest.mark.parametrize("where", ["tower", "tapped keys", "after the keys", "pixels"])
def test_nan_is_reported(case: Case, where: str) -> None:
    inputs = zipped_inputs(case, [1])
    tower = case.model.model.vision_tower
    if where == "tower":
        tower.encoder.layers[0].mlp.fc1.weight.data[0, 0] = torch.nan
    elif where == "tapped keys":
        tower.encoder.layers[2].self_attn.k_proj.weight.data[0, 0] = torch.nan
    elif where == "after the keys":  # scores and keys are finite, the tokens are not
        tower.encoder.layers[2].mlp.fc2.weight.data[0, 0] = torch.nan
    else:
        inputs["pixel_values"][0, 0, 0, 0] = torch.nan
    with (
        vlmzip.compress(case.model, None, METHOD),
        pytest.raises(RuntimeError, match="NaN or infinite values; check its weights"),
    ):
        case.generate(inputs)
