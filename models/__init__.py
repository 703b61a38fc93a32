"""Each model architecture is one file. `models/a_b.py` is for checkpoints of `model_type` a-b.

The file defines a function `model_shape(hf_config)`, which returns a `ModelShape` or raises
UnsupportedModelError, and a class `MODEL`, which is a subclass of `models.base.CausalLM`.
With several ranks `hf_config` is a plain `PreTrainedConfig`. This plain config has the fields of
the model's own config class, but neither the methods nor the `attribute_map` of that class.
"""
