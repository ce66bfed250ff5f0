import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from vlmzip.tiny.alignment import whiten
from vlmzip.tiny.checkpoint import build_model, build_processor, save_checkpoint
from vlmzip.tiny.dialogues import SILENT, DialogueBatch, DialogueWriter
from vlmzip.tiny.labels import scene_of
from vlmzip.tiny.language import build_tokenizer
from vlmzip.tiny.lessons import Lessons, answer_scores, tower_features
from vlmzip.tiny.muon import Muon, orthogonal
from vlmzip.tiny.recipe import Recipe
from vlmzip.tiny.stage import run_stage
from vlmzip.tiny.takeover import take_over
from vlmzip.tiny.train import train

MINIATURE = Recipe(
    tower_images=16, tower_steps=4, tower_batch=4, region_steps=4, alignment_steps=2, alignment_batch=4,
    lesson_images=16, lesson_courses=((2, ("colour", "existence")),), lesson_steps=4, lesson_batch=4,
    sign_steps=2, imitation_steps=2, imitation_batch=4, check_every=2,
)  # fmt: skip
SHORT = replace(MINIATURE, tower_steps=1, lesson_courses=(), lesson_steps=1)


def plain_batch(ids, labels, images):
    """One row, positions and mask as any LLM takes them."""
    count = ids.shape[1]
    mask = torch.ones(1, 1, count, count, dtype=torch.bool).tril()
    return DialogueBatch(ids, labels, images, mask, torch.arange(count)[None])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_a_stopped_training_goes_on_to_the_same_weights(tmp_path, data):
    whole = weights(train("tiny-llava", MINIATURE, tmp_path / "whole", data))
    for stop in (3, 3, 3, 3):
        model = train("tiny-llava", MINIATURE, tmp_path / "parts", data, stop_after=stop)
    assert weights(model).keys() == whole.keys()
    for name, value in weights(model).items():
        assert torch.equal(value, whole[name]), name
    lines = [json.loads(line) for line in (tmp_path / "parts" / "log.jsonl").read_text().splitlines()]
    assert [(line["stage"], line["step"]) for line in lines] == [
        ("tower", 2), ("tower", 3), ("tower", 4), ("regions", 2), ("regions", 3), ("regions", 4),
        ("alignment", 2), ("questions", 2), ("questions", 3), ("questions", 4),
        ("signs", 2),
    ]  # fmt: skip


def test_another_seed_gives_other_weights(tmp_path, data):
    one = weights(train("tiny-llava", SHORT, tmp_path / "one", data))
    other = weights(train("tiny-llava", replace(SHORT, seed=1), tmp_path / "other", data))
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_the_second_stage_leaves_the_tower_alone_and_trains_the_rest(tmp_path, data):
    before = weights(train("tiny-llava", SHORT, tmp_path / "run", data))
    after = weights(train("tiny-llava", replace(SHORT, lesson_steps=3), tmp_path / "other", data))
    for name in before:
        same = torch.equal(before[name], after[name])
        assert same == ("vision_tower" in name), name


def test_a_folder_with_a_run_of_another_recipe_is_refused(tmp_path, data):
    train("tiny-llava", SHORT, tmp_path, data)
    with pytest.raises(ValueError, match="holds a run of another recipe; delete it"):
        train("tiny-llava", replace(SHORT, region_steps=5), tmp_path, data)
    (tmp_path / "recipe.json").unlink()  # nobody knows which run these stages are of
    with pytest.raises(ValueError, match="holds a run of another recipe; delete it"):
        train("tiny-llava", SHORT, tmp_path, data)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [({"lesson_steps": 2}, "leave some for all kinds"), ({"lesson_distance": 0.0}, "at most 1, got 0.0")],
)
def test_a_recipe_that_could_not_be_followed_is_refused(change, complaint):
    with pytest.raises(ValueError, match=complaint):
        replace(MINIATURE, **change)


