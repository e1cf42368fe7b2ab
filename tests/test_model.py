"""The model's doors: attention equal to eager, padding and causality right, spare rows, families, wrong directories."""
import json
import logging
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.utils import logging as transformers_logging

import crystal.model
from crystal import config, data
from crystal.config import UserError
from crystal.layout import new_tokens


def stock(directory, dtype, how):
    from transformers import AutoModelForImageTextToText
    return AutoModelForImageTextToText.from_pretrained(directory, dtype=dtype, attn_implementation=how).eval()


def inputs(batch):
    return {n: batch[n] for n in ("input_ids", "pixel_values", "image_grid_thw", "mm_token_type_ids", "attention_mask")}


@pytest.mark.parametrize("tied", [True, False])
def test_logits_equal_the_stock_eager_model(setup, model_dirs, tied):
    """Ragged batch, several images of several sizes: vision in groups and attention by SDPA change nothing."""
    s = setup("--method", "sft", tied=tied)
    for module in s.model.hf.modules():
        if hasattr(module, "lora_B"):
            module.lora_B.data.zero_()
    with torch.no_grad():
        ours = s.model.logits(s.model.hidden(s.batch))
        theirs = stock(model_dirs[tied], torch.float64, "eager")(**inputs(s.batch)).logits
    real = s.batch["attention_mask"].bool()
    assert (ours[real] - theirs[real]).abs().max() < 1e-5  # stock eager attention takes its softmax in float32


def test_no_row_is_blind_under_the_mask_of_a_padded_batch():
    """Rows of left padding see something: what attention makes of a row that sees nothing differs among its kernels, NaN included."""
    padded = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]], dtype=torch.bool)
    mask = crystal.model.attention_mask(batch_size=2, q_length=5, kv_length=5, q_offset=0, kv_offset=0, attention_mask=padded, allow_is_causal_skip=False)
    assert mask[0, 0, 2:].tolist() == (torch.ones(5, 5, dtype=torch.bool).tril() & padded[0])[2:].tolist() and mask.any(-1).all()
    assert torch.equal(mask[1, 0], torch.ones(5, 5, dtype=torch.bool).tril())


def test_left_padding_in_generation(setup, model_dirs):
    """The registered function gets the masks that transformers makes for generation: a padded prompt answers as a lone one."""
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
    assert ids == list(range(size - 64, size - 64 + 7)) and "<|im_end|>" in s.model.tokenizer.all_special_tokens
    rows = s.model.hf.get_input_embeddings().weight[ids]
    assert len({tuple(r.tolist()) for r in rows}) == 7 and 0.2 < rows.norm(dim=1).mean() / s.model.hf.get_input_embeddings().weight[: ids[0]].norm(dim=1).mean() < 2


def test_too_few_spare_rows(model_dirs):
    model = crystal.model.load(str(model_dirs[True]))
    with pytest.raises(UserError, match="use fewer --latents"):
        model.add_tokens(new_tokens(61, "diverse"))


def test_what_trains(setup):
    lora = {n.split(".")[-1] for n, _ in setup().named}
    assert lora == {"lora_A", "lora_B", "rows"}
    full = [n for n, _ in setup("--tune", "full").named]
    assert not any("visual" in n or "embed_tokens" in n or "lm_head" in n for n in full) and any("layers.0.mlp" in n for n in full) and any(n.endswith("rows.rows") for n in full)


def test_the_frozen_vision_tower_has_no_graph(setup):
    for flags, graph in (([], False), (["--lora_on", "language,vision"], True)):
        s = setup(*flags)
        seen = []
        s.model.hf.model.visual.register_forward_hook(lambda m, a, out: seen.append(out.pooler_output.requires_grad))
        s.objective(s.batch, 0.0)
        assert seen == [graph]


def test_every_linear_of_a_part_is_found(setup):
    """The families table against the modules that exist: a part left out would silently not train."""
    s = setup("--lora_on", "language,vision,merger", "--method", "sft")
    wrapped = {n for n, m in s.model.hf.named_modules() if hasattr(m, "lora_A")}
    linear = {n.removesuffix(".base") for n, m in s.model.hf.named_modules() if isinstance(m, torch.nn.Linear)}
    assert linear - wrapped == {"lm_head"}


def test_wrong_models(tmp_path, model_dirs):
    with pytest.raises(UserError, match="no such directory"):
        crystal.model.load(str(tmp_path / "none"))
    with pytest.raises(UserError, match="no config.json"):
        crystal.model.load(str(tmp_path))
    bert = tmp_path / "bert"
    bert.mkdir()
    (bert / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match="model type 'bert' has no row in families.py"):
        crystal.model.load(str(bert))
    cut = tmp_path / "cut"
    shutil.copytree(model_dirs[True], cut)
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot be loaded"):
        crystal.model.load(str(cut))


def with_weights(source, path, change):
    """A copy of a model directory whose tensors {name: tensor} are what `change` makes of the source's."""
    shutil.copytree(source, path)
    save_file(change(load_file(path / "model.safetensors")), path / "model.safetensors", metadata={"format": "pt"})
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


