"""Data: from files to packed micro-batches, in four steps that know nothing of models.

- ``formats``  a file, a hub data set or a list → typed examples, every bad line named
- ``render``   an example and a tokenizer → token ids, and which of them are targets
- ``pack``     the examples of one optimiser step → micro-batches without padding
- ``loader``   which examples a step sees: a pure function of the step

Nothing is imported here, so that reading a file does not load torch.
"""
