"""crystal: visual latent reasoning, to read, train, check and extend.

    run = crystal.open("runs/crystal")         a run, an export, "tiny", a directory or a hub name
    run.answer("photo.jpg", "What is left of the cup?")

`crystal/run.py` says what else a run can be asked. `crystal.record_attention` reads attention of any
transformers model. Nothing is imported before it is asked for: `import crystal` costs no second.
"""

__version__ = "0.1.0"


def open(name="tiny", **how):
    """A run, an export, "tiny", a model's directory or a hub name -> run.Run. Keywords as there."""
    from crystal.run import Run

    return Run(name, **how)


def record_attention(model, layers, queries, keys, **how):
    """A slice of any transformers model's attention weights, with its gradient; see backbone/record.py."""
    from crystal.backbone.record import record_attention as record

    return record(model, layers, queries, keys, **how)
