"""transformers alone, of any version: the merged directory's classes, template and image processor."""

import transformers
from common import ASKED, agreement, tell
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

NEW = int(transformers.__version__.split(".")[0]) > 4


def load(directory):
    """Tokenizer and image processor of a directory; Pillow's, whatever else is installed."""
    slow = {"backend": "pil"} if NEW else {"use_fast": False}
    return AutoTokenizer.from_pretrained(directory), AutoImageProcessor.from_pretrained(directory, **slow)


def ask(model, tokenizer, processor, path, question):
    """One question about one image -> the answer, decoded as every tool decodes it."""
    content = [{"type": "image"}, {"type": "text", "text": question}]
    images = processor(images=[Image.open(path)], return_tensors="pt")
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    count = int(images["image_grid_thw"].prod() // 4)
    ids = tokenizer(text.replace("<|image_pad|>", "<|image_pad|>" * count), return_tensors="pt")
    kinds = (ids["input_ids"] == model.config.image_token_id).int()
    more = {"mm_token_type_ids": kinds} if NEW else {}
    out = model.generate(**ids, **images, **more, max_new_tokens=8, do_sample=False)
    return tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True).strip()


if __name__ == "__main__":
    model = AutoModelForImageTextToText.from_pretrained(ASKED["merged"])
    readers = load(ASKED["merged"])
    answers = [ask(model, *readers, path, question) for path, question, _ in ASKED["questions"]]
    tell(transformers.__version__, agreement(answers))
