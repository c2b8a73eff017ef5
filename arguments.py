"""Command lines: a parser whose errors name the word that was meant, and types of arguments that say what is wrong.

Not here: the settings of training (`settings.py`).
"""
import argparse
import difflib
import os
import re


class Parser(argparse.ArgumentParser):
    """argparse's, whose errors also name the word that was meant."""

    def error(self, message):
        known, found = [], re.search(r"'([^']*)'.*choose from (.*)", message)
        if found:
            known = re.findall(r"[\w.-]+", found[2])
        elif found := re.search("unrecognized arguments: (--[^ =]+)", message):
            known = re.findall(r"--[\w-]+", self.format_help())
        for word in difflib.get_close_matches(found[1], known, 1) if found else ():
            message += f" - did you mean {word}?"
        super().error(message)


def path(text, is_right, wrong):
    """A path that need not exist; ArgumentTypeError if it can be none, or is there and is not right, but `wrong`."""
    if not text:
        raise argparse.ArgumentTypeError("the name of a file or folder is empty")
    try:
        os.stat(text)
    except FileNotFoundError:
        return text
    except (OSError, ValueError) as error:                 # a path too long, a loop of links, a character of no path
        raise argparse.ArgumentTypeError(f"{text[:80]!r} can be no path: {getattr(error, 'strerror', error)}") from None
    if not is_right(text):
        raise argparse.ArgumentTypeError(f"{text[:80]} is {wrong}")
    return text


def folder(text):
    """An argparse type: the path of a folder, which need not exist."""
    return path(text, os.path.isdir, "a file, not a folder")


def file(text):
    """An argparse type: the path of a file that may be written."""
    folder(os.path.dirname(text) or ".")
    return path(text, os.path.isfile, "not a file")


def number(kind, low, high=float("inf")):
    """An argparse type: a finite number of `kind` in [low, high]."""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {'a whole' if kind is int else 'a'} number") from None
        if not low <= value <= high or value == float("inf"):
            least = "finite and at least" if kind is float else "at least"
            bound = f"{least} {low}" if high == float("inf") else f"in [{low}, {high}]"
            raise argparse.ArgumentTypeError(f"must be {bound}, got {text}")
        return value
    return parse
