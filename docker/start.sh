#!/bin/sh
# Start the server that lies beside this file. Settings come from HCX_<SECTION>__<KEY> variables;
# arguments are handed on, for example: start.sh --model /model
set -eu
here=$(dirname "$0")
exec "$here/bin/hcx-server" serve --config "$here/config.yaml" "$@"
