"""What prompts on one image, and engines on one model, share."""