def test_distances_vary_after_the_courses_and_signs_come_last(tokenizer, monkeypatch):
    moved, asked = [], []
    at_any_distance, write = DialogueWriter.at_any_distance, DialogueWriter.write

    def move(self, batch, least, rng):
        moved.append(least)
        return at_any_distance(self, batch, least, rng)

    def listen(self, images, turns):
        asked.extend(question for question, _ in turns)
        return write(self, images, turns)

    monkeypatch.setattr(DialogueWriter, "at_any_distance", move)
    monkeypatch.setattr(DialogueWriter, "write", listen)
    recipe = replace(MINIATURE, lesson_distance=0.3)
    lessons = Lessons(build_model("tiny-llava", tokenizer), recipe, tokenizer, torch.randn(200, 144, 128))
    with torch.no_grad():
        for step in (0, 1):
            lessons.question_loss(step)
        assert moved == []
        asked.clear()
        for step in range(2, 12):
            lessons.question_loss(step)
        assert moved == [0.3] * 10
        before = sum("sign" in question for question in asked) / len(asked)
        asked.clear()
        for step in range(10):
            lessons.sign_loss(step)
        assert moved == [0.3] * 20
        after = sum("sign" in question for question in asked) / len(asked)
        assert before < 0.11 < after  # 0.06 and 0.22 are expected


def test_a_checkpoint_that_is_cut_off_while_saving_is_not_used(tmp_path):
    module = nn.Linear(4, 4)
    optimiser = (torch.optim.AdamW([{"params": list(module.parameters()), "peak": 1e-3}]),)
    (tmp_path / "toy.partial").write_bytes(b"half a file")

    def loss_at(step):
        return module(torch.ones(4)).sum()

    assert run_stage("toy", module, optimiser, 2, loss_at, tmp_path, check=dict)
    assert torch.load(tmp_path / "toy.pt")["step"] == 2


def test_tiny_siglip_takes_over_tiny_llavas_language_model(tmp_path, data, tokenizer):
    recipe = replace(SHORT, imitation_steps=150, imitation_batch=8)
    llava = train("tiny-llava", recipe, tmp_path / "tiny-llava", data)
    model = build_model("tiny-siglip", tokenizer)
    torch.manual_seed(0)
    seen = torch.from_numpy(np.load(tmp_path / "tiny-llava" / "features.npy")).float()
    turned = seen @ torch.linalg.qr(torch.randn(128, 128))[0]  # another tower that knows as much
    take_over(model, tokenizer, turned, recipe, tmp_path / "tiny-siglip")
    taken = weights(model.model.language_model)
    for name, value in weights(llava.model.language_model).items():
        assert torch.equal(taken[name], value), name
    with torch.no_grad():
        wanted = llava.model.multi_modal_projector(seen)
        off = (model.model.multi_modal_projector(turned) - wanted).square().mean() / wanted.var()
    assert off < 0.3  # 1 if it gave the mean of what is wanted


def test_tiny_siglip_is_not_trained_before_tiny_llava_is(tmp_path, data):
    train("tiny-llava", MINIATURE, tmp_path / "tiny-llava", data, stop_after=1)
    with pytest.raises(FileNotFoundError, match=r"no finished training .* train tiny-llava first"):
        train("tiny-siglip", MINIATURE, tmp_path / "tiny-siglip", data)


def test_dialogues_are_written_as_the_chat_template_writes_them(tokenizer):
    processor = build_processor("tiny-llava", tokenizer)
    writer = DialogueWriter(tokenizer)
    turns = [("What color is the ring?", "red"), ("Is there a red ring?", "yes")]
    chat = []
    for i, (question, answer) in enumerate(turns):
        text = {"type": "text", "text": question}
        chat.append(
            {"role": "user", "content": [{"type": "image"}, {"type": "image"}, text][2 * (i > 0) :]}
        )
        chat.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    images = [np.zeros((96, 96, 3), np.uint8)] * 2
    expected = processor(images=images, text=processor.apply_chat_template(chat))["input_ids"][0]
    ids, labels = writer.write([0, 1], turns)
    assert ids == list(expected)
    spoken = [token for token, label in zip(ids, labels, strict=True) if label != SILENT]
    assert tokenizer.decode(spoken) == " red</s> yes</s>"


