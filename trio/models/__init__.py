"""The seam to transformers: decoders run packed, and adapters of model families."""
