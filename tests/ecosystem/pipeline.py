"""transformers' pipeline: the message that it adds to the talk, and the text of `return_full_text=False`.

With a response_template in the directory it decodes special tokens, and parses full texts alone: the text by
itself then ends with what follows the answer, `</answer>` and the turn's end.
"""

import transformers
from common import ASKED, agreement, tell
from PIL import Image
from transformers import pipeline

ask = pipeline("image-text-to-text", model=ASKED["merged"], device="cpu")
answers, bare = [], []
for path, question, _ in ASKED["questions"]:
    content = [{"type": "image", "image": Image.open(path)}, {"type": "text", "text": question}]
    talk = [{"role": "user", "content": content}]
    answers.append(ask(text=talk, max_new_tokens=8)[0]["generated_text"][-1].get("content", ""))
    bare.append(ask(text=talk, max_new_tokens=8, return_full_text=False)[0]["generated_text"])
tell(transformers.__version__, f"{agreement(answers)}; return_full_text=False shows {bare[1]!r}")
