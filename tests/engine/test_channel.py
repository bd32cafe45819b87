import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

WAIT_FOR_A_MESSAGE = """
import sys
from server.engine.channel import SocketChannel
channel = SocketChannel(sys.argv[1])
print("waiting", flush=True)
print(channel.receive(timeout_s=60), flush=True)
channel.close()
"""


def test_the_end_of_standard_input_means_stop(tmp_path: Path) -> None:
    """The other side is gone, on systems too that do not kill a child with its parent."""
    child = subprocess.Popen(
        [sys.executable, "-c", WAIT_FOR_A_MESSAGE, f"ipc://{tmp_path}/nobody"],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert child.stdout is not None and child.stdin is not None
        assert child.stdout.readline() == b"waiting\n"
        child.stdin.close()
        assert child.stdout.readline() == b"[(Stop(), [])]\n"
        assert child.wait(timeout=20) == 0
    finally:
        child.kill()
        child.wait()
        child.stdout.close()
