"""The model: attention equal to eager, padding and causality right, spare rows, families, wrong directories.
"""

import json
import logging
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

import crystal.backbone.model
from crystal import latent_copy
from crystal.layout import new_tokens
from crystal.runtime import config, data
from crystal.runtime.config import UserError


def stock(directory, dtype, how):
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(directory, dtype=dtype, attn_implementation=how).eval()


def inputs(batch):
    return {
        n: batch[n]
        for n in ("input_ids", "pixel_values", "image_grid_thw", "mm_token_type_ids", "attention_mask")
    }


@pytest.mark.parametrize("tied", [True, False])
def test_logits_equal_the_stock_eager_model(setup, model_dirs, tied):
    """Ragged batch, several images of several sizes: vision in groups and attention by SDPA change nothing.
    """
    s = setup("--method", "sft", tied=tied)
    for module in s.model.hf.modules():
        if hasattr(module, "lora_B"):
            module.lora_B.data.zero_()
    with torch.no_grad():
        ours = s.model.logits(s.model.hidden(s.batch))
        theirs = stock(model_dirs[tied], torch.float64, "eager")(**inputs(s.batch)).logits
    real = s.batch["attention_mask"].bool()
    # Stock eager attention takes its softmax in float32.
    assert (ours[real] - theirs[real]).abs().max() < 1e-5


def test_left_padding_in_generation(setup, model_dirs):
    """The registered function gets the masks that transformers makes for generation: a padded prompt answers
    as a lone one.
    """
    from crystal.generate import generate

    s = setup("--method", "sft", dtype=torch.float32)
    s.model.eval()
    prompts = []
    for record in s.records:
        e = s.examples.pixels([data.load_image(p, "") for p in record.images])
        ids, _, _ = s.fmt.question(record.turns, s.model.image_tokens(e["image_grid_thw"]))
        prompts.append((ids, e["pixel_values"], e["image_grid_thw"]))
    together = generate(s.model, prompts, s.fmt, 6)
    assert together == [generate(s.model, [p], s.fmt, 6)[0] for p in prompts]


def test_new_tokens_take_spare_rows(setup, model_dirs):
    s = setup(tied=False)
    size = json.loads((model_dirs[False] / "config.json").read_text())["text_config"]["vocab_size"]
    assert s.model.hf.get_input_embeddings().num_embeddings == size == s.model.hf.lm_head.out_features
    ids = s.model.tokenizer.convert_tokens_to_ids(new_tokens(3, "diverse"))
    assert ids == list(range(size - 64, size - 64 + 7))
    before = AutoTokenizer.from_pretrained(model_dirs[False]).all_special_tokens
    assert {"<|im_end|>", "<|image_pad|>"} < set(before) <= set(s.model.tokenizer.all_special_tokens)
    rows = s.model.hf.get_input_embeddings().weight[ids]
    assert (
        len({tuple(r.tolist()) for r in rows}) == 7
        and 0.2
        < rows.norm(dim=1).mean() / s.model.hf.get_input_embeddings().weight[: ids[0]].norm(dim=1).mean()
        < 2
    )


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("weights", [True, False])
def test_a_vocabulary_without_spare_rows_is_enlarged(model_dirs, tied, weights):
    """67 new tokens, 64 spare rows: three more, at the input and the output; no other row moves."""
    model = crystal.backbone.model.load(str(model_dirs[tied]), weights=weights)
    embed, head = model.hf.get_input_embeddings(), model.hf.lm_head
    before = [embed.weight.clone(), head.weight.clone()]
    rows = len(embed.weight)
    ids = model.add_tokens(new_tokens(63, "diverse"))
    assert ids == list(range(rows - 64, rows + 3)) and model.tied == tied
    assert embed.num_embeddings == head.out_features == rows + 3
    assert model.hf.config.get_text_config().vocab_size == rows + 3
    assert (embed.weight is head.weight) == tied and not embed.weight.requires_grad
    for weight, old in zip((embed.weight, head.weight), before):
        assert weight.shape == (rows + 3, 32)
        if weights:
            assert torch.equal(weight[: rows - 64], old[: rows - 64]) and weight[rows:].std(0).min() > 0


