"""Records become batches."""

import torch
from test_records import folder, line, only  # noqa: F401 (a fixture)

from crystal.runtime import data
from crystal.runtime.data import RecordError


def test_batch_tensors(setup):
    s = setup()
    b = s.batch
    assert (
        b["input_ids"].shape == b["targets"].shape == b["attention_mask"].shape and len(b["input_ids"]) == 3
    )
    for i, record in enumerate(s.records):
        ids = b["input_ids"][i][b["attention_mask"][i].bool()]
        assert (b["mm_token_type_ids"][i] == (b["input_ids"][i] == s.fmt.image)).all()
        assert len(ids) < b["input_ids"].shape[1] or i == int(b["attention_mask"].sum(1).argmax())
        assert (b["input_ids"][i, b["latents"][i]] == torch.tensor(s.fmt.latents)).all()
    assert len(b["image_grid_thw"]) == 4 and b["pixel_values"].shape == b["pixel_values_cor"].shape
    assert not torch.equal(b["pixel_values"], b["pixel_values_cor"])


def test_corruption_depends_on_seed_epoch_and_record_alone(setup):
    """On each of the three, and on nothing else: asked again, in another order, by another object.

    Which corruption it is, test_data_by_hand.py says.
    """
    s = setup()
    records = [s.records[0]] * 2  # one picture, so that only the place differs

    def corrupted(seed, epoch, index):
        e = s.examples
        return data.RecordDataset(records, e.layout, e.image_processor, e.corruption, seed)[epoch, index]

    places = [(seed, epoch, index) for seed in (0, 1) for epoch in (0, 1) for index in (0, 1)]
    first = [corrupted(*place) for place in places]
    again = [corrupted(*place) for place in reversed(places)][::-1]
    for x, y in zip(first, again, strict=True):
        assert torch.equal(x["pixel_values_cor"], y["pixel_values_cor"])
        assert torch.equal(x["pixel_values"], first[0]["pixel_values"])
    for i, x in enumerate(first):
        others = [y["pixel_values_cor"] for y in first[i + 1 :]]
        assert not any(torch.equal(x["pixel_values_cor"], y) for y in others), places[i]


def test_grey_images_show_nothing_but_their_size(setup):
    s = setup()
    s.examples.grey = True
    x = s.examples[0, 0]["pixel_values"]
    assert torch.equal(x, x[:1].expand_as(x))


def test_crystal_needs_an_image(setup, folder):
    s = setup()
    s.examples.records = [
        only(
            folder,
            line(
                image=None,
                images=[],
                conversations=[{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "so"}],
            ),
        )[0]
    ]
    assert "field 'image': missing; the corrupted path needs an image" in s.examples[0, 0]["error"]
    for workers in (0, 1):
        (batch,) = data.loader(s.examples, [[(0, 0)]], 0, workers)
        assert batch["error"].endswith("x.jsonl:1: field 'image': missing; the corrupted path needs an image")


def test_skipped_records_are_replaced_and_told(setup):
    s = setup()
    good = s.examples.records[1]
    s.examples.records = [RecordError("x:1: broken"), good]
    assert s.examples[0, 0] == {"error": "x:1: broken"}
    s.examples.skip = True
    e = s.examples[0, 0]
    assert e["bad"] == ["x:1: broken"] and e["layout"].ids == s.examples[0, 1]["layout"].ids
