"""Plug-in for lmms-eval, which is no dependency: only `engine_model` imports it at once."""