def test_what_trains(setup):
    lora = {n.split(".")[-1] for n, _ in setup().named}
    assert lora == {"lora_A", "lora_B", "embedding"}
    full = [n for n, _ in setup("--tune", "full").named]
    assert (
        not any("visual" in n or "embed_tokens" in n or "lm_head" in n for n in full)
        and any("layers.0.mlp" in n for n in full)
        and any(n.endswith("new_tokens.embedding") for n in full)
    )


def test_the_frozen_vision_tower_has_no_graph(setup):
    for flags, graph in (([], False), (["--lora_on", "language,vision"], True)):
        s = setup(*flags)
        seen = []
        s.model.hf.model.visual.register_forward_hook(
            lambda m, a, out: seen.append(out.pooler_output.requires_grad)
        )
        s.objective(s.batch, 0.0)
        assert seen == [graph]


def test_every_linear_of_a_part_is_found(setup):
    """The families table against the modules that exist: a part left out would silently not train."""
    s = setup("--lora_on", "language,vision,merger", "--method", "sft")
    wrapped = {n for n, m in s.model.hf.named_modules() if hasattr(m, "lora_A")}
    linear = {
        n.removesuffix(".base") for n, m in s.model.hf.named_modules() if isinstance(m, torch.nn.Linear)
    }
    assert linear - wrapped == {"lm_head"}


def test_wrong_models(tmp_path, model_dirs):
    with pytest.raises(UserError, match="no such directory"):
        crystal.backbone.model.load(str(tmp_path / "none"))
    with pytest.raises(UserError, match="no config.json"):
        crystal.backbone.model.load(str(tmp_path))
    bert = tmp_path / "bert"
    bert.mkdir()
    (bert / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match="model type 'bert' has no row in families.py"):
        crystal.backbone.model.load(str(bert))
    cut = tmp_path / "cut"
    shutil.copytree(model_dirs[True], cut)
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(UserError, match="model.safetensors: not a whole safetensors file"):
        crystal.backbone.model.load(str(cut))


def with_weights(source, path, change):
    """A copy of a model directory whose tensors {name: tensor} are what `change` makes of the source's."""
    shutil.copytree(source, path)
    save_file(
        change(load_file(path / "model.safetensors")), path / "model.safetensors", metadata={"format": "pt"}
    )
    return path


@pytest.fixture
def logged_by_transformers():
    """What transformers' loggers let through, as a list that grows."""
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    yield records
    logger.removeHandler(handler)


UP = "model.language_model.layers.1.mlp.up_proj.weight"
PATCHES = "model.visual.patch_embed.proj.weight"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            lambda state: {f"other.{n}": t for n, t in state.items()},
            r"the files lack lm_head\.weight, model\.[^,]*, model\.[^,]* and \d+ more; the model has no place for other\.[^;]* and \d+ more",  # noqa: E501
        ),
        (lambda state: {n: t for n, t in state.items() if n != UP}, f"the files lack {UP}"),
        (
            lambda state: {n: t for n, t in state.items() if n != "lm_head.weight"},
            r"the files lack lm_head\.weight",
        ),
        (
            lambda state: {n: t for n, t in state.items() if ".visual." not in n},
            r"the files lack model\.visual\.[^;]* and \d+ more",
        ),
        (
            lambda state: state | {UP: state[UP][:-1].clone()},
            rf"of another shape are {UP} \[47, 32\], not \[48, 32\]",
        ),
        (
            lambda state: state | {"model.language_model.layers.3.mlp.up_proj.weight": torch.zeros(1)},
            r"the model has no place for model\.language_model\.layers\.3\.mlp\.up_proj\.weight",
        ),
        (
            lambda state: state | {f"{UP}_scale_inv": torch.zeros(1)},
            rf"the model has no place for {UP}_scale_inv",
        ),
        (lambda state: state | {"lm_head.bias": torch.zeros(1)}, r"the model has no place for lm_head\.bias"),
    ],
    ids=["renamed", "a matrix", "the head", "the tower", "a shape", "a layer too many", "a scale", "a bias"],
)
def test_weights_that_do_not_fit_are_named(tmp_path, model_dirs, logged_by_transformers, change, told):
    """Without this a model whose weights stayed random would train and answer, and end with 0."""
    path = with_weights(model_dirs[False], tmp_path / "model", change)
    with pytest.raises(
        UserError, match=rf"^{path}: cannot be loaded as a model: its weights are not this model's: {told}$"
    ):
        crystal.backbone.model.load(str(path))
    assert not logged_by_transformers  # the one line says it, and a page of its report would hide it


