"""What may import what: the kernels stand alone, imports point downwards, and nothing shipped leans on the tests."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# From the floor up; a room may import those before it, and itself.
ROOMS = (
    ("pallas_kernels", "delta_jax.config"),
    ("delta_jax.data",),
    ("delta_jax.ops",),
    ("delta_jax.testing", "delta_jax.parallel"),
    ("delta_jax.compiled",),
    ("delta_jax.layers",),
    ("delta_jax.models",),
    ("delta_jax.inference", "delta_jax.interop"),
    ("delta_jax.evaluation",),
    ("delta_jax.training",),
    ("delta_jax.evaluation.harness",),
    ("delta_jax.cli",),
    ("experiments",),
    ("benchmarks",),
    ("tests",),
)
OURS = ("delta_jax", "pallas_kernels", "experiments", "benchmarks", "tests")
FLOORS = {room: floor for floor, rooms in enumerate(ROOMS) for room in rooms}


def room_of(module):
    """The room a module is in; None where it is not ours, or the top of the package, which imports the ops alone."""
    rooms = (room for room in FLOORS if module == room or module.startswith(f"{room}."))
    return max(rooms, key=len, default=None)


def imported(path):
    """The modules that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative"
            names = [f"{node.module}.{name.name}" for name in node.names]
            yield from names if node.module == "delta_jax" else [node.module]


def files(folder):
    return sorted((ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("folder", ["pallas_kernels", "delta_jax", "experiments", "benchmarks"])
def test_imports_point_downwards(folder):
    for path in files(folder):
        room = room_of(".".join(path.relative_to(ROOT).with_suffix("").parts))
        for module in imported(path):
            other = room_of(module)
            if room and other and room != other:
                assert FLOORS[other] < FLOORS[room], f"{path.relative_to(ROOT)} imports {module}"


def test_kernels_import_jax_alone():
    allowed = {"jax", "jaxlib", "numpy", "pallas_kernels", *sys.stdlib_module_names}
    for path in files("pallas_kernels"):
        others = {module.split(".")[0] for module in imported(path)} - allowed
        others -= {"triton"} if path.parent.name == "triton" else set()
        assert not others, f"{path.relative_to(ROOT)} imports {others}"


def test_the_op_imports_jax_alone():
    for path in files("delta_jax/ops"):
        for module in imported(path):
            assert module.split(".")[0] not in ("flax", "optax", "orbax", "grain", "chex"), f"{path}: {module}"
