"""Twenty attackers at a server, and what a small request notices of them.

    python data_prep/checks/attack.py                     # the tiny model, 20 attackers, three minutes
    python data_prep/checks/attack.py --rounds 3 --seconds 60

Starts crystal.serve, asks a small question again and again: alone, then beside attackers who do all at once
what each was once enough to stop the server, then alone once more. Prints of each part the small request's
median, quartiles and 95th percentile, refusals and the server's memory, then the ratio of medians, which
should be under three.
"""

import base64
import http.client
import io
import json
import multiprocessing
import os
import random
import re
import socket
import statistics
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from PIL import Image

from crystal.runtime import config

ROOT = Path(__file__).resolve().parents[2]


def post(port, body, wait=120):
    """A request's body -> the answer's status; 0 where the connection was cut."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=wait)
    try:
        connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        response.read()
        return response.status
    except (OSError, http.client.HTTPException):
        return 0
    finally:
        connection.close()


def request(content, **more):
    asked = {"model": "attacked", "messages": [{"role": "user", "content": content}], **more}
    return json.dumps(asked).encode()


def picture(width, height):
    """A PNG of one colour: many pixels in few bytes."""
    file = io.BytesIO()
    Image.new("1", (width, height)).save(file, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def silent(port, said, seconds):
    """Opens a connection, says the beginning of something, and nothing more."""
    with socket.create_connection(("127.0.0.1", port), timeout=seconds) as client:
        client.sendall(said)
        client.recv(1)


HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"


def attacks(rng):
    """{name: function (port) that does it once}."""
    words = " ".join(rng.choice(["star", "moon", "cup", "tree"]) for _ in range(500))
    long_text, huge_text = request("word " * 5_000), request("a " * 15_000_000)
    wide = picture(7000, 7000)
    bombs, pictures = request([wide] * 16), request([picture(700, 700)] * 16 + [text("What?")])
    empty = b'{"model": "attacked", "messages": [' + b"{}," * 2_000_000 + b"{}]}"
    stream = request("Why?", max_tokens=3000, stream=True)
    noise = zlib.compress(rng.randbytes(100_000))
    return {
        "half a head": lambda port: silent(port, HEAD[: rng.randrange(1, len(HEAD))], 15),
        "a silent body": lambda port: silent(port, HEAD + b"content-length: 900\r\n\r\n{", 70),
        "nothing said": lambda port: silent(port, b"", 15),
        "30 MB of text": lambda port: post(port, huge_text),
        "a text of the context's length": lambda port: post(port, long_text),
        "16 pictures of 49 million pixels": lambda port: post(port, bombs),
        "16 pictures that are small enough": lambda port: post(port, pictures),
        "one picture of 49 million pixels": lambda port: post(port, request([wide, text("What?")])),
        "long answers": lambda port: post(port, request(words, max_tokens=rng.randrange(1000, 2000))),
        "long streams that hang up": lambda port: hang_up(port, stream),
        "millions of empty objects": lambda port: post(port, empty),
        "noise": lambda port: silent(port, noise, 15),
    }


def text(said):
    return {"type": "text", "text": said}


def hang_up(port, body):
    """Asks for a stream, reads its beginning, and leaves."""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as client:
        client.sendall(HEAD + b"content-length: %d\r\n\r\n" % len(body) + body)
        client.recv(400)
        time.sleep(0.5)


def memory(pid):
    """Resident memory of a process in MB: now, and at most so far."""
    status = Path(f"/proc/{pid}/status").read_text()
    return tuple(int(re.search(rf"{name}:\s+(\d+) kB", status)[1]) / 1000 for name in ("VmRSS", "VmHWM"))


def small(port, seconds):
    """Asks a small question again and again -> (seconds of each answer, refusals)."""
    times, refused, stop = [], 0, time.monotonic() + seconds
    while time.monotonic() < stop or not times:
        began = time.perf_counter()
        if post(port, request("What colour is the star?", max_tokens=8)) == 200:
            times.append(time.perf_counter() - began)
        else:
            refused += 1
    return times, refused


def attack(port, number, over, seed, told):
    """A process of so many attackers, until `over` is set; tells {attack: times done} at its end."""
    done, rng = {}, random.Random(seed)
    ways = list(attacks(rng).items())

    def one(n):
        while not over.is_set():
            name, what = ways[n % len(ways)]
            try:
                what(port)
            except OSError:
                time.sleep(0.1)  # cut off: as an attacker it comes again
            done[name] = done.get(name, 0) + 1
            n += number

    for n in range(number):
        threading.Thread(target=one, args=(n,), daemon=True).start()
    over.wait()
    told.put(done)


def told(name, times, refused, pid):
    """Prints a line of one part -> its median in milliseconds."""
    low, median, high = (1000 * t for t in statistics.quantiles(times, n=4))
    worst = 1000 * statistics.quantiles(times, n=20)[-1]
    now, most = memory(pid)
    spread = f"({low:.0f} to {high:.0f}, 95 % below {worst:.0f}; {len(times)} answers, {refused} refused)"
    print(f"{name:9} {median:7.0f} ms  {spread}  memory {now:.0f} MB, at most {most:.0f} MB", flush=True)
    return median


def main(argv=None):
    parser = config.OneLineParser(prog="attack.py", description="Attack a server and time a small request.")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--attackers", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=30, help="of each part")
    parser.add_argument("--rounds", type=int, default=1, help="so often alone and attacked")
    parser.add_argument("--rest", type=float, default=10, help="seconds between parts")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)

    command = [sys.executable, "-m", "crystal.serve", "--model", args.model, "--name", "attacked"]
    how = {"env": os.environ | {"PYTHONPATH": str(ROOT)}, "stdout": subprocess.PIPE, "text": True}
    # The attackers have a process of their own, so that they do not slow down whoever holds the watch.
    processes = multiprocessing.get_context("spawn")
    with subprocess.Popen([*command, "--port", "0"], **how) as server:
        try:
            port = int(re.search(r":(\d+)/v1", server.stdout.readline())[1])
            small(port, 1)  # the first answers are slower
            quiet, beside = [told("alone", *small(port, args.seconds), server.pid)], []
            for n in range(args.rounds):
                over, said = processes.Event(), processes.Queue()
                told_to = (port, args.attackers, over, args.seed + n, said)
                crowd = processes.Process(target=attack, args=told_to)
                crowd.start()
                time.sleep(args.rest)  # until all of them are there
                beside.append(told("attacked", *small(port, args.seconds), server.pid))
                over.set()
                print(f"          done: {said.get()}", flush=True)
                crowd.kill()
                time.sleep(args.rest)  # until what was begun has ended
                quiet.append(told("alone", *small(port, args.seconds), server.pid))
        finally:
            server.terminate()
            server.wait(60)

    ratios = [attacked / min(around) for attacked, *around in zip(beside, quiet, quiet[1:])]
    print(f"attacked beside the quieter part around it: {min(ratios):.2f} to {max(ratios):.2f} times")
    print(f"the server ended with {server.returncode}")
    return ratios


if __name__ == "__main__":
    config.run_cli(main)
