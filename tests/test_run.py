"""A run in Python: what it answers, batches and shows is what the commands, training
and stock transformers say.
"""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

import crystal
from crystal import generate, train, training_data
from crystal.evaluation.interventions import replaced
from crystal.layout import IGNORE
from crystal.runtime import checkpoint, data
from crystal.runtime.config import UserError


@pytest.fixture(scope="module")
def trained(model_dirs, records_file, tmp_path_factory):
    """A run of two updates whose first records are those of the file."""
    run = tmp_path_factory.mktemp("run") / "crystal"
    train.main(
        [
            "--model", str(model_dirs[True]), "--data", str(records_file), "--output", str(run),
            "--latents", "3", "--lora_r", "2", "--lr", "1e-2", "--max_steps", "2", "--eval_every", "0",
            "--seed", "5", "--corruption", "noise=20:40", "--attn_layers", "all",
        ]
    )
    return run


@pytest.fixture
def opened(trained):
    return crystal.open(trained, device="cpu")


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_answers_are_the_commands(trained, opened, records_file, capsys):
    """Whatever an image is given as; and `<image>` in a question is text."""
    picture = records_file.parent / "0_0.png"
    for question in ("What is it?", "Is <image> a word?"):
        generate.main(
            [
                "--model", str(trained), "--image", str(picture), "--question", question, "--device", "cpu",
                "--max_new_tokens", "5",
            ]
        )
        expected = capsys.readouterr().out.splitlines()[-1]
        for image in (picture, str(picture), picture.read_bytes(), Image.open(picture), [picture]):
            assert opened.answer(image, question, max_new_tokens=5) == expected
    generate.main(
        [
            "--model", str(trained), "--question", "Hello?", "--device", "cpu", "--max_new_tokens", "3",
            "--latents", "drop",
        ]
    )
    assert opened.answer(None, "Hello?", 3, latents="drop") == capsys.readouterr().out.splitlines()[-1]


def test_a_batch_is_what_training_sees(trained, opened, records_file):
    """From a file, from its dictionaries, and with pictures in memory: pixels, corrupted ones and
    ids to the bit.
    """
    settings = opened.settings
    examples, _, _ = training_data.open_data(
        settings, opened.method, opened.model, opened.format, train.distributed.Processes()
    )
    expected = data.collate([examples[0][0, i] for i in range(3)], opened.model.tokenizer.pad_token_id)
    lines = lines_of(records_file)[:3]
    in_memory = [
        line | {"images": [Image.open(records_file.parent / name) for name in line["images"]]}
        for line in lines
    ]
    as_bytes = [
        line | {"images": [(records_file.parent / name).read_bytes() for name in line["images"]]}
        for line in lines
    ]
    by_path = [
        line | {"images": [str(records_file.parent / name) for name in line["images"]]} for line in lines
    ]
    given = [(lines, records_file.parent), (in_memory, None), (as_bytes, None), (by_path, None)]
    for records, root in given:
        batch = opened.batch(records, image_root=root)
        assert batch.keys() == expected.keys()
        places = batch.pop("where")  # a file's lines, or a place in a list
        assert len(places) == 3 and all(places)
        for name, value in ((name, value) for name, value in expected.items() if name != "where"):
            assert (
                torch.equal(batch[name], value) if isinstance(value, torch.Tensor) else batch[name] == value
            ), name
    whole = opened.batch(records_file)
    assert (
        len(whole["input_ids"]) == len(lines_of(records_file))
        and len(opened.batch(lines[0], records_file.parent)["input_ids"]) == 1
    )
    assert not torch.equal(
        opened.batch(lines, records_file.parent, seed=6)["pixel_values_cor"], expected["pixel_values_cor"]
    )


def test_forward_gives_terms_and_the_states_they_come_from(opened, records_file):
    """ce_int from the intact path's states by hand; the graph is kept."""
    batch = opened.batch(records_file)
    found = opened.forward(batch)
    assert set(found.terms) == {"ce_int", "ce_cor", "kl", "attn", "mass_int", "mass_cor"}
    log_p = opened.model.hf.lm_head(found.h_int).log_softmax(-1)
    losses = []
    for b, targets in enumerate(batch["targets"]):
        at = (targets != IGNORE).nonzero()[:, 0]
        losses.append(-log_p[b, at, targets[at]].mean())
    assert float(found.terms["ce_int"]) == pytest.approx(float(torch.stack(losses).mean()), rel=1e-5)
    assert found.h_cor.shape == found.h_int.shape and not torch.equal(found.h_cor, found.h_int)
    found.terms["kl"].backward()
    assert opened.model.new_tokens.embedding.grad.abs().max() > 0


@pytest.fixture
def eager(model_dirs, opened):
    """Stock transformers with written-out attention and the run's weights: forward(batch,
    pixels) -> its output.
    """
    from conftest import put_in

    stock = AutoModelForImageTextToText.from_pretrained(model_dirs[True], attn_implementation="eager").eval()
    run = crystal.open(opened.name, device="cpu")
    put_in(run.model.hf)
    stock.load_state_dict(run.model.hf.state_dict())

    def forward(batch, pixels="pixel_values"):
        names = ("input_ids", "attention_mask", "image_grid_thw", "mm_token_type_ids")
        return stock.model(
            **{n: batch[n] for n in names},
            pixel_values=batch[pixels],
            output_attentions=True,
            output_hidden_states=True,
        )

    forward.layers = stock.model.language_model.layers
    return forward


