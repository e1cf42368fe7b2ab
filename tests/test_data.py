"""Records become batches."""

import pytest
import torch
from PIL import Image
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


# --- seams: what a method's own code, or one picture, can get wrong ---


@pytest.mark.parametrize(
    "gives, says",
    [
        ({"x": 0.5}, "'x' is a float; a tensor"),
        ({"x": torch.tensor(0.5)}, "'x' is a tensor without dimensions"),
        ({"x": [1, 2]}, "'x' is a list; a tensor"),
        (0.5, "float, where {name: tensor"),
        (None, "NoneType, where {name: tensor"),
    ],
)
def test_extras_that_no_batch_can_be_made_of_are_told(setup, gives, says):
    s = setup()
    s.examples.extras = lambda record, images: gives
    assert s.examples[0, 0]["error"].startswith(f"{s.records[0].where}: the method's extras: {says}")


def test_extras_that_differ_between_records_are_told(setup):
    s = setup()
    for gives, says in (
        ([{"x": torch.ones(2, 3)}, {"x": torch.ones(2, 4)}], "'x' has shapes [2, 3], [2, 4]; only the first"),
        ([{"x": torch.ones(2)}, {}], "'x' is missing of some records"),
        ([{}, {"x": torch.ones(2)}], "'x' is missing of some records"),
    ):
        s.examples.extras = lambda record, images, gives=gives: gives[record is s.records[1]]
        batch = data.collate([s.examples[0, 0], s.examples[0, 1]], 0)
        assert batch["error"] == f"the method's extras: {says}" or says in batch["error"]
    s.examples.extras = lambda record, images: {"x": torch.ones(1 + (record is s.records[1]), 3)}
    assert data.collate([s.examples[0, 0], s.examples[0, 1]], 0)["x"].shape == (2, 2, 3)


def test_any_exception_from_one_picture_is_that_records_error(setup):
    s = setup()
    for kind in (IndexError, TypeError, ZeroDivisionError, RuntimeError):
        for place in ("pixels", "tokens"):

            class Broken:
                context = None

                def __call__(self, images, return_tensors):
                    if place == "pixels":
                        raise kind("no such thing\nin it")
                    return {"pixel_values": 1, "image_grid_thw": 2}

                def tokens(self, grid):
                    raise kind("no such thing\nin it")

            s.examples.image_processor = Broken()
            place_told = f"{s.records[0].where}: field 'image': no such thing in it"
            assert s.examples[0, 0]["error"] == place_told


def test_a_picture_too_thin_for_llavas_tiles_is_skipped(setup, tmp_path):
    """300 x 1 pixels: of the tiles nothing is left without their padding; the next record is taken."""
    s = setup("--method", "sft", family="llava_onevision")
    Image.new("RGB", (300, 1)).save(tmp_path / "thin.png")
    s.records[0].images = [tmp_path / "thin.png"]
    assert "field 'image': 300 x 1 pixels: so long and thin" in s.examples[0, 0]["error"]
    s.examples.skip = True
    found = s.examples[0, 0]
    assert found["layout"].ids == s.examples[0, 1]["layout"].ids and len(found["bad"]) == 1


def test_a_context_that_is_too_long_is_told_with_the_models_own_limit(setup):
    """The sequence at the limit passes whole; one token more is the record's error, and nothing is cut."""
    s = setup()
    n = len(s.examples[0, 0]["layout"].ids)
    text = s.model.hf.config.text_config
    before = text.max_position_embeddings
    try:
        text.max_position_embeddings = n
        assert len(s.examples[0, 0]["layout"].ids) == n
        text.max_position_embeddings = n - 1
        told = s.examples[0, 0]["error"]
    finally:
        text.max_position_embeddings = before
    said = f"{n} tokens, 12 of them of images; the model's own limit is {n - 1} "
    assert told.startswith(f"{s.records[0].where}: {said}")
    assert "\n" not in told
