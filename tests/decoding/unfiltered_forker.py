"""The same on a host that has namespaces but no filters of system calls."""

from __future__ import annotations

from server.decoding.forker import main
from tests.decoding.bare_forker import deny
from tests.decoding.hostile_forker import serve

MODULE = "tests.decoding.unfiltered_forker"

if __name__ == "__main__":
    main(serve, prepare=lambda: deny(namespaces=False))