def test_parts_that_the_model_does_not_have_are_told_and_left_out(tmp_path, model_dirs, capsys):
    """A reward head and an audio tower beside all that the model needs: one line, and the same model."""
    more = dict.fromkeys(("score.weight", "model.audio_tower.a", "audio_tower.b"), torch.ones(1))
    more = {name: tensor.clone() for name, tensor in more.items()}
    path = with_weights(model_dirs[False], tmp_path / "model", lambda state: state | more)
    found = crystal.backbone.model.load(str(path)).hf.state_dict()
    said = "3 tensors of parts that the model does not have are left out: audio_tower, score"
    assert capsys.readouterr().err == f"note: {path}: {said}\n"
    wanted = crystal.backbone.model.load(str(model_dirs[False])).hf.state_dict()
    assert wanted.keys() == found.keys() and all(torch.equal(wanted[n], found[n]) for n in wanted)


def test_one_line_reaches_the_terminal(tmp_path, model_dirs, capsys):
    from crystal import generate

    path = with_weights(
        model_dirs[True], tmp_path / "model", lambda state: {n: t for n, t in state.items() if n != PATCHES}
    )
    with pytest.raises(SystemExit) as ended:
        config.run_cli(
            lambda: generate.main(["--model", str(path), "--image", "any.png", "--question", "What?"])
        )
    assert ended.value.code == 2
    assert (
        capsys.readouterr().err
        == f"error: {path}: cannot be loaded as a model: its weights are not this model's: the files lack {PATCHES}\n"  # noqa: E501
    )


@pytest.mark.parametrize("before", ["module.", "_orig_mod.", "base_model.model.", "module._orig_mod."])
def test_names_that_a_wrapper_left_are_read_as_meant(tmp_path, model_dirs, before):
    path = with_weights(
        model_dirs[False], tmp_path / "model", lambda state: {before + n: t for n, t in state.items()}
    )
    wanted, found = (crystal.backbone.model.load(str(d)).hf.state_dict() for d in (model_dirs[False], path))
    assert wanted.keys() == found.keys() and all(torch.equal(wanted[n], found[n]) for n in wanted)


def test_names_within_a_compiled_part_are_read_as_meant(tmp_path, model_dirs):
    """torch.compile of one layer leaves its mark amid the names, and on those of years ago."""

    def compiled(state):
        state = {
            n.replace("model.language_model.", "model.").replace("model.visual.", "visual."): t
            for n, t in state.items()
        }
        return {n.replace("layers.1.", "layers.1._orig_mod."): t for n, t in state.items()}

    path = with_weights(model_dirs[False], tmp_path / "model", compiled)
    wanted, found = (crystal.backbone.model.load(str(d)).hf.state_dict() for d in (model_dirs[False], path))
    assert all(torch.equal(wanted[n], found[n]) for n in wanted)


def test_loading_leaves_the_verbosity_as_it_was(model_dirs):
    before = transformers_logging.get_verbosity()
    crystal.backbone.model.load(str(model_dirs[True]))
    assert transformers_logging.get_verbosity() == before != transformers_logging.ERROR


def test_a_tied_head_may_stand_in_the_files(tmp_path, model_dirs):
    def both(state):
        return state | {"lm_head.weight": state["model.language_model.embed_tokens.weight"].clone()}

    model = crystal.backbone.model.load(str(with_weights(model_dirs[True], tmp_path / "model", both)))
    assert model.tied


def test_pickled_weights_are_refused(tmp_path, model_dirs):
    pickled = tmp_path / "pickled"
    shutil.copytree(model_dirs[True], pickled)
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    with pytest.raises(
        UserError,
        match=f"^{pickled}: cannot be loaded as a model: [^\n]*from safetensors alone: a pickle can run "
        "code[^\n]*$",
    ):
        crystal.backbone.model.load(str(pickled))


