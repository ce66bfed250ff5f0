"""`vlmzip bench serve` from end to end, on a checkpoint too small to say anything of speed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import soak

WORDS = [
    *("bench", "serve", "--shape", "tiny", "--tokens", "64", "--rounds", "1", "--together", "--json"),
    *("--alone", "2", "--conversations", "3", "--concurrency", "2", "--arrivals", "3"),
    *("--new-tokens", "6", "--dtype", "float32", "--enforce-eager", "--max-model-len", "2048"),
]


@pytest.mark.long
@pytest.mark.timeout(2400)
def test_both_servers_are_measured() -> None:
    program = Path(sys.executable).with_name("vlmzip")
    environment = os.environ | soak.ENVIRONMENT
    done = subprocess.run(
        [str(program), *WORDS], env=environment, capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout)
    stock, compressed = found["stock"], found["compressed"]
    assert stock["prompt_tokens"] - compressed["prompt_tokens"] == 576 - 64
    assert found["ratios"]["prompt_tokens"] > 4
    assert found["ratios"]["kv_blocks_in_use"] > 1
    assert compressed["turn_2_cached_share"] > 0
    assert all(value > 0 for value in stock.values())
    assert found["ideal"]["ideal_ttft_ratio"] > 0
    assert found["load"]["rate"] > 0
    assert "--hf-overrides" in found["commands"]["compressed"]
    assert "--hf-overrides" not in found["commands"]["stock"]
