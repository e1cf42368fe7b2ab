"""CrystaL as its authors' released code trains it, where that differs from the paper.

The code is github yangzhangok/crystal at bc08a90.

|                          | paper                          | released code                          |
| what is copied           | the latents                    | the whole thought, tags included       |
| cross entropy            | a token mean per path, summed  | one mean over all tokens of both paths |
| eq. 4                    | mean over the answer           | mean over the largest tenth of it      |
| answer positions         | those that predict the answer  | the answer's own                       |
| eq. 5, heads             | compared one by one            | their mean                             |
| eq. 5, columns           | the latents                    | the thought                            |
| adapters                 | language model                 | vision tower and merger too            |
| dropout before adapters  | none                           | 0.01                                   |

Each is a setting of crystal.py; nothing else differs.
"""
from dataclasses import dataclass
from functools import partial

from crystal.methods import crystal
from crystal.runtime.config import changed

released = partial(changed, crystal.Settings)


@dataclass(frozen=True)
class Settings(crystal.Settings):
    """The released code's defaults."""

    copied: str = released("copied", "thought")
    ce: str = released("ce", "pooled")
    kl_share: float = released("kl_share", 0.1)
    answer_positions: str = released("answer_positions", "span")
    attn_heads: str = released("attn_heads", "mean")
    attn_columns: str = released("attn_columns", "thought")
    lora_on: str = released("lora_on", "language,vision,merger")
    lora_dropout: float = released("lora_dropout", 0.01)


class Method(crystal.Method):
    """CrystaL with the released code's defaults."""

    Settings = Settings