def test_pixel_bounds_reach_the_processor(model_dirs):
    from PIL import Image

    model = crystal.backbone.model.load(str(model_dirs[True]), min_pixels=28 * 28, max_pixels=56 * 56)
    grid = model.image_processor(images=[Image.new("RGB", (300, 200))], return_tensors="pt")["image_grid_thw"]
    assert model.image_tokens(grid) == [int(grid.prod()) // 4] and int(grid.prod()) * 14 * 14 <= 56 * 56
    # An image below the least area is brought to it, and not to the largest.
    model = crystal.backbone.model.load(str(model_dirs[True]), min_pixels=112 * 112, max_pixels=140 * 140)
    grid = model.image_processor(images=[Image.new("RGB", (56, 56))], return_tensors="pt")["image_grid_thw"]
    assert int(grid.prod()) * 14 * 14 == 112 * 112
    for low, high in ((0, 10), (None, 0), (-3, None), (11, 10)):
        with pytest.raises(
            UserError,
            match=f"^--min_pixels {low} --max_pixels {high}: areas in pixels, at least 1, the first not "
            "above the second$",
        ):
            crystal.backbone.model.load(str(model_dirs[True]), min_pixels=low, max_pixels=high)


def test_layers_of_the_attention_loss_must_exist(setup):
    s = setup("--attn_layers", "7")
    with pytest.raises(UserError, match="the model has 3 layers"):
        s.objective(s.batch, 0.0)


def test_generated_names_of_the_shipped_model():
    model = crystal.backbone.model.load("tiny")
    assert model.tied and len(model.tokenizer) + 64 == model.hf.get_input_embeddings().num_embeddings
    assert config.parse([]).model == "tiny"


# --- the doors, one at a time: what goes in is drawn here, what comes out is computed by hand ---


def test_states_are_copied_however_a_layer_is_called():
    """transformers gives a layer its states by place or by name; everything else goes through as it came."""

    class Copy:
        def states(self, h):
            return h * 10

    h, copy = torch.ones(2), Copy()
    assert latent_copy.copy_states(None, (h, "mask"), {"latent_copy": None}) is None
    args, kwargs = latent_copy.copy_states(None, (h, "mask"), {"latent_copy": copy, "x": 1})
    assert torch.equal(args[0], 10 * h) and args[1:] == ("mask",) and kwargs == {"latent_copy": copy, "x": 1}
    args, kwargs = latent_copy.copy_states(None, (), {"hidden_states": h, "latent_copy": copy, "x": 1})
    assert (
        args == ()
        and torch.equal(kwargs["hidden_states"], 10 * h)
        and kwargs["x"] == 1
        and kwargs["latent_copy"] is copy
    )


def test_every_layer_copies_its_own_input(setup):
    """Through the model.

    With a copy that adds a constant before each layer, a model whose layers do nothing gives three of it.
    """
    s = setup("--method", "sft", "--tune", "full", which=[0])
    for layer in s.model.layers:
        layer.self_attn.o_proj.weight.data.zero_()
        layer.mlp.down_proj.weight.data.zero_()
    got = []
    s.model.hf.model.language_model.norm.register_forward_pre_hook(lambda _, args: got.append(args[0]))

    class Copy:
        def states(self, h):
            return h + 2

        def keys_values(self, k, v):
            return k, v

    with torch.no_grad():
        s.model.hidden(s.batch)
        s.model.hidden(s.batch, latent_copy=Copy())
    assert torch.allclose(got[1], got[0] + 6)


def test_a_hook_that_comes_after_compilation(setup, monkeypatch):
    """Interventions hook themselves before layers that have been compiled and called: they act there too."""
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **how: compiler(f, backend="eager", **how))
    torch._dynamo.reset()

    def silence(layer, args):
        return args[0] * 0, *args[1:]

    found = []
    for flags in ([], ["--compile"]):
        s = setup("--method", "sft", *flags, which=[0])
        with torch.no_grad():
            plain = s.model.hidden(s.batch)
            hooks = [layer.register_forward_pre_hook(silence) for layer in s.model.layers]
            silenced = s.model.hidden(s.batch)
            for hook in hooks:
                hook.remove()
            assert torch.equal(s.model.hidden(s.batch), plain)
        found.append((plain, silenced))
    (plain, silenced), (compiled, compiled_silenced) = found
    torch.testing.assert_close(compiled, plain)
    torch.testing.assert_close(compiled_silenced, silenced)
    assert (plain - silenced).abs().max() > 0.1


