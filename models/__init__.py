"""One file per architecture, found by the checkpoint's own `model_type`.

A file `models/<model_type>.py` (dashes as underscores) defines two names:

    model_shape(hf_config) -> ModelShape    or UnsupportedModelError
    MODEL                                   a subclass of `models.base.CausalLM`

With several ranks `hf_config` is a `PreTrainedConfig` with the fields of the model's own class:
read fields, not the class's methods or its names for fields of others.
"""
