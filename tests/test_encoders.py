"""Frozen encoders: patches in the right number and order, the checkpoint's own image rules, nothing trains;
precomputed equals at once.
"""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from test_ddp import ROOT, run
from transformers import AutoModel, SiglipVisionConfig, SiglipVisionModel

from crystal.backbone import encoders
from crystal.runtime import data, toy
from crystal.runtime.config import UserError


@pytest.fixture(scope="module")
def siglip(tmp_path_factory):
    """A small random SigLIP as a directory, without registers, bicubic, 3 x 3 patches."""
    path = tmp_path_factory.mktemp("siglip")
    torch.manual_seed(0)
    SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=42,
            patch_size=14,
        )
    ).save_pretrained(path)
    (path / "preprocessor_config.json").write_text(
        json.dumps(
            {
                "size": {"height": 42, "width": 42},
                "resample": 3,
                "image_mean": [0.5] * 3,
                "image_std": [0.5] * 3,
            }
        )
    )
    return path


def picture(w, h, seed=0):
    g = torch.Generator().manual_seed(seed)
    return Image.fromarray(torch.randint(0, 256, (h, w, 3), dtype=torch.uint8, generator=g).numpy())


def test_loading_disturbs_no_seed():
    torch.manual_seed(3)
    a = encoders.load("tiny")
    drawn = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(1))
    x = torch.stack([a.pixels(picture(90, 60)), a.pixels(picture(60, 90, 1))])
    F = a(x)
    assert F.shape == (2, 64, a.dim) and not torch.equal(F[0], F[1])


