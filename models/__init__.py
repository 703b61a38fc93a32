"""Each model architecture is one file, which the checkpoint's `model_type` names.

A file `models/<model_type>.py` (with underscores for dashes) defines two names:

    model_shape(hf_config) -> ModelShape    or raises UnsupportedModelError
    MODEL                                   a subclass of `models.base.CausalLM`

With several ranks `hf_config` is a plain `PreTrainedConfig`. It has the fields of the model's own
config class, but neither the methods nor the `attribute_map` of that class.
"""