@torch.no_grad()
def test_attention_and_latents_are_stock_transformers(opened, eager, records_file):
    """The intact path is a plain forward; the corrupted one has the intact path's latents put
    in before each layer.
    """
    record = lines_of(records_file)[1]
    root = records_file.parent
    record["images"] = [str(root / name) for name in record["images"]]
    batch = opened.batch(record)
    where = batch["latents"]
    out = eager(batch)
    states = opened.latents(record)
    expected = torch.stack(
        [h[0, where[0]] for h in out.hidden_states[:-1]] + [out.last_hidden_state[0, where[0]]]
    )
    assert len(states) == len(eager.layers) + 1
    assert torch.allclose(states, expected, atol=1e-5)

    found = opened.attention(record)
    assert torch.equal(found.queries, batch["answer_positions"][0]) and torch.equal(found.keys, where[0])
    assert set(found.A_int) == set(found.A_cor) == set(range(len(eager.layers)))

    class Stock:
        layers = eager.layers

    with replaced(Stock, where, states[:-1, None]):
        corrupted = eager(batch, "pixel_values_cor")
    for layer in found.A_int:
        for A, weights in ((found.A_int, out.attentions), (found.A_cor, corrupted.attentions)):
            right = weights[layer][0][:, found.queries][:, :, found.keys]
            assert torch.allclose(A[layer], right, atol=1e-5)
    assert not torch.allclose(found.A_int[1], found.A_cor[1], atol=1e-4)

    chosen = opened.attention(record, queries=[9, 11], keys=[0, 3, 5], layers=[1])
    assert set(chosen.A_int) == {1}
    assert torch.allclose(chosen.A_int[1], out.attentions[1][0][:, [9, 11]][:, :, [0, 3, 5]], atol=1e-5)


def test_what_is_no_run_has_one_path(records_file):
    run = crystal.open("tiny", device="cpu")
    assert run.settings.method == "sft" and not run.is_run
    batch = run.batch(records_file)
    assert "pixel_values_cor" not in batch or batch["pixel_values_cor"] is None
    found = run.forward(batch)
    assert set(found.terms) == {"ce"} and found.h_cor is None
    attention = run.attention(lines_of(records_file)[0] | {"images": [str(records_file.parent / "0_0.png")]})
    assert attention.A_cor is None and torch.equal(attention.keys, batch["image"][0][batch["image"][0] >= 0])


def test_trained_heads_are_the_checkpoints(model_dirs, records_file, tmp_path):
    """VaLR's projections, which its losses need: the terms are those that the run's own validation measured.
    """
    run = train.main(
        [
            "--method", "valr", "--encoders", "own", "--model", str(model_dirs[True]),
            "--data", str(records_file), "--val_data", str(records_file), "--output", str(tmp_path / "valr"),
            "--latents", "2", "--lr", "1e-2", "--lr_latents", "1e-2", "--max_steps", "2", "--eval_every", "2",
            "--tune", "lora",
        ]
    )
    opened = crystal.open(run, device="cpu")
    saved = load_file(checkpoint.step_dir(run, 2) / "trainable.safetensors")
    heads = {n: p for n, p in opened.heads.named_parameters() if p.requires_grad}
    assert heads and all(torch.equal(p, saved[f"heads.{n}"]) for n, p in heads.items())
    told = [line for line in lines_of(run / "metrics.jsonl") if "val_repa" in line][-1]
    with torch.no_grad():
        terms = opened.forward(opened.batch(records_file)).terms
    assert float(terms["repa"]) == pytest.approx(told["val_repa"], rel=1e-4) and float(
        terms["ce"]
    ) == pytest.approx(told["val_ce"], rel=1e-4)


def test_mistakes_are_one_line(opened, records_file, tmp_path):
    record = lines_of(records_file)[0]
    for change, says in (
        ({"images": ["nowhere.png"]}, "record 0: field 'images': no such file: nowhere.png"),
        ({"images": [3]}, "record 0: field 'images': a path or a list of paths is needed"),
        ({"conversations": []}, "record 0: field 'conversations': missing or empty"),
        ({"images": [b"GIF89a?"]}, "record 0: field 'image': its bytes: cannot identify image file"),
    ):
        with pytest.raises(UserError) as refused:
            opened.batch(record | change)
        assert str(refused.value).startswith(says) and "\n" not in str(refused.value)
    with pytest.raises(UserError, match="field 'image': its bytes: cannot identify"):
        opened.answer(b"no picture", "What?")
    with pytest.raises(UserError, match="no such directory"):
        crystal.open(str(tmp_path / "nothing" / "there"))
    (tmp_path / "broken.jsonl").write_text(json.dumps(record | {"images": []}) + "\n{\n")
    with pytest.raises(UserError, match="broken.jsonl:"):
        opened.records(tmp_path / "broken.jsonl")
