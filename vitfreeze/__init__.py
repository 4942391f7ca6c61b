"""Pre-train Vision Transformers with LocalMIM and FreezeOut on DeepSpeed."""

__version__ = "0.2.0"
