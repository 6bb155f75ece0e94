#!/bin/sh
# mergekit 0.1.5 in an environment of its own: setup_mergekit.sh FOLDER
set -eu
here=$(dirname "$0")
python3 -m venv "$1"
"$1/bin/pip" install --quiet -c "$here/../../constraints.txt" torch
"$1/bin/pip" install --quiet mergekit==0.1.5
