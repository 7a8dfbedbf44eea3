"""megagpt: raw text to a pre-trained, evaluated, exported GPT, on DeepSpeed."""

__version__ = "0.1.0"

__all__ = ["__version__"]