def test_training_sees_what_inference_sees(tokenizer):
    model = build_model("tiny-llava", tokenizer).eval()
    processor = build_processor("tiny-llava", tokenizer)
    images = np.random.default_rng(0).integers(0, 256, (2, 96, 96, 3), dtype=np.uint8)
    ids, labels = DialogueWriter(tokenizer).write([0, 1], [("Is there a red ring?", "yes")])
    features = tower_features(model, images).float()
    with torch.no_grad():
        batch = plain_batch(torch.tensor([ids]), torch.tensor([labels]), np.array([[0, 1]]))
        scores, _ = answer_scores(model, batch, features)
        pixel_values = processor.image_processor(list(images), return_tensors="pt")["pixel_values"]
        logits = model(input_ids=torch.tensor([ids]), pixel_values=pixel_values).logits[0]
    first = next(i for i, label in enumerate(labels) if label != SILENT)
    assert torch.allclose(scores, logits[first - 1 : -1], atol=1e-2)


def test_dialogues_have_one_to_four_turns(tokenizer):
    writer = DialogueWriter(tokenizer)
    scenes = [scene_of("train", i) for i in range(20)]
    rng = np.random.default_rng(0)
    batch = writer.batch(scenes, rng.integers(20, size=(60, 2)), rng)
    turns = (batch.labels == writer.end).sum(dim=1)
    assert set(turns.tolist()) == {1, 2, 3, 4}
    assert (batch.input_ids == writer.image).sum(dim=1).tolist() == [288] * 60


def test_a_writer_that_could_run_out_of_questions_is_refused(tokenizer):
    with pytest.raises(ValueError, match="must have 'existence' among them, got colour, shape"):
        DialogueWriter(tokenizer, ("colour", "shape"))


def test_the_first_course_has_its_kinds_only(tmp_path, data, tokenizer, monkeypatch):
    asked = []
    write = DialogueWriter.write

    def listen(self, images, turns):
        asked.extend(question for question, _ in turns)
        return write(self, images, turns)

    monkeypatch.setattr(DialogueWriter, "write", listen)
    recipe = replace(MINIATURE, tower_steps=1, region_steps=1, lesson_dialogues=0.0)
    kinds = []
    for _ in range(2):  # two stages of two steps each
        asked.clear()
        train("tiny-llava", recipe, tmp_path, data, stop_after=2)
        kinds.append({question.split()[0] for question in asked})
    assert "How" not in kinds[0]
    assert "How" in kinds[1]


def test_questions_side_by_side_are_answered_as_each_alone(tokenizer):
    model = build_model("tiny-llava", tokenizer).eval()
    writer = DialogueWriter(tokenizer)
    scenes = [scene_of("train", i) for i in range(3)]
    features = torch.randn(2, 144, 128)
    batch = writer.side_by_side(scenes, np.array([2, 0]), np.random.default_rng(0), questions=5)
    assert batch.images.tolist() == [[2], [0]]
    with torch.no_grad():
        scores, wanted = answer_scores(model, batch, features)
    places = (batch.labels[:, 1:] != SILENT).nonzero().tolist()
    ends = (wanted == writer.end).nonzero()[:, 0].tolist()
    assert len(ends) == 10
    start = 0
    for end in ends:
        row, column = places[start]
        prompt_length = int((batch.input_ids[row] == writer.image).nonzero().max()) + 1
        begin = column - int(batch.position_ids[row, column]) + prompt_length
        last = places[end][1]
        own = torch.cat([batch.input_ids[row, :prompt_length], batch.input_ids[row, begin : last + 2]])
        labels = torch.cat([torch.full((prompt_length,), SILENT), batch.labels[row, begin : last + 2]])
        alone = plain_batch(own[None], labels[None], batch.images[row : row + 1])
        with torch.no_grad():
            expected, target = answer_scores(model, alone, features[row : row + 1])
        assert torch.equal(target, wanted[start : end + 1])
        assert torch.allclose(expected, scores[start : end + 1], atol=1e-4)
        start = end + 1


def test_at_any_distance_an_images_tokens_stand_nearer_and_the_rest_follows(tokenizer):
    writer = DialogueWriter(tokenizer)
    scenes = [scene_of("train", i) for i in range(4)]
    rng = np.random.default_rng(3)
    plain = writer.batch(scenes, rng.integers(4, size=(40, 2)), rng)
    side = writer.side_by_side(scenes, rng.integers(4, size=40), rng, questions=3)
    for batch in (plain, side):
        moved = writer.at_any_distance(batch, 0.05, rng)
        assert torch.equal(moved.input_ids, batch.input_ids)
        steps = []
        for row, ids in enumerate(batch.input_ids.tolist()):
            image = [i for i, token in enumerate(ids) if token == writer.image]
            where = moved.position_ids[row].tolist()
            steps.append(where[image[1]] - where[image[0]])
            gone = 0.0
            for i, token in enumerate(ids):
                assert where[i] == pytest.approx(int(batch.position_ids[row, i]) - gone, abs=1e-3)
                gone += (1 - steps[-1]) * (token == writer.image)
        assert torch.equal(moved.mask, batch.mask)
        assert min(steps) >= 0.05
        assert max(steps) == 1


