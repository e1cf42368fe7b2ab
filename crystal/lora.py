"""Low-rank adapters and trainable tokens, kept on disk in PEFT's format.

r rank, `in` and `out` features of a Linear, V tokens of the vocabulary, n of them trainable, D hidden size,
`*` any leading shape.

    W' = W + (alpha / r) B A        LoRA: Hu et al. 2022 (arXiv 2106.09685), section 4.1
    W'[ids] = P                     new tokens, as PEFT's trainable tokens: P holds rows, not differences

In both W is frozen and only A, B and P train. Masking the gradient of a trainable W instead is not enough:
AdamW decays what it holds whether or not it has a gradient, so all of the vocabulary would shrink. Here the
optimiser never sees W.

Left out on purpose: adapters on convolutions and embeddings, biases, DoRA, rank-stabilised
scaling, several at once.
"""
import json
import re
import warnings
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"  # PEFT's names
PREFIX = "base_model.model."


def _wide(weight):
    """The dtype in which what trains beside `weight` is kept: small updates vanish in bfloat16."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


# --- low-rank adapters ---

class LoRALinear(nn.Module):
    """A frozen Linear and its low-rank adapter: x [*,in] -> base(x) + (alpha / r) B A dropout(x) [*,out].

    base: the nn.Linear, held, not copied. lora_A [r,in], Kaiming-uniform with a = sqrt 5, and lora_B [out,r],
    zero, are parameters in float32 (float64 if the base is), computed with in x's dtype. dropout:
    probability, in training mode only, from torch's global generator. generator: draws lora_A, on its own
    device, so a seed gives the same adapter on every machine. weight, bias, in_features, out_features are the
    base's: `weight` is without the adapter.
    """

    def __init__(self, base, r=16, alpha=32, dropout=0.0, generator=None):
        super().__init__()
        self.base = base
        self.r = r
        self.alpha = alpha
        self.dropout = dropout
        self.scale = alpha / r

        # A is drawn where the generator lives, and then goes to the weight.
        W = base.weight
        device = generator.device if generator is not None else W.device
        A = torch.empty(r, base.in_features, dtype=_wide(W), device=device)
        nn.init.kaiming_uniform_(A, a=5 ** 0.5, generator=generator)
        self.lora_A = nn.Parameter(A.to(W.device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, r, dtype=_wide(W), device=W.device))
        self.train(base.training)  # a new module starts in training mode, its model may not be

    weight = property(lambda self: self.base.weight)
    bias = property(lambda self: self.base.bias)
    in_features = property(lambda self: self.base.in_features)
    out_features = property(lambda self: self.base.out_features)

    @torch.no_grad()
    def merged(self, W):
        """W + (alpha / r) B A in W's dtype, [out,in].

        The sum is taken in float32 (float64 if W is) and rounded once.
        """
        wide = _wide(W)
        BA = (self.lora_B @ self.lora_A).to(W.device, wide)
        return (W.to(wide) + self.scale * BA).to(W.dtype)

    def forward(self, x):
        *leading, features = x.shape
        x = x.reshape(-1, features)                                          # [N,in]
        y = self.base(x)                                                     # [N,out]
        dropped = F.dropout(x, self.dropout, self.training)
        z = F.linear(dropped, self.lora_A.to(x.dtype))                       # [N,r]

        # In place, scale included: y is ours alone, and no other tensor as large as y is written.
        y.addmm_(z, self.lora_B.to(y.dtype).T, alpha=self.scale)
        return y.view(*leading, self.out_features)


def adapters(model):
    """{module name: LoRALinear} of `model`, in the model's order."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


def add_lora(model, pattern, r=16, alpha=32, dropout=0.0, generator=None):
    """Gives an adapter to every nn.Linear whose dotted name fully matches -> their names, in order.

    pattern: a regular expression. r, alpha, dropout, generator: see LoRALinear. Freezes nothing: that is the
    caller's. Raises ValueError if nothing matches; a Linear that has an adapter already does not count.
    """
    taken = {layer.base for layer in adapters(model).values()}
    found = {}
    for name, module in model.named_modules():
        is_free = isinstance(module, nn.Linear) and module not in taken
        if is_free and re.fullmatch(pattern, name):
            found[name] = module
    if not found:
        raise ValueError(f"no nn.Linear without an adapter has a name that matches {pattern!r}")

    for name, base in found.items():
        parent, _, child = name.rpartition(".")
        layer = LoRALinear(base, r, alpha, dropout, generator)
        setattr(model.get_submodule(parent), child, layer)
    return list(found)


