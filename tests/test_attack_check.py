"""attack.py: what its flags choose, and that the ratio is of the medians that stand beside each other."""

import json
import os
import random
import re
import statistics
from types import SimpleNamespace

import pytest

pytest.importorskip("uvicorn", reason="needs the extra `serve`")

from crystal.serving import chat
from data_prep.checks import attack


def test_the_flags_choose_model_attackers_and_parts(monkeypatch, capsys):
    kept, medians = SimpleNamespace(asked=[], crowds=[], slept=[]), [40.0, 90.0, 30.0, 120.0, 60.0]

    class Server:
        pid, returncode = 7, 0

        def __init__(self, command, **how):
            kept.command = command[1:]
            line = "serving attacked at http://127.0.0.1:81/v1 (..)\n"
            self.stdout = SimpleNamespace(readline=lambda: line)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            kept.ended = True

        terminate = wait = lambda self, *_: None

    class Crowd:
        def __init__(self, target, args):
            kept.crowds.append((args[:2], args[3]))

        start = kill = lambda self: None

    said = SimpleNamespace(get=lambda: {"noise": 3})
    over = SimpleNamespace(set=lambda: None)
    context = SimpleNamespace(Process=Crowd, Event=lambda: over, Queue=lambda: said)
    monkeypatch.setattr(attack.multiprocessing, "get_context", lambda kind: context)
    monkeypatch.setattr(attack.subprocess, "Popen", Server)
    monkeypatch.setattr(attack.time, "sleep", kept.slept.append)
    monkeypatch.setattr(attack, "small", lambda port, seconds: kept.asked.append((port, seconds)) or ([], 0))
    monkeypatch.setattr(attack, "told", lambda name, *rest: medians.pop(0))
    ratios = attack.main(
        [
            "--model", "some/where", "--attackers", "5", "--seconds", "2.5", "--rounds", "2", "--rest", "1.5",
            "--seed", "4",
        ]
    )
    assert kept.command[:6] == ["-m", "crystal.serve", "--model", "some/where", "--name", "attacked"]
    assert kept.asked == [(81, 1)] + [(81, 2.5)] * 5 and kept.slept == [1.5] * 4 and kept.ended
    assert kept.crowds == [((81, 5), 4), ((81, 5), 5)]
    # 90 beside the quieter of 40 and 30; 120 beside the quieter of 30 and 60.
    assert ratios == [3.0, 4.0]
    assert "3.00 to 4.00 times" in capsys.readouterr().out


def test_what_is_told_of_a_part(capsys):
    """Of 1 to 99 ms: the quartiles are 25, 50 and 75, and 95 % are below 95."""
    median = attack.told("alone", [n / 1000 for n in range(1, 100)], 3, os.getpid())
    line = capsys.readouterr().out
    assert median == pytest.approx(50) == statistics.median(range(1, 100))
    assert "(25 to 75, 95 % below 95; 99 answers, 3 refused)" in line
    now, most = (float(x) for x in re.search(r"memory (\d+) MB, at most (\d+) MB", line).groups())
    assert 50 < now <= most + 1


def test_each_attack_is_one_that_the_server_knows_to_bound(monkeypatch):
    """What the bodies are: sent nowhere, read as the server reads them."""
    sent = {}
    ways = attack.attacks(random.Random(1))
    assert len(ways) == 12
    for name, what in ways.items():
        for how in ("post", "silent", "hang_up"):
            monkeypatch.setattr(attack, how, lambda port, said, *_, name=name: sent.update({name: said}))
        what(1)
    assert set(sent) == set(ways) and len(sent["30 MB of text"]) > 30_000_000
    limits = chat.Limits()
    for name, words in (
        ("30 MB of text", "characters"),
        ("millions of empty objects", "brackets and commas"),
    ):
        with pytest.raises(chat.Refusal, match=words):
            chat.turns_of(chat.parse(sent[name], limits).messages, limits)
    pictures = json.loads(sent["16 pictures of 49 million pixels"])["messages"][0]["content"]
    files = [(chat.file_of(part["image_url"]["url"], ""), "") for part in pictures]
    assert len(files) == 16
    with pytest.raises(chat.Refusal, match="7000 x 7000 pixels, 98000000 with those before it"):
        chat.pixels_of(files, limits)