def test_positions_are_m_rope_by_hand(setup):
    """Text counts on; an image's tokens have one time, and rows and columns of their own; what follows
    begins behind the largest.

    The third record has two images, of 4 x 3 and 3 x 2 tokens.
    """
    s = setup("--method", "sft")
    found = s.model.positions(s.batch)
    names = [s.model.tokenizer.convert_ids_to_tokens(row.tolist()) for row in s.batch["input_ids"]]
    grids = {0: [(3, 4)], 1: [(2, 2)], 2: [(4, 3), (3, 2)]}
    for b, row in enumerate(names):
        expected, t, following, images = [], 0, 0, iter(grids[b])
        length = int(s.batch["attention_mask"][b].sum())
        while t < length:
            if row[t] != "<|image_pad|>":
                expected.append((following,) * 3)
                following, t = following + 1, t + 1
                continue
            rows, columns = next(images)
            expected += [
                (following, following + y, following + x) for y in range(rows) for x in range(columns)
            ]
            following, t = following + max(rows, columns), t + rows * columns
        assert found[:, b, :length].T.tolist() == [list(p) for p in expected], b


def test_positions_that_are_given_are_used(setup):
    """`packed` brings its own; the states depend on them."""
    s = setup("--method", "sft", which=[0])
    own = s.model.positions(s.batch)
    with torch.no_grad():
        plain = s.model.hidden(s.batch)
        assert torch.equal(plain, s.model.hidden(s.batch | {"position_ids": own}))
        stretched = s.model.hidden(s.batch | {"position_ids": own * 3})
    assert not torch.allclose(plain, stretched, atol=1e-3)


def test_what_a_cached_forward_sees_grows_with_what_was_written(setup):
    """A prompt of three under a mask of its own, then a row, then two rows.

    Those see of the prompt what its last row saw.
    """
    model = setup("--method", "sft", which=[0]).model
    inf, given = float("-inf"), []
    prompt = torch.tensor([[[[0.0, inf, inf], [0.0, -1.5, inf], [inf, -0.5, 0.0]]]])
    decoder = model.hf.model.language_model

    class Stop(Exception):
        pass

    def look(module, args, kwargs):
        given.append(kwargs["attention_mask"])
        raise Stop

    def forward(n):
        with pytest.raises(Stop):
            decoder(inputs_embeds=torch.zeros(1, n, 32), attention_mask="transformers' own")

    with model.seeing(prompt):
        hook = decoder.register_forward_pre_hook(look, with_kwargs=True)  # behind the one of `seeing`
        for n in (3, 1, 2):
            forward(n)
    forward(1)
    hook.remove()
    last = [inf, -0.5, 0.0]
    assert torch.equal(given[0], prompt)
    assert given[1].tolist() == [[[last + [0.0]]]]
    assert given[2].tolist() == [[[last + [0.0, 0.0, inf], last + [0.0, 0.0, 0.0]]]]
    assert given[3] == "transformers' own"  # outside nothing is replaced


# --- loading ---


