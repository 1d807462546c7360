"""What is public: walked by the tests and by the build of the docs (docs/conf.py)."""

import importlib
import inspect
import pkgutil

import lgla_losses


def public_values():
    """Every public name of the package and of its modules, in full, and what it stands for; once each."""
    found = set()
    names = [module.name for module in pkgutil.iter_modules(lgla_losses.__path__) if module.name[0] != "_"]
    for module in [lgla_losses, *(importlib.import_module(f"lgla_losses.{name}") for name in names)]:
        for name in getattr(module, "__all__", []):
            value = getattr(module, name)
            if id(value) not in found:  # the package's own names come first
                found.add(id(value))
                yield f"{module.__name__}.{name}", value


def undocumented(name, value):
    """Of a public value and its methods, those without a docstring."""
    docstring = value.__doc__
    # A dataclass makes its signature the docstring where there is none.
    if not docstring or docstring.startswith(f"{name.rpartition('.')[2]}("):
        yield name
    if inspect.isclass(value):
        for base in value.__mro__:
            for method, member in vars(base).items():
                defined = inspect.isroutine(member) or isinstance(member, property)
                ours = base.__module__.startswith("lgla_losses") and method[0] != "_"
                if ours and defined and not member.__doc__:
                    yield f"{name}.{method}"