def test_tiny_tells_apart_what_a_patch_shows():
    """The nearest of the features of one object in seven other places says its shape and colour: of eight
    shapes in eight colours, guessing would be right once in 64.
    """
    e = encoders.load("tiny")
    kinds = [(shape, colour) for shape in toy.SHAPES for colour in toy.COLOURS]

    def features(place):
        x, y = place
        found = []
        for shape, colour in kinds:
            thing = toy.Thing(shape, colour, x, y, 3, 13)
            scene = toy.Scene((thing,), shape, 0.3, 5)
            image = Image.fromarray(toy.render(scene))
            seen = e(e.pixels(image)[None])[0].view(8, 8, -1)
            found.append(seen[y // 14, x // 14])
        return torch.nn.functional.normalize(torch.stack(found), dim=1)

    here, there = features((21, 35)), features((77, 91))
    right = (there @ here.T).argmax(1) == torch.arange(64)
    assert right.float().mean() > 0.5


def test_autocast_changes_nothing():
    """Training in bfloat16 sees what was computed before it in float32."""
    encoder = encoders.load("tiny")
    pixels = torch.rand(1, 3, 112, 112, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        got = encoder(pixels)
    with torch.no_grad():
        stock = encoder.hf(pixel_values=pixels).last_hidden_state[:, encoder.prefix :]
    assert got.dtype == torch.float32 and torch.equal(got, stock) and torch.equal(encoder(pixels), stock)


def test_patches_stand_in_reading_order():
    """A changed corner of the image moves that corner's patch embedding most; class token and
    registers are left out.
    """
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
    expected = (
        torch.tensor(list(image.tobytes())).view(42, 42, 3).permute(2, 0, 1).float() / 255 - 0.5
    ) / 0.5
    assert torch.allclose(x, expected, atol=1e-6)
    with torch.no_grad():
        stock = AutoModel.from_pretrained(siglip).eval()(pixel_values=x[None]).last_hidden_state
    assert e.dim == 16 and torch.equal(e(x[None]), stock) and stock.shape == (1, 9, 16)


def test_resizing_is_close_to_pillows(siglip):
    e = encoders.load(str(siglip))
    smooth = picture(6, 5).resize((90, 70), Image.Resampling.BICUBIC)
    theirs = (
        torch.tensor(list(smooth.resize((42, 42), Image.Resampling.BICUBIC).tobytes()))
        .view(42, 42, 3)
        .permute(2, 0, 1)
        / 255
    )
    assert (e.pixels(smooth) * 0.5 + 0.5 - theirs).abs().max() < 2.1 / 255


def test_crop_after_the_shorter_side(siglip):
    e = encoders.load(str(siglip))
    e.rules = e.rules | {
        "size": {"shortest_edge": 48},
        "do_center_crop": True,
        "crop_size": {"height": 42, "width": 42},
    }
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
    with pytest.raises(
        UserError,
        match=f"--encoders {tmp_path}/e: cannot be loaded: [^\n]*from safetensors alone: a pickle can run "
        "code[^\n]*$",
    ):
        encoders.load(str(tmp_path / "e"))


def test_weights_that_do_not_fit_are_named(siglip, tmp_path):
    """An encoder that stayed random in part would be aligned to without a word; what the other tower of its
    files holds is no mistake.
    """
    whole = load_file(siglip / "model.safetensors")
    lost = next(n for n in whole if n.endswith("layers.1.mlp.fc1.weight"))

    def directory(name, state):
        shutil.copytree(siglip, tmp_path / name)
        save_file(state, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
        return str(tmp_path / name)

    with pytest.raises(
        UserError,
        match="--encoders .*less: cannot be loaded: its weights are not this model's: the files lack "
        f"[^,;]*{lost}$",
    ):
        encoders.load(directory("less", {n: t for n, t in whole.items() if n != lost}))
    pixels = torch.rand(1, 3, 42, 42, generator=torch.Generator().manual_seed(0))
    more = encoders.load(
        directory(
            "more", {f"module.{n}": t for n, t in whole.items()} | {"text_model.head.bias": torch.zeros(3)}
        )
    )
    assert torch.equal(more(pixels), encoders.load(str(siglip))(pixels))


def test_precomputed_features_equal_the_encoders_own(records_file, siglip, tmp_path, capsys):
    """Written next to the records, several images each, and found again by id."""
    from data_prep import encoder_features

    shutil.copytree(records_file.parent, tmp_path / "d")
    encoder_features.main(
        ["--encoder", str(siglip), "--data", str(tmp_path / "d" / "train.jsonl"), "--name", "sig"]
    )
    assert "features:sig:16" in capsys.readouterr().out
    records, _ = data.read(tmp_path / "d" / "train.sig.jsonl")
    e = encoders.load(str(siglip))
    for r in records:
        found = data.load_features(r, "sig")
        assert sorted(found) == [str(n) for n in range(len(r.images))]
        for n, path in enumerate(r.images):
            assert torch.allclose(found[str(n)], e(e.pixels(data.load_image(path, ""))[None])[0], atol=1e-6)
    for item, problem in (
        ({"sig": "nowhere.safetensors"}, "no such file"),
        ({"sig": "../x"}, "leaves the image root"),
        (["sig"], "an object of name: path"),
    ):
        line = json.loads((tmp_path / "d" / "train.sig.jsonl").read_text().split("\n")[0])
        (tmp_path / "d" / "bad.jsonl").write_text(json.dumps(line | {"features": item}))
        bad, _ = data.read(tmp_path / "d" / "bad.jsonl")
        assert (
            isinstance(bad[0], data.RecordError)
            and problem in str(bad[0])
            and "field 'features'" in str(bad[0])
        )
    with pytest.raises(data.RecordError, match="no 'dino' in it"):
        data.load_features(records[0], "dino")
    records[0].id = "another"
    with pytest.raises(data.RecordError, match="holds nothing for the id 'another'"):
        data.load_features(records[0], "sig")


def test_features_need_ids(records_file, tmp_path):
    from data_prep import encoder_features

    lines = records_file.read_text().split("\n")
    (records_file.parent / "twice.jsonl").write_text("\n".join(lines[:1] * 2))
    with pytest.raises(UserError, match="twice.jsonl:2: field 'id'.*--on_bad_record skip"):
        encoder_features.main(
            ["--encoder", "tiny", "--data", str(records_file.parent / "twice.jsonl"), "--name", "t"]
        )
    for flags in (["--device", "cuda:99"], ["--shard", "0"]):
        with pytest.raises(UserError, match=" ".join(flags)):
            encoder_features.main(["--encoder", "tiny", "--data", "x", "--name", "t", *flags])


@pytest.fixture
def many(records_file, tmp_path):
    """features(*flags) -> written records; of five small images in a JSON list, three a file, the fourth is
    cut short. `mend` makes it whole.
    """
    from data_prep import encoder_features

    whole = (records_file.parent / "1_0.png").read_bytes()
    talk = [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "so"}]
    for i in range(5):
        (tmp_path / f"{i}.png").write_bytes(whole if i != 3 else whole[:200])
    (tmp_path / "set.json").write_text(
        json.dumps(
            [{"id": i, "image": f"{i}.png", "conversations": talk, "features": None} for i in range(5)],
            indent=1,
        )
    )

    def features(*flags, encoder="tiny"):
        encoder_features.main(
            [
                "--encoder", encoder, "--data", str(tmp_path / "set.json"), "--name", "t", "--shard", "3",
                "--device", "cpu", *flags,
            ]
        )
        return [json.loads(line) for line in (tmp_path / "set.t.jsonl").read_text().splitlines()]

    features.mend = lambda: (tmp_path / "3.png").write_bytes(whole)
    return features


def test_a_broken_image_is_left_out_and_files_are_made_once(many, siglip, tmp_path, capsys):
    files = [tmp_path / "t" / f"set-0000{i}.safetensors" for i in range(2)]
    with pytest.raises(UserError, match=r"set.json\[3\]: field 'image': .*3.png.*--on_bad_record skip"):
        many()
    assert files[0].is_file() and not files[1].exists() and not (tmp_path / "set.t.jsonl").exists()
    stamp = files[0].stat().st_mtime_ns
    written = many("--on_bad_record", "skip")
    out = capsys.readouterr().out
    assert (
        "2 files, 1 there already" in out
        and "left out: " in out
        and "set.json[3]" in out
        and files[0].stat().st_mtime_ns == stamp
    )
    assert [x["id"] for x in written] == [0, 1, 2, 4] and written[3]["features"] == {
        "t": "t/set-00001.safetensors"
    }
    many("--on_bad_record", "skip")
    out = capsys.readouterr().out
    assert "2 there already" in out and "left out: " in out
    many.mend()
    assert len(many()) == 5 and "1 there already" in capsys.readouterr().out
    many(encoder=str(siglip))  # another encoder under the same name
    assert "0 there already" in capsys.readouterr().out and not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize("run_before", [False, True])
def test_more_broken_images_than_1_percent_stop_it(many, tmp_path, run_before):
    """Those of a run before count too."""
    if run_before:
        many("--on_bad_record", "skip")
        (tmp_path / "t" / "set-00000.safetensors").unlink()
    (tmp_path / ("0.png" if run_before else "4.png")).write_bytes(b"x")
    with pytest.raises(UserError, match="2 broken records, more than 1 % of 5"):
        many("--on_bad_record", "skip")
    assert (tmp_path / "t" / "set-00001.safetensors").exists() == run_before


def test_two_ranks_write_what_one_writes(many, tmp_path):
    many.mend()
    script = str(ROOT / "data_prep" / "encoder_features.py")
    done = run(
        ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script],
        [
            "--encoder", "tiny", "--data", str(tmp_path / "set.json"), "--name", "two", "--shard", "3",
            "--device", "cpu",
        ],
    )
    assert done.count("wrote") == 1
    assert [x | {"features": 0} for x in many()] == [
        json.loads(x) | {"features": 0} for x in (tmp_path / "set.two.jsonl").read_text().splitlines()
    ]
    for name in ("set-00000.safetensors", "set-00001.safetensors"):
        assert (tmp_path / "t" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


# --- image rules by hand ---


def ruled(siglip, **rules):
    e = encoders.load(str(siglip))
    plain = {
        "size": {"height": 42, "width": 42},
        "resample": 2,
        "image_mean": [0.0] * 3,
        "image_std": [1.0] * 3,
    }
    e.rules = plain | rules
    return e


def test_rows_columns_and_channels_keep_their_places(siglip):
    """A picture of 3 x 2 px with a colour of its own at each place, taken as it is.

    Channel, then row, then column.
    """
    image = Image.new("RGB", (3, 2))
    for x in range(3):
        for y in range(2):
            image.putpixel((x, y), (10 * x, 100 * y, 200))
    x = ruled(siglip, size={"height": 2, "width": 3}).pixels(image) * 255
    assert x.shape == (3, 2, 3)
    assert torch.allclose(x[0], torch.tensor([[0.0, 10, 20]] * 2)) and torch.allclose(
        x[2], torch.tensor(200.0)
    )
    assert torch.allclose(x[1], torch.tensor([[0.0] * 3, [100.0] * 3]))
    wide = ruled(siglip, size={"height": 14, "width": 56}).pixels(image)
    assert wide.shape == (3, 14, 56)


def test_each_channel_has_its_own_mean_and_deviation(siglip):
    grey = Image.new("RGB", (42, 42), (51, 102, 204))  # 0.2, 0.4 and 0.8
    x = ruled(siglip, image_mean=[0.1, 0.2, 0.3], image_std=[0.5, 0.25, 0.125]).pixels(grey)
    assert torch.allclose(x.mean((1, 2)), torch.tensor([0.2, 0.8, 4.0]), atol=1e-5)


def test_the_shorter_side_is_scaled_and_the_middle_is_cut_out(siglip):
    """80 x 40 px whose columns count up: shorter side to 20 gives 40 x 20.

    The middle 12 x 10 begins at column 14 and row 5.
    """
    ramp = torch.arange(80).repeat(40, 1)
    image = Image.fromarray(
        torch.stack([ramp, ramp.flip(1), torch.arange(40)[:, None].expand(40, 80)], 2).byte().numpy()
    )
    plain = ruled(siglip, size={"shortest_edge": 20}).pixels(image)
    assert plain.shape == (3, 20, 40)
    cut = ruled(
        siglip, size={"shortest_edge": 20}, do_center_crop=True, crop_size={"height": 10, "width": 12}
    ).pixels(image)
    assert cut.shape == (3, 10, 12) and torch.equal(cut, plain[:, 5:15, 14:26])
    # Averaged over two and more, column c of the scaled picture shows about 2 c + 1/2 of the original's.
    assert (cut[0, 0] * 255 - (2 * torch.arange(14, 26) + 0.5)).abs().max() < 0.1
    whole = ruled(
        siglip, size={"shortest_edge": 20}, do_center_crop=False, crop_size={"height": 10, "width": 12}
    ).pixels(image)
    assert torch.equal(whole, plain)


@pytest.mark.parametrize(
    "number, kind, other",
    [
        (2, Image.Resampling.BILINEAR, Image.Resampling.BICUBIC),
        (3, Image.Resampling.BICUBIC, Image.Resampling.BILINEAR),
    ],
)
def test_resampling_is_the_one_that_is_configured(siglip, number, kind, other):
    """Against Pillow's, to its rounding; the other kind differs by far more."""
    image = picture(90, 70)
    ours = ruled(siglip, resample=number).pixels(image) * 255
    theirs = [
        torch.from_numpy(np.asarray(image.resize((42, 42), how)).copy()).permute(2, 0, 1).float()
        for how in (kind, other)
    ]
    assert (ours - theirs[0]).abs().max() < 3 < 8 < (ours - theirs[1]).abs().max()


def test_class_token_and_registers_are_left_out():
    """DINOv3 has one class token and four registers in front of the patches, DINOv2 the class token alone."""
    e = encoders.load("tiny")
    x = torch.rand(2, 3, 112, 112, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        stock = e.hf(pixel_values=x).last_hidden_state
    registers = e.hf.config.num_register_tokens
    assert stock.shape == (2, 1 + registers + 64, 96) and torch.equal(e(x), stock[:, 1 + registers :])
    from transformers import Dinov2Config, Dinov2Model, DINOv3ViTConfig, DINOv3ViTModel

    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    dino3 = encoders.Encoder(
        "d", DINOv3ViTModel(DINOv3ViTConfig(**sizes, num_register_tokens=4)), e.rules
    )
    assert dino3.prefix == 5 and dino3(torch.rand(1, 3, 28, 28)).shape == (1, 4, 16)

    small = Dinov2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    dino2 = encoders.Encoder("d", Dinov2Model(small), e.rules)
    assert dino2.prefix == 1 and dino2.dim == 16
    assert dino2(torch.rand(1, 3, 28, 28)).shape == (1, 4, 16)


def test_the_shipped_encoder_and_its_rules():
    e = encoders.load("tiny")
    assert (e.dim, e.hf.config.num_hidden_layers, e.hf.config.patch_size, e.hf.config.image_size) == (
        96, 4, 14, 112,
    )
    assert sum(path.stat().st_size for path in encoders.TINY.iterdir()) < 4e6
    rules = {name: e.rules[name] for name in ("size", "resample", "image_mean", "image_std")}
    assert rules == {
        "size": {"height": 112, "width": 112},
        "resample": 2,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
    }
    assert sorted(encoders.KINDS) == ["dinov2", "dinov3_vit", "siglip", "siglip_vision_model"]


def test_rules_that_are_missing_are_named(siglip, tmp_path):
    shutil.copytree(siglip, tmp_path / "e")
    (tmp_path / "e" / "preprocessor_config.json").write_text(
        json.dumps({"size": {"height": 42, "width": 42}})
    )
    with pytest.raises(UserError, match="e: its preprocessor_config.json lacks image_mean, image_std$"):
        encoders.load(str(tmp_path / "e"))
