"""ImageNet's archives, or any folder of images, to WebDataset shards; the command line is `vitfreeze-data`.

This package stands alone: it imports nothing of vitfreeze, and the shards it writes are read by WebDataset, timm and
open_clip as they are.
"""
