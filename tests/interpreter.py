"""Triton's interpreter without what it does again at every call of a function.

It puts its own functions in the place of triton.language's when a kernel starts, and again at each call that the
kernel makes, where all are in place; it finds them among all members of five modules and classes. Here calls find
things in place, and members are looked through once: a third of the time of these tests.
"""

from __future__ import annotations

import inspect
from typing import Any


def patch_once() -> None:
    """Change the interpreter of this process."""
    import triton.language as tl
    from triton.language.core import is_builtin
    from triton.runtime import interpreter

    known: dict[Any, list[str]] = {}
    patch_all = interpreter._patch_lang

    def patch_builtin(package: Any, builder: Any, scope: Any) -> None:
        if package not in known:  # met first by the first kernel: nothing is in another's place yet
            known[package] = [name for name, member in inspect.getmembers(package) if is_builtin(member)]
        for name in known[package]:
            member = getattr(package, name)
            if is_builtin(member):
                interpreter._patch_attr(package, name, member, builder, scope)

    def patch_lang(function: Any) -> Any:
        names = function.__globals__.values()
        used = [module for module in (tl, tl.core) if any(value is module for value in names)]
        if used and not any(is_builtin(module.load) for module in used):
            return interpreter._LangPatchScope()  # in place, and the kernel's own scope takes them back
        return patch_all(function)

    interpreter._patch_builtin, interpreter._patch_lang = patch_builtin, patch_lang
