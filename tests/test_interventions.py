"""Interventions that touch the latents and nothing else, and a bottleneck without a leak."""

from types import SimpleNamespace

import torch

from crystal.attention_bias import AttentionBias, additive_mask
from crystal.evaluation import interventions
from crystal.evaluation.interventions import asked, hidden_image, questions, recorded, replaced
from crystal.generate import generate


def ask(s, which=(0, 1, 2), latents="keep"):
    examples = questions(s.model, s.fmt, s.records, latents)
    return asked(s.model.eval(), [examples.build(i, 0) for i in which])


@torch.no_grad()
def logits(s, a, pixels=None):
    """Logits [B,L,V] of left-padded prompts, as generation's first forward computes them."""
    B, L = a.mask.shape
    ids = torch.tensor([[s.model.tokenizer.pad_token_id] * (L - len(p[0])) + p[0] for p in a.prompts])
    x = torch.cat([p[1] for p in a.prompts]).double() if pixels is None else pixels
    grid = torch.cat([p[2] for p in a.prompts])
    return s.model.hf(
        input_ids=ids,
        attention_mask=a.mask,
        mm_token_type_ids=(ids == s.fmt.image).int(),
        pixel_values=x,
        image_grid_thw=grid,
        use_cache=False,
    ).logits


@torch.no_grad()
def states_of(s, a):
    with recorded(s.model, a.where) as states:
        logits(s, a)
    return states


# --- states ---


def test_positions_are_the_latents_and_the_image(setup):
    s = setup()
    a = ask(s)
    for b, (ids, _, _) in enumerate(a.prompts):
        left = a.mask.shape[1] - len(ids)
        assert [ids[i - left] for i in a.where[b].tolist()] == s.fmt.latents
        names = s.model.tokenizer.convert_ids_to_tokens(
            [ids[i - left] for i in a.image[b].nonzero()[:, 0].tolist()]
        )
        assert set(names) == {"<|vision_start|>", "<|image_pad|>", "<|vision_end|>"} and len(
            names
        ) == ids.count(s.fmt.image) + 2 * len(a.prompts[b][2])


def test_own_states_change_nothing_to_the_bit(setup):
    s = setup()
    a = ask(s)
    before, states = logits(s, a), states_of(s, a)
    assert len(states) == len(s.model.layers) and states[0].shape == (3, 3, 32)
    with replaced(s.model, a.where, states):
        assert torch.equal(logits(s, a), before)
    assert torch.equal(logits(s, a), before)  # and the hooks are gone


def test_other_states_change_the_rows_after_the_latents_alone(setup):
    s = setup()
    a, before = ask(s), None
    before, states = logits(s, a), states_of(s, a)
    with replaced(s.model, a.where, [x.roll(1, 0) for x in states]):
        after = logits(s, a)
    for b in range(3):
        first, last = int(a.where[b, 0]), int(a.where[b, -1])
        assert torch.equal(after[b, :first], before[b, :first])
        assert ((after[b, last + 1 :] - before[b, last + 1 :]).abs().amax(-1) > 1e-6).all()


def test_padding_does_not_matter(setup):
    """A prompt's donor gives the same in a batch of three lengths as alone."""
    s = setup()
    together, states = ask(s), states_of(s, ask(s))
    with replaced(s.model, together.where, [x.roll(1, 0) for x in states]):
        batched = logits(s, together)
    for b in range(3):
        alone, donor = ask(s, [b]), states_of(s, ask(s, [(b - 1) % 3]))
        with replaced(s.model, alone.where, donor):
            single = logits(s, alone)
        n = single.shape[1]
        assert torch.allclose(batched[b, -n:], single[0], atol=1e-5)  # stock norms compute in float32


def test_generation_goes_on_from_replaced_states(setup):
    """With the cache: the latents' keys are the replaced ones for every decoded token."""
    s = setup(which=[0])
    a = ask(s, [0])
    other = [
        x + torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=x.dtype)
        for x in states_of(s, a)
    ]
    with replaced(s.model, a.where, other):
        (said,) = generate_ids(s, a, 4)
    ids, expected = list(a.prompts[0][0]), []
    for _ in range(4):  # without a cache, each time from the start
        grown = SimpleNamespace(
            prompts=[(ids, *a.prompts[0][1:])], mask=torch.ones(1, len(ids), dtype=torch.long)
        )
        with replaced(s.model, a.where, other):
            expected.append(int(logits(s, grown)[0, -1].argmax()))
        ids = ids + [expected[-1]]
    assert said == expected and [said] != generate_ids(s, a, 4)


