#!/usr/bin/env bash
# Make the environment in which avalanche_loop.py runs.
#
#   setup_avalanche.sh [FOLDER]        (default: .venv-avalanche)
#
# PYTHON names the interpreter (default: python3.11). Avalanche 0.6.0 leaves its requirements open
# and so would replace torch; everything after torch is therefore installed with --no-deps, from a
# complete list of exact versions. Which build of torch is taken, CPU or CUDA, is pip's to decide:
# point it at the one you want by its own settings (PIP_INDEX_URL, PIP_FIND_LINKS, pip.conf).
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
folder="${1:-.venv-avalanche}"
python="$folder/bin/python"

"${PYTHON:-python3.11}" -m venv "$folder"
"$python" -m pip install torch==2.13.0
"$python" -m pip install --no-deps avalanche-lib==0.6.0 torchvision==0.28.0
"$python" -m pip install --no-deps --requirement "$here/avalanche.txt"
"$python" -m pip check
