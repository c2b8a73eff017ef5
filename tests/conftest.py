"""Tests neither read nor write the user's cache; those of `cache.py` have a folder of their own."""
import os

os.environ["DIFFUSION_LOSSES_CACHE"] = ""

LONGEST = "test_train_images.py", "test_reproduce.py", "test_fid.py", "test_stack.py", "test_exercises.py"


def pytest_collection_modifyitems(items):
    """The files that take longest come first, so that of two processes neither waits for the other at the end."""
    items.sort(key=lambda item: item.path.name not in LONGEST)
