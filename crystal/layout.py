"""A record becomes token ids and spans: image, question, thought, latents, answer (section 3.1).

    <prompt of the chat template> <think> {thought}{K latents}. </think><answer>R</answer><|im_end|>

L sequence length, K latents, N image tokens, M answer positions. Position t predicts token t + 1, so
`targets[t]` is ids[t + 1] where that token is a label and IGNORE elsewhere. Whatever a loss reads is given by
position, nothing by shifting.
"""
import re
from dataclasses import dataclass, field
from typing import NamedTuple

IGNORE = -100
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
THOUGHT = "Because the feature of the image is"  # the released code's fixed thought
END = "<|im_end|>"
# An image's token and those around it, Qwen's.
IMAGE = ("<|image_pad|>", "<|vision_start|>", "<|vision_end|>")
_SLOT = re.compile("\ue000(\\d+)\ue001")  # stands for a user's text in the rendered template


def latent_tokens(count, kind):
    """Names of the K latent tokens: K different ones (`diverse`), or one repeated (`identical`; table 3)."""
    return [f"<|latent_{i if kind == 'diverse' else 0}|>" for i in range(count)]


def new_tokens(count, kind):
    """The special tokens that a method with latents adds to the vocabulary, in the order of their ids."""
    return list(TAGS) + list(dict.fromkeys(latent_tokens(count, kind)))


@dataclass
class Layout:
    """One sequence. Spans are half-open (start, end) positions; an absent one is (0, 0)."""

    ids: list[int]
    targets: list[int]                                         # position t predicts targets[t]
    image: list[int] = field(default_factory=list)             # positions of the N image tokens of all images
    thought: tuple[int, int] = (0, 0)                          # <think> to </think>, tags included
    latents: list[int] = field(default_factory=list)           # positions of the K latents
    answer: tuple[int, int] = (0, 0)                           # <answer> (or R's first token) to <|im_end|>
    answer_positions: list[int] = field(default_factory=list)  # they predict R and what follows it


class Prompt(NamedTuple):
    """A sequence to generate from: its L ids, and where in it what a reader or a mask asks for stands."""

    ids: list[int]      # L of them
    image: list[int]    # positions of the N image tokens of all images
    latents: list[int]  # positions of the K latents; none where the model writes them itself


