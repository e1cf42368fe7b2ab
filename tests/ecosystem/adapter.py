"""peft on the adapter and the base that it names, with the adapter's own tokenizer and image processor."""

import peft
from common import ASKED, agreement, tell
from stock import ask, load
from transformers import AutoModelForImageTextToText

base = AutoModelForImageTextToText.from_pretrained(ASKED["base"])
model = peft.PeftModel.from_pretrained(base, ASKED["adapter"]).eval()
readers = load(ASKED["adapter"])
answers = [ask(model, *readers, path, question) for path, question, _ in ASKED["questions"]]
tell(peft.__version__, agreement(answers))
