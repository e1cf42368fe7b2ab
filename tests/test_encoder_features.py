"""What encoder_features.py writes, from its flags to tensors and paths.

That training on the files equals training with the encoder is held in test_encoders.py. Right values: what
the encoder gives for each image, run in the test, and files counted by hand.
"""

import hashlib
import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from crystal.backbone import encoders
from data_prep import encoder_features, features


@pytest.fixture
def source(tmp_path):
    """Five records in one folder, their images, one or two each, in another."""
    (tmp_path / "pictures").mkdir()
    rng, lines = np.random.default_rng(0), []
    for i in range(5):
        names = [f"{i}_{n}.png" for n in range(1 + i % 2)]
        for name in names:
            Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(
                tmp_path / "pictures" / name
            )
        talk = [{"from": "human", "value": "<image>" * len(names) + "Why?"}, {"from": "gpt", "value": "so"}]
        lines.append(json.dumps({"id": f"r{i}", "images": names, "conversations": talk}) + "\n")
    (tmp_path / "records").mkdir()
    (tmp_path / "records" / "set.jsonl").write_text("".join(lines))
    return tmp_path


def test_files_hold_what_the_flags_say(source, monkeypatch, capsys):
    """Two records a file below --image_root/--name; tensors of each image under its record's id; the encoder
    that was named, where it was sent.
    """
    loaded, load = [], encoders.load
    monkeypatch.setattr(
        encoders,
        "load",
        lambda name, device: loaded.append((name, device)) or load("tiny", torch.device("cpu")),
    )
    encoder_features.main(
        [
            "--encoder",
            "some/encoder",
            "--data",
            str(source / "records" / "set.jsonl"),
            "--image_root",
            str(source / "pictures"),
            "--name",
            "mine",
            "--shard",
            "2",
            "--device",
            "cpu:0",
        ]
    )
    assert loaded == [("some/encoder", torch.device("cpu:0"))]
    encoder = load("tiny")
    folder = source / "pictures" / "mine"
    assert sorted(p.name for p in folder.iterdir()) == [f"set-0000{i}.safetensors" for i in range(3)]
    for i in range(3):
        keys = [f"r{n}/{k}" for n in (2 * i, 2 * i + 1) if n < 5 for k in range(1 + n % 2)]
        tensors = load_file(folder / f"set-0000{i}.safetensors")
        assert sorted(tensors) == sorted(keys)
        for key, tensor in tensors.items():
            record, n = key[1:].split("/")
            image = Image.open(source / "pictures" / f"{record}_{n}.png").convert("RGB")
            assert (
                torch.allclose(tensor, encoder(encoder.pixels(image)[None])[0], atol=1e-6)
                and tensor.dtype == torch.float32
            )

    copies = [json.loads(text) for text in (source / "records" / "set.mine.jsonl").read_text().splitlines()]
    assert [(r["id"], r["features"]["mine"]) for r in copies] == [
        (f"r{n}", f"mine/set-0000{n // 2}.safetensors") for n in range(5)
    ]
    said = capsys.readouterr().out
    assert (
        "5 records in 3 files, 0 there already" in said and f"--encoders features:mine:{encoder.dim}" in said
    )


def test_a_file_is_made_again_for_other_records_or_another_encoder(source, monkeypatch, capsys):
    """Its hash is that of the encoder's weights and rules, and of its records' ids and images."""
    flags = [
        "--encoder",
        "tiny",
        "--data",
        str(source / "records" / "set.jsonl"),
        "--image_root",
        str(source / "pictures"),
        "--name",
        "mine",
        "--shard",
        "3",
        "--device",
        "cpu",
    ]
    encoder_features.main(flags)
    encoder = encoders.load("tiny")
    weights = hashlib.sha256(json.dumps(encoder.rules, sort_keys=True).encode())
    for tensor in encoder.state_dict().values():
        weights.update(tensor.numpy().tobytes())
    asked = [
        weights.hexdigest(),
        *([f"r{n}", *(str(source / "pictures" / f"{n}_{k}.png") for k in range(1 + n % 2))] for n in (3, 4)),
    ]
    with safe_open(source / "pictures" / "mine" / "set-00001.safetensors", "pt") as file:
        notes = json.loads(file.metadata()["crystal"])
    assert notes == {"made_with": hashlib.sha256(json.dumps(asked).encode()).hexdigest(), "broken": {}}

    encoder_features.main(flags)
    assert "2 files, 2 there already" in capsys.readouterr().out
    lines = (source / "records" / "set.jsonl").read_text().splitlines()
    lines[4] = lines[4].replace('"r4"', '"another"')
    (source / "records" / "set.jsonl").write_text("\n".join(lines) + "\n")
    encoder_features.main(flags)
    assert "2 files, 1 there already" in capsys.readouterr().out
    assert "another/0" in load_file(source / "pictures" / "mine" / "set-00001.safetensors")
    changed = encoders.load("tiny")
    with torch.no_grad():
        next(iter(changed.parameters())).add_(1)
    monkeypatch.setattr(encoders, "load", lambda *_: changed)
    encoder_features.main(flags)
    assert "2 files, 0 there already" in capsys.readouterr().out


def test_the_bar_counts_records_and_quiet_leaves_what_was_written(source, monkeypatch, capsys):
    counted = []

    class Counting:
        def __init__(self, total, name, procs, unit):
            counted.append([total, name, unit, 0])

        def update(self, n):
            counted[-1][3] += n

        def close(self):
            pass

    monkeypatch.setattr(features, "Bar", Counting)
    flags = [
        "--encoder", "tiny", "--data", str(source / "records" / "set.jsonl"), "--image_root",
        str(source / "pictures"), "--device", "cpu", "--shard", "2",
    ]  # fmt: skip
    encoder_features.main([*flags, "--name", "told"])
    assert counted == [[5, "encoder_features", "record", 5]]
    assert len(capsys.readouterr().out.splitlines()) == 2

    encoder_features.main([*flags, "--name", "mine", "--quiet"])
    assert counted[1] == [5, "", "record", 5]  # a bar without a name shows nothing
    (said,) = capsys.readouterr().out.splitlines()
    assert said.startswith("wrote ") and "features:mine" in said