# --- trainable tokens of the vocabulary ---

class TrainableTokens(nn.Module):
    """Trains n rows of the vocabulary and leaves all others exactly where they are.

    embed: the nn.Embedding [V,D]. head: the output nn.Linear [V,D], tied or not; None only where there
    is none, since without it the rows would miss the head's gradient (it warns). ids: n different
    rows, list of int.

    Parameters, in float32 (float64 if the weights are), starting as copies of the weights' rows: `embedding`
    [n,D] and, if the head is untied, `head` [n,D]. If tied, `embedding` gets both gradients. W is frozen and
    stays in the model:
        embed   out + [id is ours] (P - P.detach())[id]
        head    logits[ids] + h (P - P.detach())^T
    so that values are W's to the bit and gradients reach P. After each optimiser update call `sync()`, which
    writes P into W's rows. A batch without any of the ids gives P a gradient of zeros (not None). Hooks do
    nothing under no_grad. Raises ValueError if ids repeat or do not lie in [0, V).
    """

    def __init__(self, embed, head, ids):
        super().__init__()
        ids = [int(i) for i in ids]
        different = bool(ids) and len(set(ids)) == len(ids)
        if not different or min(ids) < 0 or max(ids) >= embed.num_embeddings:
            last = embed.num_embeddings - 1
            raise ValueError(f"trainable tokens {ids}: need different ids from 0 to {last}")
        if head is None:
            warnings.warn(
                "TrainableTokens without an output head: pass a tied head too, "
                "or its gradient never reaches the tokens",
                stacklevel=2,
            )
        self.ids = ids
        self.tied = head is None or head.weight is embed.weight
        self.owners = (embed, head)  # in a tuple: as submodules their weights would be counted as ours

        self.register_buffer("index", torch.tensor(ids, device=embed.weight.device), persistent=False)
        self.embedding = self._copy(embed)
        if not self.tied:
            self.head = self._copy(head)

        self.hooks = [embed.register_forward_hook(self._after_embed)]
        if head is not None:
            self.hooks.append(head.register_forward_hook(self._after_head))

    def _copy(self, module):
        return nn.Parameter(module.weight.detach()[self.index].to(_wide(module.weight)))

    def pairs(self):
        """[(module, its parameter [n,D])]: one pair if tied, else embedding and head."""
        embed, head = self.owners
        if self.tied:
            return [(embed, self.embedding)]
        return [(embed, self.embedding), (head, self.head)]

    def _after_embed(self, module, args, out):
        if not torch.is_grad_enabled():
            return None
        # A product with the one-hot matches [*,n], not a gather of them: their number never has
        # to reach the host.
        ours = (args[0][..., None] == self.index).to(out.dtype)
        return out + ours @ _carrier(self.embedding, out.dtype)  # [*,D]

    def _after_head(self, module, args, out):
        if not torch.is_grad_enabled():
            return None
        P = self.embedding if self.tied else self.head
        added = args[0] @ _carrier(P, out.dtype).T  # [*,n]

        # In place: a second copy of the logits [*,V] would be the largest tensor of all.
        return out.index_add_(-1, self.index, added)

    @torch.no_grad()
    def sync(self):
        """Writes P into W's rows, rounded to W's dtype.

        Raises RuntimeError if W trains: other rows could then move.
        """
        for module, P in self.pairs():
            if module.weight.requires_grad:
                raise RuntimeError(
                    "the vocabulary's weight must be frozen (requires_grad False) while its rows train"
                )
            if hasattr(P, "full_tensor"):  # one that lies in shards
                P = P.full_tensor()
            module.weight.index_copy_(0, self.index, P.to(module.weight.dtype))

    def remove(self):
        """Takes the hooks off; W keeps the values of the last sync."""
        for hook in self.hooks:
            hook.remove()
        self.hooks.clear()


def _carrier(P, dtype):
    """Zeros [n,D] through which a gradient reaches P."""
    return (P - P.detach()).to(dtype)


# --- on disk ---