def test_distances_are_drawn_evenly_over_the_logarithm(tokenizer):
    writer = DialogueWriter(tokenizer)
    ids = torch.tensor([[writer.image] * 2 + [7]]).expand(1000, -1)
    batch = plain_batch(ids, ids, np.zeros((1000, 1), np.int64))
    moved = writer.at_any_distance(batch, 0.05, np.random.default_rng(0))
    steps = moved.position_ids[:, 1]
    nearer = steps[steps < 1]
    assert len(nearer) == pytest.approx(750, abs=50)
    for share in (0.25, 0.5, 0.75):
        assert (nearer < 0.05 ** (1 - share)).float().mean() == pytest.approx(share, abs=0.06)


def test_images_at_their_own_distance_are_answered_as_before(tokenizer):
    model = build_model("tiny-llava", tokenizer).eval()
    writer = DialogueWriter(tokenizer)
    scenes = [scene_of("train", i) for i in range(3)]
    rng = np.random.default_rng(0)
    batch = writer.batch(scenes, np.array([[2], [0]]), rng)
    features = torch.randn(2, 144, 128)
    with torch.no_grad():
        expected, _ = answer_scores(model, batch, features)
        scores, _ = answer_scores(model, writer.at_any_distance(batch, 1.0, rng), features)
        nearer, _ = answer_scores(model, writer.at_any_distance(batch, 0.05, rng), features)
    assert torch.allclose(expected, scores, atol=1e-5)
    assert not torch.allclose(expected, nearer, atol=1e-3)


def test_a_whitened_projector_sees_all_directions_alike():
    torch.manual_seed(0)
    features = torch.randn(200, 144, 128) * torch.logspace(0, 1, 128) + 3.0
    projector = nn.Module()
    projector.linear_1 = nn.Linear(128, 128)
    whiten(projector, features)
    out = projector.linear_1(features.flatten(0, 1)).detach()
    assert out.mean(0).abs().max() < 0.1
    assert torch.allclose(torch.cov(out.T), torch.eye(128), atol=0.1)


def test_untrained_words_are_as_large_as_what_the_first_block_adds(tokenizer):
    model = build_model("tiny-llava", tokenizer)
    assert 0.9 < model.get_input_embeddings().weight.std() < 1.1
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[1, 5, 9]])).logits
    assert logits.std() < 3  # the head is tied to them, and its logits stay small


def test_saved_weights_have_the_hubs_names(tmp_path, data, tokenizer):
    from safetensors import safe_open

    for name in ("tiny-llava", "tiny-siglip"):
        model = train(name, SHORT, tmp_path / name, data)
    save_checkpoint(model, build_processor("tiny-siglip", tokenizer), tmp_path / "out")
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        names = set(file.keys())
    tower = {name for name in names if name.startswith("vision_tower.")}
    assert tower
    assert all(name.startswith("vision_tower.vision_model.") for name in tower)
    again, info = type(model).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    for name, value in weights(model).items():
        assert torch.equal(value, weights(again)[name]), name


def test_orthogonal_updates_have_singular_values_near_one():
    torch.manual_seed(0)
    for shape in ((3, 32, 32), (2, 64, 16), (2, 16, 64)):
        values = torch.linalg.svdvals(orthogonal(torch.randn(shape)))
        assert float(values.min()) > 0.3
        assert float(values.max()) < 1.4


def test_muon_finds_the_least_of_a_bowl():
    torch.manual_seed(0)
    goal, weight = torch.randn(8, 8), nn.Parameter(torch.zeros(8, 8))
    optimiser = Muon([weight], lr=0.1, decay=0.0)
    for step in range(200):
        optimiser.param_groups[0]["lr"] = 0.1 * (1 - step / 200)
        optimiser.zero_grad()
        (weight - goal).square().sum().backward()
        optimiser.step()
    assert float((weight - goal).abs().max()) < 0.1
