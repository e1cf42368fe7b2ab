"""`transformers serve` on the merged directory, asked in OpenAI's format: answer and thought."""

import base64
import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import transformers
from common import ASKED, agreement, tell

PORT = 8771
URL = f"http://127.0.0.1:{PORT}"
command = [Path(sys.executable).with_name("transformers"), "serve", "--port", str(PORT), "--device", "cpu"]
server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def post(path, question):
    """One request -> the message that came back."""
    picture = base64.b64encode(Path(path).read_bytes()).decode()
    content = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture}"}},
        {"type": "text", "text": question},
    ]
    body = {
        "model": ASKED["merged"],
        "messages": [{"role": "user", "content": content}],
        "max_tokens": 8,
        "temperature": 0,
    }
    head = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{URL}/v1/chat/completions", json.dumps(body).encode(), head)
    return json.load(urllib.request.urlopen(request, timeout=120))["choices"][0]["message"]


try:
    for _ in range(120):
        try:
            urllib.request.urlopen(f"{URL}/health", timeout=2)
            break
        except (urllib.error.URLError, OSError):
            time.sleep(1)
    found = [post(path, question) for path, question, _ in ASKED["questions"]]
finally:
    server.terminate()
thought = found[0].get("reasoning_content")
answers = [(message["content"] or "").strip() for message in found]
tell(transformers.__version__, f"{agreement(answers)}; reasoning_content {thought!r}")
