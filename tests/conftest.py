"""Tests neither read nor write the user's cache; those of `cache.py` have a folder of their own."""
import os

os.environ["DIFFUSION_LOSSES_CACHE"] = ""
