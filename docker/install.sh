#!/bin/sh
# Install the server into an environment of its own: docker/install.sh FOLDER
# Run from the repository's root. PYTHON chooses the interpreter.
set -eu
folder=$1
"${PYTHON:-python3}" -m venv "$folder"
"$folder/bin/python" -m pip install --disable-pip-version-check --no-cache-dir -c constraints.txt .
cp config.yaml docker/start.sh docker/health.sh "$folder/"
