"""Pure tensor mathematics: tensors in, tensors out. No models, no files, no option objects."""
