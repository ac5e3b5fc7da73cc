"""How answers are made of logits."""
