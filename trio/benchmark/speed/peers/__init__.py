"""Against other engines on this machine, each in an interpreter and a process of its own."""
