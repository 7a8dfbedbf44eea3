"""The model, a GPT in plain PyTorch, with its loss and its computational cost."""
