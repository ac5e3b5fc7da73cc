"""Which tokens stay, by what they are judged by."""
