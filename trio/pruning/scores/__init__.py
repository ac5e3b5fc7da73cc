"""Scores of visual tokens: saliency, attention, relevance."""
