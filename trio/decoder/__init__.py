"""The one seam to transformers' text decoders."""
