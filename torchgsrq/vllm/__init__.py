"""A plugin for vLLM: its KV cache as pages of codes, for models that ask for it (docs/serving.md).

Nothing else in this package imports from here, and vLLM is imported nowhere else.
"""
