"""The teacher's side of LaViT: gaze equal to eager attention's, resumable and sharded files, filters, and a
student that learns from them.
"""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from test_ddp import ROOT, run

from crystal import train
from crystal.runtime import data
from crystal.runtime.config import UserError
from data_prep import features, lavit_teacher
from data_prep.lavit_teacher import Looks, look, passes, report, text_rows


@pytest.fixture
def source(records_file, tmp_path):
    """conftest's records with boxes on all but the last, in a folder of their own."""
    for image in records_file.parent.glob("*.png"):
        (tmp_path / image.name).write_bytes(image.read_bytes())
    lines = [json.loads(line) for line in records_file.read_text().splitlines()]
    for line in lines[:2]:
        line["boxes"] = [[0, 0, 28, 28]]
    (tmp_path / "set.v1.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path / "set.v1.jsonl"


def teach(model_dirs, source, *more):
    lavit_teacher.main(
        [
            "--teacher", str(model_dirs[True]), "--data", str(source), "--shard", "2", "--batch_size", "3",
            "--max_new_tokens", "3", "--device", "cpu", *more,
        ]
    )


def eager(model, batch):
    """Eq. 2 from full L x L weights, pair by pair -> list of S [N]."""
    weights = []

    def keep(layer, q, k, scale):
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        scores = (q @ k.transpose(2, 3) * scale).masked_fill(
            torch.ones(q.shape[2], q.shape[2]).triu(1).bool(), -math.inf
        )
        weights.append(scores.softmax(-1))

    model.hidden(batch, recorder=keep)
    mean = torch.stack(weights).mean((0, 2))  # [B,L,L], over layers and heads
    out = []
    for b, cols in enumerate(batch["image"]):
        cols, own = cols[cols >= 0], set(batch["latents"][b].tolist())
        text = [t for t in range(int(cols.max()) + 1, int(batch["attention_mask"][b].sum())) if t not in own]
        out.append(mean[b][text][:, cols].mean(0))
    return out


def test_gaze_of_a_small_attention_by_hand():
    """Two layers, two query heads on one key head, text rows 2 and 3 of four positions, image columns 0 and
    1; sums of exponentials written out.
    """
    # Scores q.k of d = 1 at scale 1: keys' values are the logarithms, so that weights are
    # shares of small numbers.
    keys = torch.tensor([[1.0, 2.0, 1.0, 4.0]]).log()[None, :, :, None]  # [1,1,4,1]
    queries = torch.ones(1, 2, 4, 1)
    queries[0, 1] = 2.0  # the second head squares the numbers
    other = torch.tensor([[3.0, 1.0, 2.0, 2.0]]).log()[None, :, :, None]
    looks = Looks(torch.tensor([[2, 3]]), torch.tensor([[0, 1]]))
    looks(0, queries, keys, 1.0)
    looks(1, queries[:, :, :, :], other, 1.0)
    # Row 2 sees keys 0 to 2, row 3 all four.
    # Layer 0: head 0, head 1; column by column.
    first = ([1 / 4 + 1 / 8, 2 / 4 + 2 / 8], [1 / 6 + 1 / 22, 4 / 6 + 4 / 22])
    second = [3 / 6 + 3 / 8, 1 / 6 + 1 / 8], [9 / 14 + 9 / 18, 1 / 14 + 1 / 18]
    expected = [sum(head[n] for layer in (first, second) for head in layer) / (2 * 2 * 2) for n in (0, 1)]
    assert looks.S.tolist() == [pytest.approx(expected, rel=1e-6)]

    # A scale of 2 squares the numbers of the first head, too; a padded row and column count nothing.
    looks = Looks(torch.tensor([[3, -1]]), torch.tensor([[1, -1]]))
    looks(0, queries[:, :1], keys, 2.0)
    assert looks.S.tolist() == [[pytest.approx(4 / 22), 0.0]]


def test_text_rows_are_what_follows_the_last_image():
    """Position by position: neither the image, what stands before it, latents nor padding."""
    batch = {
        "input_ids": torch.zeros(2, 9, dtype=torch.long),
        "attention_mask": torch.tensor([[1] * 9, [1] * 6 + [0] * 3]),
        "image": torch.tensor([[1, 2, 4], [1, -1, -1]]),
        "latents": torch.tensor([[6, 7], [3, -1]]),
    }
    assert text_rows(batch).tolist() == [[5, 8, -1], [2, 4, 5]]


def test_boxes_are_pixels_of_the_first_image(setup):
    """Record 2 has pictures of 84 x 112 and 56 x 84: tokens 0 to 11 are the first's, row by row of three."""
    s = setup("--method", "sft", which=[2])
    s.records[0].boxes = [[28, 56, 84, 84]]  # the third row's second and third
    tensors, statistics = look(s.model, s.fmt, s.method, s.records, 1)[0]
    gaze = tensors["gaze"]
    assert len(gaze) == 12 + 6 and statistics["focus"] == pytest.approx(
        float((gaze[7] + gaze[8]) / gaze.sum()), rel=1e-6
    )
    top = sorted(range(18), key=lambda n: -float(gaze[n]))[:8]
    assert tensors["gaze_top"].tolist() == top


@pytest.fixture
def stub(setup, monkeypatch):
    """What the command asks of the model: opened how, which records in batches of what size, and answers by
    rule. Record 2 is answered wrong.
    """
    s = setup("--method", "sft", dtype=torch.float32)
    told = SimpleNamespace(
        opened=[], answered=[], looked=[], focus={"0": 0.5, "1": 0.3, "2": 0.1}, blind=set()
    )

    def answers(model, fmt, records, batch_size, max_new_tokens):
        told.answered.append(
            (
                [r.id for r in records], [len(r.images) for r in records], [r.turns[-1][1] for r in records],
                batch_size, max_new_tokens,
            )
        )
        seeing = bool(records[0].images)
        return [
            {"prediction": "p" if seeing else "b", "correct": r.id != "2" if seeing else r.id in told.blind}
            for r in records
        ]

    def looking(model, fmt, method, records, batch_size):
        told.looked.append(([r.id for r in records], batch_size))
        return [
            (
                {"v_sem": torch.full((5,), float(r.id))},
                {"focus": told.focus[r.id], "entropy": 1.0, "salient": 2},
            )
            for r in records
        ]

    monkeypatch.setattr(
        lavit_teacher,
        "open_model",
        lambda *args, **how: told.opened.append((args, how)) or (s.model, s.fmt, s.settings),
    )
    monkeypatch.setattr(lavit_teacher.evaluate, "answers", answers)
    monkeypatch.setattr(lavit_teacher, "look", looking)
    return told


def test_the_command_passes_its_flags_on(stub, source, tmp_path, capsys):
    """Images from another folder, the first two of three records, one a shard; batches, lengths and dtype
    as they were typed.
    """
    (tmp_path / "records").mkdir()
    records = tmp_path / "records" / "mine.jsonl"
    records.write_text(source.read_text())
    lavit_teacher.main(
        [
            "--teacher", "some/teacher", "--data", str(records), "--image_root", str(tmp_path),
            "--limit", "2", "--shard", "1", "--batch_size", "5", "--max_new_tokens", "6",
            "--dtype", "bfloat16", "--keep", "all", "--device", "cpu",
        ]
    )
    (name, which, device), how = stub.opened[0]
    assert (name, which, device, how["dtype"]) == (
        "some/teacher", "best", torch.device("cpu"), torch.bfloat16,
    )
    assert stub.looked == [(["0"], 5), (["1"], 5)]
    # With the image, then without.
    assert [(ids, images) for ids, images, *_ in stub.answered] == [
        (["0"], [1]), (["0"], [0]), (["1"], [1]), (["1"], [0]),
    ]
    assert all((batch, room) == (5, 6) for *_, batch, room in stub.answered)
    assert stub.answered[0][2] == ["<image>\nWhat colour is the star?"] and stub.answered[1][2] == [
        "What colour is the star?"
    ]

    assert sorted(p.name for p in (tmp_path / "lavit").iterdir()) == [
        "mine-00000.jsonl", "mine-00000.safetensors", "mine-00001.jsonl", "mine-00001.safetensors",
        "mine.json",
    ]
    assert load_file(tmp_path / "lavit" / "mine-00001.safetensors")["1/v_sem"].tolist() == [1.0] * 5
    logged = json.loads((tmp_path / "lavit" / "mine-00001.jsonl").read_text())
    assert logged == {
        "id": "1",
        "where": f"{records}:2",
        "answer": "3",
        "prediction": "p",
        "correct": True,
        "blind_prediction": "b",
        "blind_correct": False,
        "focus": 0.3,
        "entropy": 1.0,
        "salient": 2,
    }
    copies = [
        json.loads(line) for line in (tmp_path / "records" / "mine.lavit.jsonl").read_text().splitlines()
    ]
    assert [(r["id"], r["features"]) for r in copies] == [
        ("0", {"lavit": "lavit/mine-00000.safetensors"}),
        ("1", {"lavit": "lavit/mine-00001.safetensors"}),
    ]
    said = capsys.readouterr().out
    assert (
        "2 records in 2 shards, 0 there already" in said
        and f"wrote 2 records to {tmp_path}/records/mine.lavit.jsonl: --method lavit --semantics_dim 5"
        in said
    )
    note = json.loads((tmp_path / "lavit" / "mine.json").read_text())
    assert note == {
        "teacher": "some/teacher",
        "shard": 1,
        "min_pixels": None,
        "max_pixels": None,
        "max_new_tokens": 6,
        "weights": "",
        "records": ["0", "1"],
    }


@pytest.mark.parametrize(
    "share, blind, kept",
    [("0.2", set(), ["0", "1"]), ("0.4", set(), ["0"]), ("0.3", {"0"}, ["1"]), (None, set(), ["0", "1"])],
)
def test_the_command_keeps_what_passes(stub, source, tmp_path, capsys, share, blind, kept):
    """Records 0 and 1 are answered right and have half and 0.3 of the attention inside their boxes; --keep
    all keeps record 2, too.
    """
    stub.blind = blind
    flags = [
        "--teacher",
        "some/teacher",
        "--data",
        str(source),
        "--device",
        "cpu",
        *(["--share", share] if share else []),
    ]
    lavit_teacher.main(flags)
    out = source.with_suffix(".lavit.jsonl")
    assert [json.loads(line)["id"] for line in out.read_text().splitlines()] == kept
    inside = sum(focus >= float(share or 0.2) for focus in stub.focus.values())
    said = capsys.readouterr().out
    assert (
        "focus score 0.300" in said
        and f"at least {100 * float(share or 0.2):g} % of the attention inside the boxes: "
        f"{inside} alone, {len(kept)} after"
        in said
    )
    assert len(stub.opened) == 1
    lavit_teacher.main([*flags, "--keep", "all"])
    # The shards are there.
    assert [json.loads(line)["id"] for line in out.read_text().splitlines()] == ["0", "1", "2"] and len(
        stub.opened
    ) == 1


@pytest.mark.parametrize("method", ["sft", "crystal"])
def test_gaze_is_eq_2_and_3_of_eager_attention(setup, method):
    """Padding, several images, grouped heads; with a teacher that has latents too, which are no text."""
    s = setup("--method", method)
    recorder = Looks(text_rows(s.batch), s.batch["image"])
    with torch.no_grad():
        s.model.hidden(s.batch, recorder=recorder)
        expected = eager(s.model, s.batch)
    assert len({len(e) for e in expected}) > 1
    for S, e in zip(recorder.S, expected):
        assert torch.allclose(S[: len(e)].double(), e, atol=1e-9) and not S[len(e) :].any()
    found = look(s.model, s.fmt, s.method, s.records, 2)
    for (tensors, _), e in zip(found, expected):
        assert torch.allclose(tensors["gaze"].double(), (e - e.min()) / (e.max() - e.min()), atol=1e-5)
        assert tensors["gaze_top"].tolist() == e.argsort(descending=True)[:8].tolist()


def test_semantics_are_the_mean_of_the_image_tokens_last_states(setup):
    s = setup("--method", "sft")
    h = s.model.hidden(s.batch).detach()
    grids = [[3, 4], [2, 2]]
    for i, (tensors, statistics) in enumerate(look(s.model, s.fmt, s.method, s.records, 3)):
        cols = s.batch["image"][i][s.batch["image"][i] >= 0]
        assert torch.allclose(tensors["v_sem"].double(), h[i, cols].mean(0), atol=1e-6)
        assert int(tensors["gaze_grid"].prod(1).sum()) == len(tensors["gaze"]) == len(cols)
        if i < 2:
            assert tensors["gaze_grid"].tolist() == [grids[i]]
        assert (
            statistics["focus"] is None
            and 0 < statistics["entropy"] <= math.log(len(cols))
            and statistics["salient"] >= 0
        )
    assert tensors["gaze_grid"].tolist() == [[4, 3], [3, 2]]  # two images


def test_focus_score_counts_what_the_boxes_touch(setup):
    s = setup("--method", "sft", which=[0])
    s.records[0].boxes = [[0, 0, 28, 28], [100, 60, 104, 70]]  # tokens 0 and 11 of 3 x 4
    tensors, statistics = look(s.model, s.fmt, s.method, s.records, 1)[0]
    assert statistics["focus"] == pytest.approx(
        float((tensors["gaze"][0] + tensors["gaze"][11]) / tensors["gaze"].sum())
    )


def test_files_resume_and_the_student_learns_from_them(model_dirs, source, tmp_path, capsys):
    teach(model_dirs, source, "--keep", "all")
    out, folder = tmp_path / "set.v1.lavit.jsonl", tmp_path / "lavit"
    said = capsys.readouterr().out
    assert (
        "3 records in 2 shards, 0 there already" in said
        and "1 records have no boxes" in said
        and "--semantics_dim 32" in said
    )
    records, _ = data.read(out)
    assert [r.features["lavit"].name for r in records] == ["set.v1-00000.safetensors"] * 2 + [
        "set.v1-00001.safetensors"
    ]
    assert {n: x.shape for n, x in data.load_features(records[2], "lavit").items()} == {
        "gaze": (18,),
        "gaze_grid": (2, 2),
        "gaze_top": (8,),
        "v_sem": (32,),
    }

    lost, kept = folder / "set.v1-00001", folder / "set.v1-00000"
    before, stamp = load_file(f"{lost}.safetensors"), (folder / "set.v1-00000.safetensors").stat().st_mtime_ns
    (folder / "set.v1-00001.jsonl").unlink()
    out.unlink()
    teach(model_dirs, source, "--keep", "all")
    assert "1 there already" in capsys.readouterr().out and out.is_file()
    assert (folder / f"{kept.name}.safetensors").stat().st_mtime_ns == stamp
    after = load_file(f"{lost}.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
    with pytest.raises(UserError, match="made by another teacher"):
        teach(model_dirs, source, "--max_pixels", "6272")
    teach(model_dirs, source, "--max_pixels", "6272", "--overwrite", "--keep", "all")
    assert (
        "0 there already" in capsys.readouterr().out
        and load_file(f"{kept}.safetensors")["0/gaze_grid"].prod() < 12
    )

    # a student that sees the images larger: its grid is finer than the teacher's
    flags = [
        "--method", "lavit", "--model", str(model_dirs[True]), "--data", str(out), "--max_steps", "2",
        "--batch_size", "3", "--lr", "1e-3", "--min_pixels", "25088", "--eval_every", "0",
        "--output", str(tmp_path / "run"),
    ]
    run = train.main(flags)
    first, last = (json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert last["gaze"] < first["gaze"] and last["semantics"] < first["semantics"]

    # a run as teacher: its checkpoint counts, not its name alone
    (tmp_path / "own.jsonl").write_text(source.read_text().splitlines()[0] + "\n")
    own = [
        "--teacher", str(run), "--data", str(tmp_path / "own.jsonl"), "--max_new_tokens", "2",
        "--keep", "all", "--device", "cpu",
    ]
    lavit_teacher.main(own)
    train.main(flags + ["--overwrite", "--seed", "1"])
    with pytest.raises(UserError, match="made by another teacher"):
        lavit_teacher.main(own)


def test_two_ranks_write_what_one_writes(model_dirs, source, tmp_path):
    flags = [
        "--teacher", str(model_dirs[True]), "--data", str(source), "--shard", "1", "--max_new_tokens", "2",
        "--device", "cpu", "--keep", "all",
    ]
    script = str(ROOT / "data_prep" / "lavit_teacher.py")
    done = run(["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script], flags)
    assert done.count("wrote 3 records") == 1
    two = {p.name: p.read_bytes() for p in (tmp_path / "lavit").iterdir()} | {
        "records": (tmp_path / "set.v1.lavit.jsonl").read_bytes()
    }
    for p in (tmp_path / "lavit").iterdir():
        p.unlink()
    lavit_teacher.main(flags)
    assert two == {p.name: p.read_bytes() for p in (tmp_path / "lavit").iterdir()} | {
        "records": (tmp_path / "set.v1.lavit.jsonl").read_bytes()
    }


def test_a_broken_image_is_left_out_and_told(model_dirs, source, tmp_path, capsys):
    """Of a JSON list; the shards that are there remember it, until someone asks without the flag."""
    lines = [json.loads(line) for line in source.read_text().splitlines()]
    lines[1]["features"] = None
    source = tmp_path / "list.json"
    source.write_text(json.dumps(lines, indent=1))
    whole = (tmp_path / "1_0.png").read_bytes()
    (tmp_path / "1_0.png").write_bytes(whole[:200])
    with pytest.raises(UserError, match=r"list.json\[1\]: field 'image': .*1_0.png.*--on_bad_record skip"):
        teach(model_dirs, source, "--keep", "all")
    assert not list((tmp_path / "lavit").glob("*.safetensors"))
    for there in (0, 2):
        teach(model_dirs, source, "--keep", "all", "--on_bad_record", "skip")
        out = capsys.readouterr().out
        assert (
            f"{there} there already" in out
            and "left out: " in out
            and "list.json[1]" in out
            and "2 records, entropy" in out
        )
        assert [
            json.loads(line)["id"] for line in (tmp_path / "list.lavit.jsonl").read_text().splitlines()
        ] == ["0", "2"]
    last = (tmp_path / "2_0.png").read_bytes()
    (tmp_path / "2_0.png").write_bytes(b"x")
    (tmp_path / "lavit" / "list-00001.jsonl").unlink()
    # That of the run before counts too.
    with pytest.raises(UserError, match="2 broken records, more than 1 % of 3"):
        teach(model_dirs, source, "--on_bad_record", "skip")
    (tmp_path / "2_0.png").write_bytes(last)
    (tmp_path / "1_0.png").write_bytes(whole)
    teach(model_dirs, source, "--keep", "all")
    assert "0 there already" in capsys.readouterr().out and not list(tmp_path.rglob("*.part"))
    records, _ = data.read(tmp_path / "list.lavit.jsonl")
    assert [(r.id, len(data.load_features(r, "lavit"))) for r in records] == [("0", 4), ("1", 4), ("2", 4)]

    (tmp_path / "1_0.png").write_bytes(b"x")
    (tmp_path / "2_0.png").unlink()  # told when the file is read, the other when its turn comes
    with pytest.raises(UserError, match="2 broken records, more than 1 % of 3"):
        teach(model_dirs, source, "--overwrite", "--on_bad_record", "skip")
    assert not list((tmp_path / "lavit").glob("*.safetensors"))


def test_filters():
    line = lambda correct, blind, focus: {
        "correct": correct,
        "blind_correct": blind,
        "focus": focus,
        "entropy": 1.0,
        "salient": 2,
    }
    assert passes(line(True, False, 0.2), 0.2) == (True, True, True) and passes(
        line(False, True, 0.19), 0.2
    ) == (False, False, False)
    assert passes(line(True, False, None), 0.2)[2]
    text = report(
        [line(True, False, 0.5), line(True, False, 0.1), line(True, True, 0.5), line(False, False, None)], 0.2
    )
    assert (
        "answered correctly: 3 alone, 3 after" in text
        and "without the image: 3 alone, 2 after" in text
        and "the boxes: 3 alone, 1 after" in text
    )
    assert "focus score 0.367" in text and "1 records have no boxes" in text


def test_bad_input(model_dirs, source, records_file):
    for flags in (
        ["--shard", "0"], ["--batch_size", "0"], ["--max_new_tokens", "0"], ["--limit", "-1"],
        ["--device", "cuda:99"],
    ):
        with pytest.raises(UserError, match=" ".join(flags)):
            teach(model_dirs, source, *flags)
    # A random teacher answers nothing.
    with pytest.raises(UserError, match="no record passes all three filters"):
        teach(model_dirs, source)
    lines = source.read_text().splitlines()
    for change, message in (
        ({"id": "0"}, "set.v1.jsonl:2: field 'id': missing, or that of another"),
        (
            {
                "images": [],
                "conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "so"}],
            },
            "set.v1.jsonl:2: field 'image': missing",
        ),
    ):
        source.write_text("\n".join([lines[0], json.dumps(json.loads(lines[1]) | change)]) + "\n")
        with pytest.raises(UserError, match=message):
            teach(model_dirs, source)


def test_the_bar_counts_every_look_and_quiet_leaves_what_was_written(
    model_dirs, source, tmp_path, monkeypatch, capsys
):
    """Three looks at each of three records, at a broken one too, whose image cannot be read."""
    counted = []

    class Counting:
        def __init__(self, total, name, procs, unit):
            counted.append([total, name, unit, 0])

        def update(self, n):
            counted[-1][3] += n

        def close(self):
            pass

    monkeypatch.setattr(features, "Bar", Counting)
    (tmp_path / "1_0.png").write_bytes(b"x")
    monkeypatch.setattr(lavit_teacher, "leave_out", lambda *_: None)  # of three records one is above 1 %
    teach(model_dirs, source, "--keep", "all", "--on_bad_record", "skip")
    assert counted == [[9, "lavit_teacher", "look", 9]]
    assert "3 records in" in capsys.readouterr().out

    teach(model_dirs, source, "--keep", "all", "--on_bad_record", "skip", "--overwrite", "--quiet")
    (said,) = capsys.readouterr().out.splitlines()
    assert said.startswith("wrote 2 records")
