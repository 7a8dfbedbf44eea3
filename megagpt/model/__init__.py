"""The model: a GPT in plain PyTorch, its loss, and what it costs."""
