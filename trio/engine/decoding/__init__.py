"""From logits to answers: rules, sampling, teacher forcing."""
