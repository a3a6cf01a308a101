"""What everything above the model costs: processor time a token of HTTP, gateway and ledger, 16 streams at once.

The model is the FakeEngine at the pace of a real one (a step of 16 ms, 1,000 tokens/s in all). The engine's thread is
shown apart: its share is the scheduler's and the fake's, not the gateway's. Clients are another process, with bare
sockets. The least of the runs.

    python benchmarks/gateway.py [--tokens 128] [--runs 3]
"""

from __future__ import annotations

import argparse
import json
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

STREAMS = 16
STEP_SECONDS = 0.016
ANSWER = "a bridge carries the river under the morning light " * 60
ROUTES: dict[str, dict[str, Any]] = {
    "chat/completions": {"messages": [{"role": "user", "content": "Hello"}]},
    "completions": {"prompt": "Hello"},
    "responses": {"input": "Hello", "store": False},
}


def serve() -> None:
    """The server's process: its URL, then for every line that it reads, the seconds of its threads."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from lapis.home import Home
    from tests.served import fake_server

    home = Home(Path(tempfile.mkdtemp()) / "home")
    with fake_server(home, reply=lambda prompt, seed: ANSWER, seconds_per_token=STEP_SECONDS) as server:
        print(server.url, flush=True)
        for _ in sys.stdin:
            print(json.dumps(threads()), flush=True)


def threads() -> dict[str, float]:
    """Processor seconds of this process: of the engine's thread, and of all others."""
    engine = sum(
        time.clock_gettime(time.pthread_getcpuclockid(thread.ident))
        for thread in threading.enumerate()
        if thread.ident is not None and thread.name.startswith("engine ")
    )
    return {"engine": engine, "gateway": time.process_time() - engine}


def stream(url: str, route: str, tokens: int) -> None:
    """Ask for one streamed answer and read it to its end."""
    limit = "max_output_tokens" if route == "responses" else "max_tokens"
    body = json.dumps({"model": "tiny", "stream": True, limit: tokens, **ROUTES[route]})
    address = urlsplit(url)
    head = f"POST /v1/{route} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    head += f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
    with socket.create_connection((address.hostname, address.port)) as connection:
        connection.sendall((head + body).encode())
        while connection.recv(65536):
            pass


def burst(url: str, route: str, tokens: int) -> None:
    """STREAMS of them at once."""
    readers = [threading.Thread(target=stream, args=(url, route, tokens)) for _ in range(STREAMS)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve()
        return
    command = [sys.executable, __file__, "--serve"]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert server.stdin is not None
    assert server.stdout is not None

    def spent() -> dict[str, float]:
        assert server.stdin is not None
        assert server.stdout is not None
        server.stdin.write("\n")
        server.stdin.flush()
        seconds: dict[str, float] = json.loads(server.stdout.readline())
        return seconds

    url = server.stdout.readline().strip()
    print(f"{STREAMS} streams of {options.tokens} tokens, µs of processor time a token:")
    try:
        for route in ROUTES:
            burst(url, route, 4)
            found = []
            for _ in range(options.runs):
                before = spent()
                burst(url, route, options.tokens)
                after = spent()
                found.append({name: after[name] - before[name] for name in after})
            least = {name: min(run[name] for run in found) for name in ("gateway", "engine")}
            each = {name: seconds / (STREAMS * options.tokens) * 1e6 for name, seconds in least.items()}
            print(f"{route:18} gateway {each['gateway']:5.1f}   engine's thread {each['engine']:5.1f}")
    finally:
        server.stdin.close()
        server.wait()


if __name__ == "__main__":
    main()
