"""How an exercise says that nobody has done it yet."""
import pytest


def todo(what):
    pytest.fail(f"{what}: see this file's docstring", pytrace=False)


def asked_for(module, name):
    """The function that the exercise asks for."""
    if not hasattr(module, name):
        todo(f"{module.__name__} has no function '{name}' yet")
    return getattr(module, name)
