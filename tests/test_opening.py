"""What --model takes is opened as asked: the checkpoint that was named, its own bounds on
pixels, dtype and device.
"""

import pytest
import torch
from safetensors.torch import load_file

from crystal import opening, train
from crystal.runtime import checkpoint
from crystal.runtime.config import UserError


@pytest.fixture(scope="module")
def run(model_dirs, records_file, tmp_path_factory):
    """A run of three updates, a checkpoint after each; the second is the best."""
    run = train.main(
        [
            "--model",
            str(model_dirs[True]),
            "--data",
            str(records_file),
            "--latents",
            "3",
            "--lora_r",
            "2",
            "--lora_alpha",
            "6",
            "--lr",
            "1e-2",
            "--max_steps",
            "3",
            "--save_every",
            "1",
            "--keep",
            "3",
            "--eval_every",
            "0",
            "--log_every",
            "1",
            "--max_pixels",
            "6272",
            "--device",
            "cpu",
            "--output",
            str(tmp_path_factory.mktemp("commands") / "run"),
        ]
    )
    checkpoint.mark_best(run, 2, 1.0, "loss")
    return run


def saved(run, step):
    """{parameter: tensor} of a checkpoint, from its file."""
    return load_file(run / "checkpoints" / f"step-{step}" / "trainable.safetensors")


def test_a_model_is_opened_as_asked(run, model_dirs):
    """The tensors of the checkpoint that is named; its own bounds on pixels unless others are given; dtype
    and device of the weights.
    """
    assert not torch.equal(*(saved(run, step)["model.new_tokens.embedding"] for step in (1, 2)))
    for which, step in (("1", 1), ("best", 2), ("last", 3)):
        model, fmt, settings = opening.open_model(run, which)
        ours = {f"model.{name}": p for name, p in model.named_parameters()}
        assert all(torch.equal(ours[name], tensor) for name, tensor in saved(run, step).items())
        assert settings.latents == fmt.count == 3 and not model.training
        # The rows that the forward reads follow what was trained.
        embedding = model.hf.get_input_embeddings().weight
        assert torch.equal(embedding[model.new_tokens.ids], saved(run, step)["model.new_tokens.embedding"])
    assert dict(model.image_processor.size)["longest_edge"] == 6272

    model, _, _ = opening.open_model(run, min_pixels=4704, max_pixels=9408)
    assert (
        dict(model.image_processor.size)["shortest_edge"],
        dict(model.image_processor.size)["longest_edge"],
    ) == (4704, 9408)
    model, fmt, settings = opening.open_model(
        str(model_dirs[True]), dtype=torch.bfloat16, device=torch.device("meta"), min_pixels=3136,
        max_pixels=6272,
    )
    assert (model.hf.dtype, model.device.type, settings, fmt.count) == (torch.bfloat16, "meta", None, 0)
    assert (
        dict(model.image_processor.size)["shortest_edge"],
        dict(model.image_processor.size)["longest_edge"],
    ) == (3136, 6272)
    assert opening.open_model(str(model_dirs[True]))[0].hf.dtype == torch.float32


def test_opening_compiles_nothing(run, monkeypatch):
    """A run that was trained with --compile is opened without it: a few questions would not pay for it."""
    directory = run / "checkpoints" / "step-2"
    files, state = checkpoint.load(directory)
    state["settings"] |= {"compile": True, "checkpointing": True}
    monkeypatch.setattr(checkpoint, "load", lambda _: (files, state))
    model, _, settings = opening.open_model(run)
    assert not settings.compile and not settings.checkpointing
    assert not any("forward" in vars(layer) or layer.gradient_checkpointing for layer in model.layers)


def test_checkpoints_are_found_or_named(run):
    folder = run / "checkpoints"
    found = {which: opening.find(run, which) for which in ("best", "last", "1")}
    assert found == {"best": folder / "step-2", "last": folder / "step-3", "1": folder / "step-1"}
    for which, message in (("4", "no checkpoint '4'"), ("newest", "best, last or a step")):
        with pytest.raises(UserError, match=message):
            opening.find(run, which)
    with pytest.raises(UserError, match="not a run directory"):
        opening.open_run("tiny")


def test_without_a_validation_the_best_is_the_last(run, tmp_path):
    for step in ("step-1", "step-3"):
        (tmp_path / "checkpoints" / step).parent.mkdir(exist_ok=True)
        (tmp_path / "checkpoints" / step).symlink_to(run / "checkpoints" / step)
    assert opening.find(tmp_path, "best") == tmp_path / "checkpoints" / "step-3"


def test_a_name_is_known_by_what_is_in_it(tmp_path):
    """`best` is another checkpoint when the run has gone on, and a directory that is written anew another
    model.
    """
    run = tmp_path / "run"
    for step, value in ((7, 2.0), (24, 1.0)):
        checkpoint.save(run, step, {"trainable.safetensors": {"w": torch.full((2,), value)}}, {"step": step})
    checkpoint.mark_best(run, 7, 2.0, "val_loss")
    at_seven = opening.content_of(run)
    assert opening.content_of(run, "7") == at_seven
    assert opening.content_of(run, "last") == opening.content_of(run, "24") != at_seven

    checkpoint.mark_best(run, 24, 1.0, "val_loss")
    assert opening.content_of(run) == opening.content_of(run, "24")

    directory = tmp_path / "export"
    (directory / "deep").mkdir(parents=True)
    (directory / "config.json").write_text("{}")
    (directory / "deep" / "weights").write_text("1")
    first = opening.content_of(directory)
    assert opening.content_of(directory) == first
    (directory / "deep" / "weights").write_text("22")
    assert opening.content_of(directory) != first
