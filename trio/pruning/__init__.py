"""Which visual tokens stay, and what that saves: tensors and arithmetic, no models."""
