"""What tokens are judged by."""
