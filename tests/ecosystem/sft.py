"""TRL's SFTTrainer on the merged directory: do its training sequences hold the latents?"""

import tempfile

import trl
from common import ASKED, tell
from datasets import Dataset
from transformers import AutoModelForImageTextToText, AutoTokenizer

model = AutoModelForImageTextToText.from_pretrained(ASKED["merged"])
tokenizer = AutoTokenizer.from_pretrained(ASKED["merged"])
talk = [{"role": "user", "content": "How many legs has a cat?"}, {"role": "assistant", "content": "4"}]
trainer = trl.SFTTrainer(
    model,
    args=trl.SFTConfig(output_dir=tempfile.mkdtemp(), use_cpu=True, bf16=False, report_to=[]),
    train_dataset=Dataset.from_list([{"messages": talk}]),
    processing_class=tokenizer,
)
text = tokenizer.decode(trainer.train_dataset[0]["input_ids"])
seen = "the latents are in what it trains on" if "<|latent_0|>" in text else "it trains without the latents"
tell(trl.__version__, f"{seen}: {text!r}")