@pytest.mark.parametrize(("change", "told"), [
    (lambda state: {f"other.{n}": t for n, t in state.items()},
     r"the files lack lm_head\.weight, model\.[^,]*, model\.[^,]* and \d+ more; the model has no place for other\.[^;]* and \d+ more"),
    (lambda state: {n: t for n, t in state.items() if n != UP}, f"the files lack {UP}"),
    (lambda state: {n: t for n, t in state.items() if n != "lm_head.weight"}, r"the files lack lm_head\.weight"),
    (lambda state: {n: t for n, t in state.items() if ".visual." not in n}, r"the files lack model\.visual\.[^;]* and \d+ more"),
    (lambda state: state | {UP: state[UP][:-1].clone()}, rf"of another shape are {UP} \[47, 32\], not \[48, 32\]"),
    (lambda state: state | {"score.weight": torch.zeros(1)}, r"the model has no place for score\.weight"),
], ids=["renamed", "a matrix", "the head", "the tower", "a shape", "one too many"])
def test_weights_that_do_not_fit_are_named(tmp_path, model_dirs, logged_by_transformers, change, told):
    """Without this a model whose weights stayed random would train and answer, and end with 0."""
    path = with_weights(model_dirs[False], tmp_path / "model", change)
    with pytest.raises(UserError, match=rf"^{path}: cannot be loaded as a model: its weights are not this model's: {told}$"):
        crystal.model.load(str(path))
    assert not logged_by_transformers  # the one line says it, and a page of its report would hide it


def test_one_line_reaches_the_terminal(tmp_path, model_dirs, capsys):
    from crystal import generate
    path = with_weights(model_dirs[True], tmp_path / "model", lambda state: {n: t for n, t in state.items() if n != PATCHES})
    with pytest.raises(SystemExit) as ended:
        config.run_cli(lambda: generate.main(["--model", str(path), "--image", "any.png", "--question", "What?"]))
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"error: {path}: cannot be loaded as a model: its weights are not this model's: the files lack {PATCHES}\n"


@pytest.mark.parametrize("before", ["module.", "_orig_mod.", "base_model.model.", "module._orig_mod."])
def test_names_that_a_wrapper_left_are_read_as_meant(tmp_path, model_dirs, before):
    path = with_weights(model_dirs[False], tmp_path / "model", lambda state: {before + n: t for n, t in state.items()})
    wanted, found = (crystal.model.load(str(d)).hf.state_dict() for d in (model_dirs[False], path))
    assert wanted.keys() == found.keys() and all(torch.equal(wanted[n], found[n]) for n in wanted)


def test_names_within_a_compiled_part_are_read_as_meant(tmp_path, model_dirs):
    """torch.compile of one layer leaves its mark amid the names, and on those of years ago."""
    def compiled(state):
        state = {n.replace("model.language_model.", "model.").replace("model.visual.", "visual."): t for n, t in state.items()}
        return {n.replace("layers.1.", "layers.1._orig_mod."): t for n, t in state.items()}
    path = with_weights(model_dirs[False], tmp_path / "model", compiled)
    wanted, found = (crystal.model.load(str(d)).hf.state_dict() for d in (model_dirs[False], path))
    assert all(torch.equal(wanted[n], found[n]) for n in wanted)


def test_loading_leaves_the_verbosity_as_it_was(model_dirs):
    before = transformers_logging.get_verbosity()
    crystal.model.load(str(model_dirs[True]))
    assert transformers_logging.get_verbosity() == before != transformers_logging.ERROR


def test_a_tied_head_may_stand_in_the_files(tmp_path, model_dirs):
    def both(state):
        return state | {"lm_head.weight": state["model.language_model.embed_tokens.weight"].clone()}
    model = crystal.model.load(str(with_weights(model_dirs[True], tmp_path / "model", both)))
    assert model.tied


def test_pickled_weights_are_refused(tmp_path, model_dirs):
    pickled = tmp_path / "pickled"
    shutil.copytree(model_dirs[True], pickled)
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    with pytest.raises(UserError, match=f"^{pickled}: cannot be loaded as a model: [^\n]*from safetensors alone: a pickle can run code[^\n]*$"):
        crystal.model.load(str(pickled))


def test_pixel_bounds_reach_the_processor(model_dirs):
    from PIL import Image
    model = crystal.model.load(str(model_dirs[True]), min_pixels=28 * 28, max_pixels=56 * 56)
    grid = model.image_processor(images=[Image.new("RGB", (300, 200))], return_tensors="pt")["image_grid_thw"]
    assert model.image_tokens(grid) == [int(grid.prod()) // 4] and int(grid.prod()) * 14 * 14 <= 56 * 56
    for low, high in ((0, 10), (None, 0), (-3, None), (11, 10)):
        with pytest.raises(UserError, match=f"^--min_pixels {low} --max_pixels {high}: areas in pixels, at least 1, the first not above the second$"):
            crystal.model.load(str(model_dirs[True]), min_pixels=low, max_pixels=high)


def test_layers_of_the_attention_loss_must_exist(setup):
    s = setup("--attn_layers", "7")
    with pytest.raises(UserError, match="the model has 3 layers"):
        s.objective(s.batch, 0.0)


def test_generated_names_of_the_shipped_model():
    model = crystal.model.load("tiny")
    assert model.tied and len(model.tokenizer) + 64 == model.hf.get_input_embeddings().num_embeddings
    assert config.parse([]).model == "tiny"
