"""vLLM in process on the merged directory."""

import vllm
from common import ASKED, agreement, tell
from PIL import Image

model = vllm.LLM(ASKED["merged"], max_model_len=2048, enforce_eager=True)
rules = vllm.SamplingParams(temperature=0, max_tokens=8)
answers = []
for path, question, _ in ASKED["questions"]:
    content = [{"type": "image_pil", "image_pil": Image.open(path)}, {"type": "text", "text": question}]
    said = model.chat([{"role": "user", "content": content}], rules)
    answers.append(said[0].outputs[0].text.strip())
tell(vllm.__version__, agreement(answers))
