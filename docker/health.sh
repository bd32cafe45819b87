#!/bin/sh
# Succeeds when the server on this machine is ready to answer.
set -eu
exec "$(dirname "$0")/bin/python" - "${HCX_HTTP__PORT:-8000}" <<'PYTHON'
import sys
import urllib.request

try:
    urllib.request.urlopen(f"http://127.0.0.1:{sys.argv[1]}/ready", timeout=2).close()
except OSError as error:
    sys.exit(f"not ready: {error}")
PYTHON
