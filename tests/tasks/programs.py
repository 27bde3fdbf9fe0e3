"""Runs the suite's own programs against their tests, and makes wrong ones of right ones."""

import ast
import contextlib
import copy
import signal

from cosr_jax.tasks.code_problems import unfenced

_SWAPPED = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Add,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.In: ast.NotIn,
    ast.And: ast.Or,
    ast.Or: ast.And,
}


def passed(source, tests):
    """Yields which tests hold after the program, in this very process: for our own texts only."""
    names = {}

    def runs(text):
        try:
            with _alarm():
                exec(text, names)
        except Exception:
            return False
        return True

    if not runs(source):
        return (False for _ in tests)
    return (runs(test) for test in tests)


@contextlib.contextmanager
def _alarm(seconds=0.2):
    """Ends what runs longer by a TimeoutError: some mutants never stop."""

    def ring(*_):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def solves(source, task):
    return all(passed(source, task.checks.tests))


def mutants(task):
    """Programs that differ from the task's reference in one constant or operator."""
    tree = ast.parse(unfenced(task.solution))
    for place, node in enumerate(ast.walk(tree)):
        for change in _changes(node):
            twin = copy.deepcopy(tree)
            change(list(ast.walk(twin))[place])
            yield ast.unparse(twin)


def _changes(node):
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return [lambda n, d=d: setattr(n, "value", n.value + d) for d in (1, -1)]
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return [lambda n: setattr(n, "value", n.value[1:] or "#")]
    if isinstance(node, (ast.BinOp, ast.AugAssign, ast.BoolOp)) and type(node.op) in _SWAPPED:
        return [lambda n: setattr(n, "op", _SWAPPED[type(n.op)]())]
    if isinstance(node, ast.Compare):
        return [
            lambda n, i=i: n.ops.__setitem__(i, _SWAPPED[type(n.ops[i])]())
            for i in range(len(node.ops))
        ]
    return []
