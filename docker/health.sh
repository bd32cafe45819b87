#!/bin/sh
# Succeeds when the server on this machine is ready to answer. Where it listens is read from the same
# variables that the server reads.
set -eu
exec "$(dirname "$0")/bin/python" - <<'PYTHON'
import http.client
import os
import socket
import ssl
import sys


def setting(name, default=None):
    value = os.environ.get(f"HCX_HTTP__{name}", "")
    return default if value in ("", "null") else value


port = int(setting("PORT", "8000"))
connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
if setting("TLS_CERTIFICATE_FILE"):
    # The certificate is for the server's name, not for this address.
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    connection = http.client.HTTPSConnection("127.0.0.1", port, timeout=2, context=context)
try:
    if path := setting("UNIX_SOCKET"):
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.settimeout(2)
        connection.sock.connect(path)
    connection.request("GET", "/ready")
    status = connection.getresponse().status
except (OSError, http.client.HTTPException) as error:
    sys.exit(f"not ready: {error}")
if status != 200:
    sys.exit(f"not ready: status {status}")
PYTHON
