#!/bin/sh
# What building and running the image would do, without a container engine: the files named by the
# Dockerfile are copied to a clean folder, installed and started there by an unprivileged user with
# a clean environment, and the server is asked about a picture. Needs curl, and Python >= 3.11 where
# every user can run it (PYTHON chooses one). HCX_MODEL__PATH asks another model than the demo.
set -eu
cd "$(dirname "$0")/.."

port=${PORT:-18473}
uid=10001
work=$(mktemp -d "${TMPDIR:-/tmp}/hcx-replay.XXXXXX")
server=
finish() {
    if [ -n "$server" ]; then kill "$server" 2>/dev/null || true; fi
    rm -rf "$work"
}
trap finish EXIT
trap 'exit 1' HUP INT TERM

fail() {
    echo "docker/replay.sh: $*" >&2
    if [ -f "$work/log" ]; then tail -n 20 "$work/log" >&2; fi
    exit 1
}

# The replay means something only while the image runs these very files.
for line in 'docker/install.sh /opt/hcx' 'CMD ["/opt/hcx/start.sh"]' 'CMD ["/opt/hcx/health.sh"]'; do
    grep -qF "$line" Dockerfile || fail "the Dockerfile no longer has: $line"
done

# COPY a b c ./ and COPY folder ./folder; copies between stages (--from) are not from here.
mkdir "$work/src" "$work/home"
sed -n 's/^COPY \([^-].*\) [^ ]*$/\1/p' Dockerfile | tr ' ' '\n' | while read -r name; do
    cp -R "$name" "$work/src/"
done
find "$work/src" -name __pycache__ -type d -prune -exec rm -rf {} +
chmod 755 "$work"

# Replaces the shell, so that a signal reaches the command: call it in a subshell.
if [ "$(id -u)" = 0 ]; then
    chown -R "$uid:$uid" "$work"
    unprivileged() { exec setpriv --reuid "$uid" --regid "$uid" --clear-groups --no-new-privs "$@"; }
else
    unprivileged() { exec "$@"; }
fi

# Where packages come from is the machine's affair; nothing else of its environment is handed on.
pip_settings=$(env | grep -E '^(PIP_[A-Z_]+|https?_proxy|HTTPS?_PROXY|no_proxy|NO_PROXY)=[^ ]*$' || true)
# shellcheck disable=SC2086  # one word per setting
(cd "$work/src" && unprivileged env -i PATH="$PATH" HOME="$work/home" $pip_settings \
    PYTHON="${PYTHON:-python3}" docker/install.sh "$work/hcx" >"$work/log" 2>&1) ||
    fail "the install step failed"
echo "installed"

unprivileged env -i PATH=/usr/bin:/bin HOME="$work/home" HCX_HTTP__PORT="$port" \
    ${HCX_MODEL__PATH:+HCX_MODEL__PATH="$HCX_MODEL__PATH"} "$work/hcx/start.sh" >"$work/log" 2>&1 &
server=$!

waited=0
until grep '^hcx-server .* at http' "$work/log" && HCX_HTTP__PORT=$port "$work/hcx/health.sh"; do
    kill -0 "$server" 2>/dev/null || fail "the server did not start"
    waited=$((waited + 1))
    [ "$waited" -le 300 ] || fail "the server was not ready after $waited s"
    sleep 1
done

model=$(curl -sSf "http://127.0.0.1:$port/v1/models" |
    "$work/hcx/bin/python" -c 'import json, sys; print(json.load(sys.stdin)["data"][0]["id"])')

"$work/hcx/bin/python" - "$model" >"$work/request.json" <<'PYTHON'
import base64, io, json, sys
from PIL import Image, ImageDraw

picture = Image.new("RGB", (224, 224), "white")
ImageDraw.Draw(picture).ellipse((60, 60, 164, 164), fill="red")
buffer = io.BytesIO()
picture.save(buffer, "PNG")
url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
content = [
    {"type": "image_url", "image_url": {"url": url}},
    {"type": "text", "text": "What colour is the circle?"},
]
messages = [{"role": "user", "content": content}]
json.dump(
    {"model": sys.argv[1], "messages": messages, "max_tokens": 32, "temperature": 0}, sys.stdout
)
PYTHON

curl -sSf "http://127.0.0.1:$port/v1/chat/completions" -o "$work/answer.json" \
    -H 'Content-Type: application/json' -d @"$work/request.json" || fail "the question failed"
"$work/hcx/bin/python" - "$work/answer.json" <<'PYTHON' || fail "there was no answer"
import json, sys

with open(sys.argv[1]) as file:
    text = json.load(file)["choices"][0]["message"]["content"]
print("What colour is the circle?", text)
sys.exit(not text)
PYTHON

kill -TERM "$server"
status=0
wait "$server" || status=$?
server=
[ "$status" = 0 ] || fail "the server ended with status $status after SIGTERM"
echo "stopped cleanly"
