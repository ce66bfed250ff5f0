"""What bench serve is made of: the random checkpoint, the load, the arithmetic, the child process.

The measurement as a whole needs vLLM: tests/vllm.
"""

import json
import os
import sys
import time
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from vlmzip import VisionZip, compress
from vlmzip.asking import prepare, prompt_for
from vlmzip.benchmark import random_llava
from vlmzip.benchmark.serve import Seen, _figures, _ideal, _ratio
from vlmzip.benchmark.serve_load import Load, Sample, opening
from vlmzip.benchmark.serve_process import Server
from vlmzip.cli import app
from vlmzip.loading import load

HEALTHY = """
import http.server, subprocess, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == '/health' else 404)
        self.end_headers()
worker = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])
print('worker', worker.pid, flush=True)
http.server.HTTPServer(('127.0.0.1', int(sys.argv[4])), Handler).serve_forever()
"""


def test_the_random_checkpoint_loads_and_answers(tmp_path: Path) -> None:
    random_llava.write("tiny", tmp_path / "model", "bfloat16")
    model, processor = load(str(tmp_path / "model"), device="cpu")  # no weight is missing, or it fails
    assert str(model.dtype) == "torch.bfloat16"
    image = Image.new("RGB", (300, 200), "red")
    with compress(model, processor, VisionZip(tokens=64)):
        inputs = prepare(processor, image, prompt_for(processor, "what?"), model)
        assert (inputs["input_ids"] == model.config.image_token_id).sum() == 64
        assert model.generate(**inputs, max_new_tokens=2).shape[1] > inputs["input_ids"].shape[1]


def test_the_random_checkpoint_comes_in_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    random_llava.write("tiny", tmp_path / "whole")
    monkeypatch.setattr(random_llava, "SHARD_BYTES", 1 << 20)
    random_llava.write("tiny", tmp_path / "shards")
    index = json.loads((tmp_path / "shards" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "shards").glob("*.safetensors"))
    assert len(files) > 3
    assert sorted(set(index["weight_map"].values())) == files
    whole, _ = load(str(tmp_path / "whole"), device="cpu")
    parts, _ = load(str(tmp_path / "shards"), device="cpu")
    theirs = parts.state_dict()
    assert all(value.equal(theirs[name]) for name, value in whole.state_dict().items())
    assert whole.model.vision_tower.state_dict()
    with pytest.raises(ValueError, match="there already"):
        random_llava.write("tiny", tmp_path / "shards")
    with pytest.raises(ValueError, match="known: clip-l-3b, small, tiny"):
        random_llava.write("large", tmp_path / "none")
    with pytest.raises(ValueError, match="known: float32, bfloat16, float16"):
        random_llava.write("tiny", tmp_path / "none", "int8")


def test_the_load_follows_from_its_seed() -> None:
    assert opening(Load(), 1, 0, 2) == opening(Load(), 1, 0, 2)
    assert opening(Load(), 1, 0, 2) != opening(Load(), 1, 0, 3)
    assert opening(Load(), 1, 0, 2) != opening(Load(), 1, 1, 2)
    assert opening(Load(), 1, 0, 2) != opening(Load(seed=1), 1, 0, 2)
    for wrong in ({"alone": 0}, {"new_tokens": 1}, {"rate": 0.0}, {"concurrency": -1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Load(**wrong)  # type: ignore[arg-type]


def sample(first: float, prompt: int = 600, cached: int = 0, total: float = 0.0) -> Sample:
    return Sample(first, total or first + 0.9, prompt, cached, 10, "")


def test_the_figures() -> None:
    seen = Seen(
        alone=[sample(0.4), sample(0.2), sample(0.3)],
        first_turns=[sample(0.5), sample(0.7)],
        second_turns=[sample(0.1, 1000, 960), sample(0.2, 1000, 0)],
        arrivals=[sample(0.2)],
        closed_seconds=8.0,
        blocks=7,
    )
    found = _figures(seen)
    assert found["ttft_alone_ms"] == 300
    assert found["ttft_turn_1_ms"] == 600
    assert found["time_per_output_token_ms"] == 100
    assert found["requests_per_second"] == 0.5
    assert found["turn_2_cached_share"] == 0.48
    assert found["ttft_open_p90_ms"] == 200
    assert _ratio("ttft_alone_ms", 300, 100) == 3
    assert _ratio("requests_per_second", 1, 4) == 4
    assert _ratio("kv_blocks_in_use", 3, 0) is None


def test_the_ideal_keeps_the_images_own_part() -> None:
    compressed = Seen(alone=[sample(0.4)])
    compressed.text = {"stock": [sample(0.8)], "compressed": [sample(0.1)]}
    found = _ideal({"stock": Seen(alone=[sample(1.0)]), "compressed": compressed})
    assert found["image_share_of_stock"] == 0.2
    assert found["ideal_ttft_ratio"] == pytest.approx(1.0 / 0.3, abs=1e-3)
    assert found["measured_ttft_ratio"] == 2.5
    assert found["share_of_ideal"] == 0.75


def test_a_server_is_waited_for_and_ends_with_its_children(tmp_path: Path) -> None:
    with Server([sys.executable, "-c", HEALTHY], tmp_path / "log") as server:
        worker = int(server.log.read_text().split()[1])
        os.kill(worker, 0)
    assert server.process.poll() is not None
    for _ in range(100):  # whoever adopted the worker still has to reap it
        if not Path(f"/proc/{worker}").exists() or "Z" in status(worker):
            break
        time.sleep(0.1)
    else:
        pytest.fail("the worker outlived its server")


def status(process: int) -> str:
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]


def test_a_server_that_ends_early_says_why(tmp_path: Path) -> None:
    code = "import sys; print('ValueError: no such model'); print('bye'); sys.exit(3)"
    server = Server([sys.executable, "-c", code], tmp_path / "log")
    with pytest.raises(RuntimeError, match=r"ended with 3.*ValueError: no such model"), server:
        pass


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--tokens", "64"], "exactly one of --shape and --model"),
        (["--shape", "tiny", "--model", "x"], "exactly one of --shape and --model"),
        (["--shape", "tiny", "--port", "80"], "--port is set by the benchmark"),
        (["--shape", "tiny", "--served_model_name=x"], "--served-model-name is set"),
        (["--shape", "tiny", "--rounds", "0"], "--rounds must be at least 1"),
        (["--shape", "tiny", "--alone", "0"], "alone must be at least 1"),
        (["--shape", "tiny", "--tokens", "64"], "vLLM is not installed"),
    ],
)
def test_the_verb_refuses_with_2(words: list[str], reason: str) -> None:
    done = CliRunner().invoke(app, ["bench", "serve", *words])
    assert done.exit_code == 2
    assert reason in done.stderr
    assert done.stdout == ""
