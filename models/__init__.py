"""One file per architecture, found by the checkpoint's own `model_type`.

A file `models/<model_type>.py` (dashes as underscores) defines two names:

    decoder_spec(hf_config) -> DecoderSpec    the shape, or UnsupportedModelError
    MODEL                                     a module constructed as `DecoderLM` is, with
                                              `forward(ForwardBatch) -> logits` and `weight_slots()`
"""