class Format:
    """Turns conversations into ids with one tokenizer and one chat template.

    tokenizer: a transformers tokenizer, or anything with its `encode`, `apply_chat_template` and
    `convert_tokens_to_ids`. What a user wrote is encoded with special tokens split, so that it stays text.
    Without latents this is plain fine-tuning's format, with them CrystaL's; a method whose latents stand
    elsewhere has a subclass with a `question` and a `chat_template` of its own.

    count: K of the latents in a sequence. copies: how often each image stands in it. The tags around an
    answer, around a thought that ends in latents, and around latents that the model feeds back to
    itself are known by their ids: answer_start_id, think_start_id, latent_start_id and their ends; None
    where there are none.
    """

    copies = 1
    answer_start_id = answer_end_id = None
    think_start_id = think_end_id = None
    latent_start_id = latent_end_id = None

    def __init__(self, tokenizer, count=0, kind="diverse", thought="fixed"):
        self.tokenizer = tokenizer
        self.count = count
        self.thought = thought
        self.marks = getattr(tokenizer, "image_marks", IMAGE)  # another family's, see families.py
        self.end, self.image = tokenizer.convert_tokens_to_ids([END, self.marks[0]])

        if count:
            tags = tokenizer.convert_tokens_to_ids(list(TAGS))
            self.think_start_id, self.think_end_id, self.answer_start_id, self.answer_end_id = tags
            self.latents = tokenizer.convert_tokens_to_ids(latent_tokens(count, kind))

    @property
    def feeds_back(self):
        """Whether its latents are states that the model feeds back to itself."""
        return self.latent_start_id is not None

    @property
    def writes_own_latents(self):
        """Whether the model writes its thought and latents itself; otherwise they stand in its prompt."""
        return bool(self.count) and self.thought == "cot"

    def text(self, text):
        """Ids of a user's text; `<|image_pad|>` typed by a user is a dozen ordinary tokens here."""
        return self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)

    def template(self, text):
        """Ids of a piece of the chat template, special tokens included."""
        return self.tokenizer.encode(text, add_special_tokens=False)

    def prompt(self, turns, image_tokens):
        """Ids up to where the assistant speaks, and the positions of the image tokens.

        turns: [(role, text)] with `<image>` where an image stands; the last is the user's. image_tokens: N of
        each image, once for each of its copies. A text may also be a list of texts with an image between each
        two: there a typed `<image>` is text.
        """
        # Users' texts are put aside, and the template is rendered with a slot in the place of each.
        texts, messages = [], []
        for role, text in turns:
            if isinstance(text, str):
                # LLaVA's files break the line after an image, the template does not.
                text = text.replace("<image>\n", "<image>").split("<image>")

            content = []
            for i, part in enumerate(text):
                if i:
                    content += [{"type": "image"}] * self.copies
                if part:
                    content.append({"type": "text", "text": f"\ue000{len(texts)}\ue001"})
                    texts.append(part)

            # A list for every role: some templates pass over a plain string.
            messages.append({"role": role, "content": content})
        rendered = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

        # The template's pieces are encoded with their special tokens, users' texts without.
        ids, image, counts = [], [], iter(image_tokens)
        for i, piece in enumerate(_SLOT.split(rendered)):
            is_text = i % 2 == 1
            tokens = self.text(texts[int(piece)]) if is_text else self.template(piece)
            for token in tokens:
                if token == self.image:  # only the template's own: a user's text cannot contain it
                    n = next(counts)
                    image += range(len(ids), len(ids) + n)
                    ids += [token] * n
                else:
                    ids.append(token)
        return ids, image

    def thinking(self, steps=(), drop=False):
        """Ids of `<think> {thought}{K latents}. </think>` and the offsets of the latents in them.

        drop leaves the latents out of the sequence, the test of whether they carry anything.
        """
        words = " ".join(steps) if self.thought == "cot" and steps else THOUGHT
        head = [self.think_start_id] + self.text(" " + words)
        latents = [] if drop else self.latents
        tail = self.template(". ") + [self.think_end_id]

        offsets = range(len(head), len(head) + len(latents))
        return head + latents + tail, list(offsets)

    def answered(self, prompt, answer):
        """A Prompt, then R and <|im_end|>, which are the labels -> Layout."""
        start = len(prompt.ids)
        ids = prompt.ids + self.text(answer) + [self.end]
        return Layout(
            ids, next_tokens(ids, start), prompt.image,
            latents=prompt.latents,
            answer=(start, len(ids)),
            answer_positions=list(range(start - 1, len(ids) - 1)),
        )

    def plain(self, turns, image_tokens, answer):
        """The sequence of ordinary fine-tuning."""
        ids, image = self.prompt(turns, image_tokens)
        return self.answered(Prompt(ids, image, []), answer)

    def latent(self, turns, image_tokens, answer, steps=(), labels="all"):
        """The sequence of a method with latents -> Layout.

        labels: "all" that the assistant says, or the "answer" and its end alone. The first answer position is
        `<answer>` itself, which predicts R's first token: it sees the latents and is copied from nowhere, so
        that a one-token answer still has a divergence to lose.
        """
        prompt, image = self.prompt(turns, image_tokens)
        thought, offsets = self.thinking(steps)
        said = [self.answer_start_id] + self.text(answer) + [self.answer_end_id, self.end]
        ids = prompt + thought + said

        start = len(prompt)
        answer_start = start + len(thought)
        first_label = start if labels == "all" else answer_start + 1
        return Layout(
            ids, next_tokens(ids, first_label), image,
            thought=(start, answer_start),
            latents=[start + i for i in offsets],
            answer=(answer_start, len(ids)),
            answer_positions=list(range(answer_start, len(ids) - 1)),
        )

    def question(self, turns, image_tokens, latents="keep"):
        """What the model is asked -> Prompt.

        latents: "keep" ends with the whole thought and `<answer>`, so that what is decoded is the
        bare answer; "drop" does the same without the latents; "none" is the plain chat prompt. A
        method that learned to write its own thought (`--thought cot`) is given `<think>` alone and
        writes the rest itself.
        """
        ids, image = self.prompt(turns, image_tokens)
        if latents == "none" or not self.count:
            return Prompt(ids, image, [])
        if self.writes_own_latents:
            return Prompt(ids + [self.think_start_id], image, [])

        thought, offsets = self.thinking(drop=latents == "drop")
        where = [len(ids) + i for i in offsets]
        return Prompt(ids + thought + [self.answer_start_id], image, where)

    def chat_template(self):
        """The tokenizer's chat template with the generation prompt of `question`, for stock tools."""
        template = self.tokenizer.chat_template
        if not self.count:
            return template
        if self.writes_own_latents:
            prompt = TAGS[0]
        else:
            latents = "".join(self.tokenizer.convert_ids_to_tokens(self.latents))
            prompt = f"{TAGS[0]} {THOUGHT}{latents}. {TAGS[1]}{TAGS[2]}"
        return template + generation_prompt(prompt)


def generation_prompt(text):
    """What a chat template adds where the assistant is to speak. text: without quotes."""
    return "{%- if add_generation_prompt -%}{{- '" + text + "' -}}{%- endif -%}"


def next_tokens(ids, start):
    """Targets by position: ids[t + 1] from the one before `start` on, IGNORE before it and at the last."""
    start = max(start, 1)  # nothing predicts the first
    before = [IGNORE] * (start - 1)
    return before + ids[start:] + [IGNORE]