def test_what_a_model_may_be_named(tmp_path, monkeypatch, model_dirs):
    """tiny, a directory, or owner/name of a hub; what can only be a mistyped path is told and asks no hub."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner").mkdir()
    (tmp_path / "file").write_text("")
    assert (
        crystal.backbone.model.resolve("tiny") == str(crystal.backbone.model.TINY)
        and (crystal.backbone.model.TINY / "config.json").is_file()
    )
    assert crystal.backbone.model.resolve(str(model_dirs[True])) == str(model_dirs[True])
    assert crystal.backbone.model.resolve("Qwen/Qwen2.5-VL-7B-Instruct") == "Qwen/Qwen2.5-VL-7B-Instruct"
    assert crystal.backbone.model.resolve("gpt2") == "gpt2"
    for name in ("./gone", "/gone", "~/gone", "runs/gone", "a/b/c", "owner/gone", "file"):
        with pytest.raises(
            UserError, match="no such directory; --model wants tiny, a directory .*, or a hub name"
        ):
            crystal.backbone.model.resolve(name)
    with pytest.raises(UserError, match="owner: no config.json"):
        crystal.backbone.model.resolve("owner")
    assert crystal.backbone.model.directory(str(model_dirs[True])) == model_dirs[True]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_loaded_model_is_frozen_in_evaluation_mode_and_of_its_dtype(model_dirs, dtype):
    from safetensors.torch import load_file

    model = crystal.backbone.model.load(str(model_dirs[False]), dtype)
    stored = load_file(model_dirs[False] / "model.safetensors")
    assert not any(p.requires_grad for p in model.parameters()) and not any(
        m.training for m in model.hf.modules()
    )
    assert (
        {p.dtype for p in model.parameters()} == {dtype}
        and model.device == torch.device("cpu")
        and not model.tied
    )
    held = dict(model.hf.named_parameters())
    assert held.keys() == stored.keys() and all(torch.equal(held[n], x.to(dtype)) for n, x in stored.items())
    kinds = (
        model.hf.config.text_config._attn_implementation,
        model.hf.config.vision_config._attn_implementation,
    )
    assert kinds == ("crystal", "crystal_flash_vision") and model.new_tokens is None


def test_shapes_alone_hold_no_values(model_dirs):
    model = crystal.backbone.model.load(str(model_dirs[True]), weights=False)
    whole = crystal.backbone.model.load(str(model_dirs[True]))
    assert {p.device.type for p in model.parameters()} == {"meta"}
    shapes = [{n: p.shape for n, p in m.hf.named_parameters()} for m in (model, whole)]
    assert shapes[0] == shapes[1] and model.tied == whole.tied


def test_names_of_older_checkpoints_find_their_parameters(model_dirs):
    """Typed out.

    Qwen2.5-VL's first files have `visual.` and `model.` where the model now has both below `model.`.
    """
    model = crystal.backbone.model.load(str(model_dirs[False]), weights=False)
    names = {
        "visual.blocks.1.attn.qkv.weight": "model.visual.blocks.1.attn.qkv.weight",
        "model.layers.2.mlp.up_proj.weight": "model.language_model.layers.2.mlp.up_proj.weight",
        "model.embed_tokens.weight": "model.language_model.embed_tokens.weight",
        "lm_head.weight": "lm_head.weight",
        "model.language_model.norm.weight": "model.language_model.norm.weight",
    }
    assert crystal.backbone.model.parameter_names(model.hf, list(names)) == names
    assert set(names.values()) <= {n for n, _ in model.hf.named_parameters()}


def test_as_many_new_tokens_as_there_are_spare_rows(model_dirs):
    """The test models leave 64 rows: four tags and 60 latents fit; with one more there is one row more."""
    model = crystal.backbone.model.load(str(model_dirs[True]))
    rows = model.hf.get_input_embeddings().num_embeddings
    assert model.add_tokens(new_tokens(60, "diverse")) == list(range(rows - 64, rows))
    model = crystal.backbone.model.load(str(model_dirs[True]))
    assert model.hf.get_input_embeddings().num_embeddings == rows
    assert max(model.add_tokens(new_tokens(61, "diverse"))) == rows
    assert model.hf.get_input_embeddings().num_embeddings == rows + 1


# A picture of 100 x 200 px, sides in multiples of 28. It shrinks by sqrt(20000 / 4704) = 2.06 to 48.5 x 97,
# rounded down; is large enough, 100 x 200 rounded to the nearest; or grows by sqrt(30000 / 20000) = 1.22 to
# 122.5 x 244.9, rounded up.
@pytest.mark.parametrize(
    "bounds, grid",
    [
        ({"max_pixels": 56 * 84}, [1, 2, 6]),
        ({"min_pixels": 12000, "max_pixels": 10**6}, [1, 8, 14]),
        ({"min_pixels": 30000, "max_pixels": 10**6}, [1, 10, 18]),
    ],
)
def test_pixel_bounds_by_hand(model_dirs, bounds, grid):
    from PIL import Image

    model = crystal.backbone.model.load(str(model_dirs[True]), **bounds)
    made = model.image_processor(images=[Image.new("RGB", (200, 100))], return_tensors="pt")
    assert made["image_grid_thw"].tolist() == [grid]
    assert model.image_tokens(made["image_grid_thw"]) == [grid[1] * grid[2] // 4]


def test_token_rows_train_whatever_was_frozen_before_them(setup):
    """With every weight of the language model training, the vocabulary's own matrices do not, tied or not."""
    for tied in (True, False):
        s = setup("--tune", "full", tied=tied)
        embed, head = s.model.hf.get_input_embeddings().weight, s.model.hf.lm_head.weight
        assert not embed.requires_grad and not head.requires_grad
        trains = {n for n, _ in s.model.trainable()}
        assert ("new_tokens.embedding" in trains) and ("new_tokens.head" in trains) != tied
        rows = s.model.new_tokens
        with torch.no_grad():
            for _, P in rows.pairs():
                P.add_(1)
        s.model.after_update()
        assert torch.equal(embed[rows.ids], rows.embedding)
