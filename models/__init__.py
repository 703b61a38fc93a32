"""One file per architecture, found by the checkpoint's own `model_type`.

A file `models/<model_type>.py` (dashes as underscores) defines two names:

    model_shape(hf_config) -> ModelShape    or UnsupportedModelError
    MODEL                                   a subclass of `models.base.CausalLM`
"""
