"""`python -m server` is `hcx-server`. The guard keeps a spawned process from starting it again."""

from server.cli import main

if __name__ == "__main__":
    main()
