"""Frozen encoders: patches in the right number and order, the checkpoint's own image rules, nothing trains; precomputed equals at once."""
import json
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModel, SiglipVisionConfig, SiglipVisionModel

from crystal import data, encoders
from crystal.config import UserError


@pytest.fixture(scope="module")
def siglip(tmp_path_factory):
    """A small random SigLIP as a directory, without registers, bicubic, 3 x 3 patches."""
    path = tmp_path_factory.mktemp("siglip")
    torch.manual_seed(0)
    SiglipVisionModel(SiglipVisionConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=42, patch_size=14)).save_pretrained(path)
    (path / "preprocessor_config.json").write_text(json.dumps({"size": {"height": 42, "width": 42}, "resample": 3, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}))
    return path


def picture(w, h, seed=0):
    g = torch.Generator().manual_seed(seed)
    return Image.fromarray(torch.randint(0, 256, (h, w, 3), dtype=torch.uint8, generator=g).numpy())


def test_tiny_is_the_same_every_time_and_disturbs_no_seed():
    torch.manual_seed(3)
    a = encoders.load("tiny")
    drawn = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(1))
    x = torch.stack([a.pixels(picture(90, 60)), a.pixels(picture(60, 90, 1))])
    F = a(x)
    assert F.shape == (2, 64, a.dim) and torch.equal(F, encoders.load("tiny")(x)) and not torch.equal(F[0], F[1])


def test_autocast_changes_nothing():
    """Training in bfloat16 sees what was computed before it in float32."""
    encoder = encoders.load("tiny")
    pixels = torch.rand(1, 3, 112, 112, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        got = encoder(pixels)
    assert got.dtype == torch.float32 and torch.equal(got, encoder(pixels))


def test_patches_stand_in_reading_order():
    """A changed corner of the image moves that corner's patch embedding most; class token and registers are left out."""
    e = encoders.load("tiny")
    plain, other = Image.new("RGB", (112, 112), (90, 90, 90)), Image.new("RGB", (112, 112), (90, 90, 90))
    other.paste((255, 0, 0), (98, 0, 112, 14))  # top right: patch 7 of the first row
    moved = (e(e.pixels(plain)[None]) - e(e.pixels(other)[None]))[0].norm(dim=1)
    assert int(moved.argmax()) == 7


def test_frozen(siglip):
    e = encoders.load(str(siglip)).train()
    assert not e.training and not any(p.requires_grad for p in e.parameters())
    x = e.pixels(picture(50, 40))[None].requires_grad_()
    assert not e(x).requires_grad


def test_a_directory_is_the_stock_model_on_its_own_image_rules(siglip):
    e = encoders.load(str(siglip))
    image = picture(42, 42)  # already of its size: no resampling to differ in
    x = e.pixels(image)
    expected = (torch.tensor(list(image.tobytes())).view(42, 42, 3).permute(2, 0, 1).float() / 255 - 0.5) / 0.5
    assert torch.allclose(x, expected, atol=1e-6)
    with torch.no_grad():
        stock = AutoModel.from_pretrained(siglip).eval()(pixel_values=x[None]).last_hidden_state
    assert e.dim == 16 and torch.equal(e(x[None]), stock) and stock.shape == (1, 9, 16)


def test_resizing_is_close_to_pillows(siglip):
    e = encoders.load(str(siglip))
    smooth = picture(6, 5).resize((90, 70), Image.Resampling.BICUBIC)
    theirs = torch.tensor(list(smooth.resize((42, 42), Image.Resampling.BICUBIC).tobytes())).view(42, 42, 3).permute(2, 0, 1) / 255
    assert (e.pixels(smooth) * 0.5 + 0.5 - theirs).abs().max() < 2.1 / 255


def test_crop_after_the_shorter_side(siglip):
    e = encoders.load(str(siglip))
    e.rules = e.rules | {"size": {"shortest_edge": 48}, "do_center_crop": True, "crop_size": {"height": 42, "width": 42}}
    assert e.pixels(picture(96, 48)).shape == (3, 42, 42)


def test_what_cannot_be_loaded_is_told(siglip, tmp_path, model_dirs):
    with pytest.raises(UserError, match="--encoders .*cannot be loaded"):
        encoders.load(str(tmp_path / "none"))
    with pytest.raises(UserError, match="model type 'qwen2_5_vl' is none of dinov3_vit.*precomputed"):
        encoders.load(str(model_dirs[True]))
    shutil.copytree(siglip, tmp_path / "e")
    weights = tmp_path / "e" / "model.safetensors"
    torch.save(load_file(weights), tmp_path / "e" / "pytorch_model.bin")
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="--encoders .*/e: cannot be loaded"):
        encoders.load(str(tmp_path / "e"))
    weights.unlink()
    with pytest.raises(UserError, match=f"--encoders {tmp_path}/e: cannot be loaded: [^\n]*from safetensors alone: a pickle can run code[^\n]*$"):
        encoders.load(str(tmp_path / "e"))


def test_precomputed_features_equal_the_encoders_own(records_file, siglip, tmp_path, capsys):
    """Written next to the records, several images each, and found again by id."""
    from data_prep import encoder_features
    shutil.copytree(records_file.parent, tmp_path / "d")
    encoder_features.main(["--encoder", str(siglip), "--data", str(tmp_path / "d" / "train.jsonl"), "--name", "sig"])
    assert "features:sig:16" in capsys.readouterr().out
    records, _ = data.read(tmp_path / "d" / "train.sig.jsonl")
    e = encoders.load(str(siglip))
    for r in records:
        found = data.load_features(r, "sig")
        assert sorted(found) == [str(n) for n in range(len(r.images))]
        for n, path in enumerate(r.images):
            assert torch.allclose(found[str(n)], e(e.pixels(data.load_image(path, ""))[None])[0], atol=1e-6)
    for item, problem in (({"sig": "nowhere.safetensors"}, "no such file"), ({"sig": "../x"}, "leaves the image root"), (["sig"], "an object of name: path")):
        line = json.loads((tmp_path / "d" / "train.sig.jsonl").read_text().split("\n")[0])
        (tmp_path / "d" / "bad.jsonl").write_text(json.dumps(line | {"features": item}))
        bad, _ = data.read(tmp_path / "d" / "bad.jsonl")
        assert isinstance(bad[0], data.RecordError) and problem in str(bad[0]) and "field 'features'" in str(bad[0])
    with pytest.raises(data.RecordError, match="no 'dino' in it"):
        data.load_features(records[0], "dino")
    records[0].id = "another"
    with pytest.raises(data.RecordError, match="holds nothing for the id 'another'"):
        data.load_features(records[0], "sig")


def test_features_need_ids(records_file, tmp_path):
    from data_prep import encoder_features
    lines = records_file.read_text().split("\n")
    (records_file.parent / "twice.jsonl").write_text("\n".join(lines[:1] * 2))
    with pytest.raises(data.RecordError, match="twice.jsonl:2: field 'id'"):
        encoder_features.main(["--encoder", "tiny", "--data", str(records_file.parent / "twice.jsonl"), "--name", "t"])