def _tensors(model, new_tokens):
    """{PEFT's key: the live parameter}: what an adapter's file holds."""
    found = {}
    for name, layer in adapters(model).items():
        found[f"{PREFIX}{name}.lora_A.weight"] = layer.lora_A
        found[f"{PREFIX}{name}.lora_B.weight"] = layer.lora_B
    for name, (_, P) in _token_names(model, new_tokens).items():
        found[f"{PREFIX}{name}.token_adapter.trainable_tokens_delta"] = P
    return found


def _token_names(model, new_tokens):
    """{module name: (module, parameter)} of the trainable tokens."""
    if new_tokens is None:
        return {}
    names = {module: name for name, module in model.named_modules()}
    return {names[module]: (module, P) for module, P in new_tokens.pairs()}


def adapter_state(model, new_tokens):
    """What trains beside the frozen weights, under PEFT's names -> {key: tensor}, detached copies on the CPU.

    model: the transformers model itself, so that names are those PEFT will meet. new_tokens: a
    TrainableTokens of it, or None. Keys: base_model.model.NAME.lora_A.weight [r,in], .lora_B.weight [out,r],
    and of embedding and untied head base_model.model.NAME.token_adapter.trainable_tokens_delta [n,D] (rows as
    they are; the name is PEFT's).
    """
    state = {}
    for key, P in _tensors(model, new_tokens).items():
        state[key] = P.detach().to("cpu", copy=True).contiguous()
    return state


def adapter_config(model, new_tokens, base_name):
    """The contents of PEFT's adapter_config.json -> dict.

    base_name: directory or hub name of the frozen model. target_modules lists full names: a suffix such as
    `proj` could match more modules than were wrapped. Raises ValueError if the model has no adapter, or
    adapters that differ in r, alpha or dropout.
    """
    layers = adapters(model)
    kinds = {(layer.r, layer.alpha, layer.dropout) for layer in layers.values()}
    if len(kinds) != 1:
        raise ValueError(
            f"one kind of adapter (r, alpha, dropout) can be saved, the model has {len(kinds)}: "
            f"{sorted(kinds)}"
        )
    r, alpha, dropout = kinds.pop()
    tokens = {name: new_tokens.ids for name in _token_names(model, new_tokens)}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base_name),
        "r": r,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": dropout,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": list(layers),
        "trainable_token_indices": tokens or None,
    }


def save_adapter(directory, model, new_tokens, base_name):
    """Writes adapter_model.safetensors and adapter_config.json into `directory`, made if absent.

    The arguments are adapter_config's.
    """
    directory = Path(directory)
    config = adapter_config(model, new_tokens, base_name)
    directory.mkdir(parents=True, exist_ok=True)
    save_file(adapter_state(model, new_tokens), directory / WEIGHTS, metadata={"format": "pt"})
    (directory / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


@torch.no_grad()
def load_adapter(directory, model, new_tokens):
    """Reads an adapter into a model that has the same adapters and trainable tokens already.

    They come from add_lora and TrainableTokens. Raises ValueError naming the file and the key where anything
    differs: a key missing or unknown, a shape, the rank, alpha, the ids of the tokens. Nothing is changed
    then. Trainable tokens are written into the vocabulary as well (sync).
    """
    weights = Path(directory) / WEIGHTS
    config = Path(directory) / CONFIG

    # The configurations must agree,
    here = adapter_config(model, new_tokens, "")
    try:
        there = dict(json.loads(config.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{config}: not a readable adapter config: {error}") from error
    for key in ("peft_type", "r", "lora_alpha", "trainable_token_indices"):
        if there.get(key) != here[key]:
            raise ValueError(f"{config}: {key} is {there.get(key)!r}, the model has {here[key]!r}")

    # and the tensors' names and shapes.
    try:
        state = load_file(weights)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{weights}: not a readable safetensors file: {error}") from error
    wanted = _tensors(model, new_tokens)
    for key in [*wanted, *state]:
        if key not in state:
            raise ValueError(f"{weights}: no key {key}, which the model has")
        if key not in wanted:
            raise ValueError(f"{weights}: key {key} has no place in the model")
        found, right = list(state[key].shape), list(wanted[key].shape)
        if found != right:
            raise ValueError(f"{weights}: {key} has shape {found}, the model's is {right}")

    for key, P in wanted.items():
        P.copy_(state[key])
    if new_tokens is not None:
        new_tokens.sync()
