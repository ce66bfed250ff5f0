"""The embedded models, served: the test questions get the answers that they get under transformers.

vLLM compiles the language model here, as it does unless told to be eager.
"""

from typing import Any

import pytest
import torch
from side_by_side import engine
from transformers import AutoProcessor, LlavaForConditionalGeneration

from vlmzip import VisionZip, compress
from vlmzip.tiny import tiny_path
from vlmzip.tiny.accuracy import answer_all, prompt_of
from vlmzip.tiny.testset import ExamQuestion, exam_questions
from vlmzip.vllm import engine_args

METHOD = VisionZip(tokens=16)
LONG = (pytest.mark.long, pytest.mark.timeout(1200))


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("tiny-llava", 70),
        pytest.param("tiny-llava", 500, marks=LONG),
        pytest.param("tiny-siglip", 500, marks=LONG),
    ],
)
def test_the_test_questions_are_answered_as_under_transformers(name: str, count: int) -> None:
    questions = exam_questions(count)
    here = under_transformers(name, questions)
    there = served(name, questions)
    right = [q.answer for q in questions]
    print(f"\n{name}, {count} questions, {METHOD.tokens} tokens an image:", end=" ")
    print(f"{share(here, right):.1%} under transformers, {share(there, right):.1%} served")
    assert there == here
    assert share(here, right) > 0.5  # both sides see: see the model card for what is right blind


def share(answers: list[str], right: list[str]) -> float:
    return sum(a == b for a, b in zip(answers, right, strict=True)) / len(right)


def under_transformers(name: str, questions: list[ExamQuestion]) -> list[str]:
    folder = tiny_path(name)
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)
    with compress(model, processor, METHOD):
        return answer_all(model, processor, questions)


def served(name: str, questions: list[ExamQuestion]) -> list[str]:
    from vllm import SamplingParams
    from vllm.config import CompilationMode

    processor = AutoProcessor.from_pretrained(tiny_path(name))
    requests: list[Any] = [
        {
            "prompt": processor.apply_chat_template(prompt_of(q), add_generation_prompt=True),
            "multi_modal_data": {"image": q.images},
        }
        for q in questions
    ]
    with engine(**engine_args(tiny_path(name), METHOD), enforce_eager=False) as running:
        compilation = running.llm.llm_engine.vllm_config.compilation_config
        assert compilation.mode != CompilationMode.NONE
        params = SamplingParams(temperature=0, max_tokens=6)
        outs = running.llm.generate(requests, params, use_tqdm=False)
    return [out.outputs[0].text.strip() for out in outs]
