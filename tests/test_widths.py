"""The widths of a benchmark's model are the published ones."""

import pytest
import torch

from crystal.backbone import widths


def test_real_widths_are_the_published_ones(monkeypatch):
    """Qwen2.5-VL-7B's and 3B's config.json; --layers and --vision_layers, else two of each on a CPU."""
    made = {}

    def stop(config):
        made[len(made)] = config
        raise KeyError("enough")

    monkeypatch.setattr(widths.AutoModelForImageTextToText, "from_config", stop)
    for name, layers, vision_layers in (("7b", 0, 0), ("3b", 5, 9)):  # --layers 5 --vision_layers 9
        with pytest.raises(KeyError):
            widths.build(name, layers, vision_layers, torch.device("cpu"), torch.float32)
    of = lambda config: (
        config.hidden_size, config.intermediate_size, config.num_attention_heads, config.num_key_value_heads,
        config.vocab_size, config.num_hidden_layers,
    )  # fmt: skip
    assert of(made[0].text_config) == (3584, 18944, 28, 4, 152064, 2)
    assert of(made[1].text_config) == (2048, 11008, 16, 2, 151936, 5)
    vision = made[1].vision_config
    assert (vision.hidden_size, vision.intermediate_size) == (1280, 3420)
    assert (vision.num_heads, vision.depth) == (16, 9)
    assert vision.out_hidden_size == 2048 and vision.fullatt_block_indexes == [7]
    assert not made[0].text_config.tie_word_embeddings and made[1].text_config.tie_word_embeddings
    assert [widths.TEXT[name]["num_hidden_layers"] for name in ("7b", "3b")] == [28, 36]
    assert torch.get_default_dtype() == torch.float32