def generate_ids(s, a, n, biases=None):
    kept = []
    old, s.model.tokenizer.decode = s.model.tokenizer.decode, lambda ids, **_: kept.append(list(ids)) or ""
    close, s.fmt.answer_end_id, end, s.fmt.end = s.fmt.answer_end_id, -1, s.fmt.end, -1  # nothing ends it
    try:
        generate(s.model, a.prompts, s.fmt, n, biases)
    finally:
        s.model.tokenizer.decode, s.fmt.answer_end_id, s.fmt.end = old, close, end
    return kept


# --- the bottleneck ---


def hidden(s, a):
    """A context in which one forward of the prompts is blind to the image as `generate` makes it."""
    return s.model.seeing(additive_mask(hidden_image(a)(None), a.mask))


def test_the_bottleneck_blocks_exactly(setup):
    """With the latents' states held, other pixels change nothing after the image to the bit; without
    the mask they do.
    """
    s = setup()
    a = ask(s)
    states = states_of(s, a)
    pixels = torch.cat([p[1] for p in a.prompts]).double()
    later = ~a.image & ~a.latents & (a.mask == 1)
    shown = {}
    for name, x in (("these", pixels), ("others", pixels.flip(0))):
        with replaced(s.model, a.where, states), hidden(s, a):
            shown[name] = logits(s, a, x)[later]
        with replaced(s.model, a.where, states):
            shown[name, "open"] = logits(s, a, x)[later]
    assert torch.equal(shown["these"], shown["others"]) and not torch.equal(
        shown["these", "open"], shown["others", "open"]
    )
    with hidden(s, a):  # the latents themselves see the image
        these = logits(s, a)[later]
    with hidden(s, a):
        assert not torch.equal(these, logits(s, a, pixels.flip(0))[later])


def test_the_bottleneck_while_decoding_is_the_one_of_training(setup):
    """Cached decoding says what a forward of the whole sequence with attention_bias.AttentionBias says."""
    s = setup()
    a = ask(s)
    batched = generate_ids(s, a, 4, hidden_image(a))  # left-padded
    for i in range(3):
        a = ask(s, [i])
        ids, expected = list(a.prompts[0][0]), []
        for _ in range(4):
            x = torch.tensor([ids])
            grow = lambda mask: torch.cat(
                [mask, torch.zeros(1, len(ids) - mask.shape[1], dtype=torch.bool)], 1
            )
            inputs = {
                "input_ids": x,
                "attention_mask": torch.ones_like(x),
                "mm_token_type_ids": (x == s.fmt.image).long(),
                "pixel_values": a.prompts[0][1].double(),
                "image_grid_thw": a.prompts[0][2],
            }
            with torch.no_grad():
                h = s.model.hidden(
                    inputs, biases=[AttentionBias(~grow(a.image) & ~grow(a.latents), grow(a.image))]
                )
                expected.append(int(s.model.logits(h[:, -1]).argmax()))
            ids.append(expected[-1])
        assert batched[i] == expected


def test_images_that_were_seen_are_not_encoded_again(setup, monkeypatch):
    """Equal to the bit; other pixels are others, and behind the `with` everything is as before."""
    s = setup("--method", "sft", which=[0])
    real, seen = s.model.hf.model.visual.forward, []
    monkeypatch.setattr(s.model.hf.model.visual, "forward", lambda *a, **k: seen.append(1) or real(*a, **k))
    other = s.batch | {"pixel_values": s.batch["pixel_values"] + 1}
    with torch.no_grad():
        wanted = [s.model.hidden(batch) for batch in (s.batch, other)]
        seen.clear()
        with interventions.images_seen_once(s.model) as kept:
            found = [s.model.hidden(batch) for batch in (s.batch, other, s.batch, other)]
            assert len(seen) == 2 and all(torch.equal(x, y) for x, y in zip(found, wanted * 2))
            kept.clear()
            s.model.hidden(s.batch)
            assert len(seen) == 3
        s.model.hidden(s.batch)
        s.model.hidden(s.batch)
    assert len(seen) == 5
