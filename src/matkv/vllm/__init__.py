"""The seam with vLLM: artifacts as a cache format of its pages.

Nothing here is imported unless vLLM asks for it: see `plugin`.
"""
