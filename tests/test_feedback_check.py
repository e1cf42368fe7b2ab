"""feedback_check.py: which model, records and numbers of updates its flags choose, and whether it
measures what it says.

Right values: errors from states computed in the test, the cross entropy from logits by log_softmax, medians
of a clock that is told what to say.
"""

import statistics

import pytest
import torch

from crystal import feedback
from crystal.methods.crystal import position_mask
from data_prep.checks import feedback as feedback_check


def test_the_flags_choose_model_records_and_updates(setup, records_file, tmp_path, monkeypatch, capsys):
    s = setup("--method", "valr", "--encoders", "none", dtype=torch.float32)
    # As a run is opened; what is timed is a backward pass through the whole language model.
    s.model.requires_grad_(False)
    told, opened = [], []

    def measure(model, batch, latents, updates, repeats):
        told.append(
            (
                model,
                batch,
                latents,
                updates,
                repeats,
                model.hf.model.language_model.layers[0].mlp.up_proj.weight.requires_grad,
            )
        )
        return {None: (0.0, 0.0, 2.5, 6.0)} | {T: (0.5 / (T + 1), 0.25, 2.5 + T, 1.5) for T in updates}

    monkeypatch.setattr(feedback_check, "measure", measure)
    monkeypatch.setattr(
        feedback_check.opening,
        "open_model",
        lambda *args, **how: opened.append((*args, how)) or (s.model, s.fmt, s.settings),
    )
    (tmp_path / "elsewhere.jsonl").write_text(records_file.read_text())
    feedback_check.main(
        [
            "--run", "some/run", "--data", str(tmp_path / "elsewhere.jsonl"),
            "--image_root", str(records_file.parent), "--records", "2", "--repeats", "5", "--updates", "0,3",
        ]
    )
    model, batch, latents, updates, repeats, trains = told[0]
    assert (
        opened == [("some/run", "last", {"method": "", "trust_method": False})]
        and model is s.model
        and (updates, repeats, trains) == ([0, 3], 5, True)
    )
    assert (
        len(batch["input_ids"]) == 2
        and batch["input_ids"][0, :4].tolist() == s.batch["input_ids"][0, :4].tolist()
    )
    at = [row.nonzero()[:, 0].tolist() for row in latents]
    # Two steps of the records' cot.
    assert at == [[p for p in row.tolist() if p >= 0] for row in batch["latents"]] and len(at[0]) == 2 * 3

    lines = capsys.readouterr().out.splitlines()
    assert (
        lines[0]
        == "2 records, 3 latents a segment, up to 6 a record; recurrence: cross entropy 2.5000, 6.00 s"
    )
    assert [line.split() for line in lines[2:]] == [
        ["0", "5.00e-01", "2.50e-01", "0.0000", "1.50", "4.00", "x"],
        ["3", "1.25e-01", "2.50e-01", "3.0000", "1.50", "4.00", "x"],
    ]

    # Without --run: the tiny model with VaLR's own 16 latents.
    feedback_check.main(["--data", str(records_file), "--records", "1", "--updates", "1"])
    assert (
        told[1][0].name == "tiny"
        and told[1][3:5] == ([1], 3)
        and int(told[1][2].sum()) == 2 * 16
        and len(opened) == 1
    )


def test_it_measures_errors_cross_entropy_and_time(setup, monkeypatch):
    s = setup("--method", "valr", "--encoders", "none")
    latents = position_mask(s.batch["latents"], s.batch["input_ids"].shape[1])
    # A round is the recurrence, then T = 0 and T = 2; the clock says how long each takes, three rounds of
    # which the middle one counts.
    seconds, now = [5.0, 1.0, 2.0, 50.0, 10.0, 20.0, 7.0, 4.0, 3.0], [0.0]
    ticks = iter([tick for one in seconds for tick in (0.0, one)])

    def clock():
        now[0] += next(ticks)
        return now[0]

    monkeypatch.setattr(feedback_check.time, "perf_counter", clock)
    found = feedback_check.measure(s.model, s.batch, latents, [0, 2], 3)
    assert list(found) == [None, 0, 2]
    assert (
        [row[3] for row in found.values()]
        == [statistics.median(seconds[i::3]) for i in range(3)]
        == [7.0, 4.0, 3.0]
    )

    with torch.no_grad():
        exact, _ = feedback.recurrence(s.model, s.batch, latents)
        behind = (latents.cumsum(1) > 0) & s.batch["attention_mask"].bool() & ~latents
        for T, (inside, rest, ce, _) in found.items():
            h = exact if T is None else feedback.parallel(s.model, s.batch, latents, T)[0]
            assert inside == pytest.approx(
                float((h - exact)[latents].norm() / exact[latents].norm()), abs=1e-12
            )
            assert rest == pytest.approx(float((h - exact)[behind].norm() / exact[behind].norm()), abs=1e-12)
            logp, means = s.model.hf.lm_head(h).double().log_softmax(-1), []
            for row, targets in zip(logp, s.batch["targets"].tolist()):
                losses = [-float(row[t, target]) for t, target in enumerate(targets) if target >= 0]
                means.append(sum(losses) / len(losses))
            assert ce == pytest.approx(sum(means) / len(means), rel=1e-9)
    assert found[0][0] > found[2][0] > 0 and found[0][1] > 0 and found[0][2] != found[None][2]


def test_the_run_must_feed_latents_back(setup, records_file, monkeypatch):
    s = setup(dtype=torch.float32)
    monkeypatch.setattr(feedback_check.opening, "open_model", lambda *_, **__: (s.model, s.fmt, s.settings))
    with pytest.raises(feedback_check.config.UserError, match="does not feed latents back"):
        feedback_check.main(["--run", "some/run", "--data", str(records_file)])
