"""Pure tensor mathematics: tensors in, tensors out, no models, no files, no options objects."""
