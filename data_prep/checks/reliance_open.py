"""A method file for `--method`: fine-tuning with latents that nothing asks the model to use.

CrystaL's sequence, and cross-entropy as the only loss: the image stays in sight, so the answer may read it
and pass the latents by. LIVR's control "latents only" (table 3). reliance_bottleneck.py is the same with
the direct path closed.
"""

from crystal.methods.crystal import LatentThought
from crystal.methods.sft import cross_entropy


class Method(LatentThought):
    """Latents in the sequence, cross-entropy alone."""

    def losses(self, model, batch, progress):
        """{"ce": token mean per pair, averaged over the batch's pairs}."""
        return {"ce": cross_entropy(model, batch, self.biases(model, batch))}
