"""Single-point changes of a Python source, each of which a test of that source should notice.

Strings, annotations, decorators, error messages and log calls are never changed, nor are arguments in NEUTRAL_KEYWORDS:
such changes seldom alter behaviour, or only the looks of a figure.
"""

import ast
import copy
from collections.abc import Iterator
from dataclasses import dataclass

SWAPS: dict[type[ast.AST], type[ast.AST]] = {
    **{ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq},
    **{ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And},
    **{ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult},
    **{ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.LShift: ast.RShift, ast.RShift: ast.LShift},
}
NEUTRAL_KEYWORDS = {"encoding", "strict", "stacklevel", "desc", "unit", "leave", "disable", "progress", "copy"}
NEUTRAL_KEYWORDS |= {"fontsize", "linewidth", "linewidths", "figsize", "layout", "ha", "va", "loc", "alpha"}  # of figures
LOGGING = {"debug", "info", "warning", "error", "exception"}


@dataclass(frozen=True)
class Mutation:
    """One change: `after` replaces `before`, the bytes `start` to `end` of the source, on lines `line` to `last_line`."""

    line: int  # from 1
    last_line: int
    function: str  # "Class.method"; "" outside functions
    on_import: bool  # whether the line runs when the module is imported, perhaps before any test runs
    start: int
    end: int
    before: str
    after: str

    def apply(self, source: str) -> str:
        """Return the source with this change."""
        data = source.encode()
        return (data[: self.start] + self.after.encode() + data[self.end :]).decode()


def mutations(source: str) -> list[Mutation]:
    """Return all changes of a source, in the order of their places; none of them is a syntax error."""
    data, tree = source.encode(), ast.parse(source)
    starts = [0]
    for line in data.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    found = []
    for node, replacement, function, on_import in _replacements(tree, "", True):
        start, end = starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset
        text = ast.unparse(replacement)
        after = f"({text})" if isinstance(replacement, ast.expr) else text
        place = (node.lineno, node.end_lineno, function, on_import, start, end)
        found.append(Mutation(*place, " ".join(data[start:end].decode().split()), after))
    return sorted(set(found), key=lambda mutation: (mutation.start, mutation.end, mutation.after))


def _replacements(node: ast.AST, function: str, on_import: bool) -> Iterator[tuple[ast.AST, ast.AST, str, bool]]:
    """Yield each node of a tree that can be changed, what replaces it, and the Mutation's `function` and `on_import`."""
    for old, new in _changes(node):
        yield old, new, function, on_import
    is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    if is_function or isinstance(node, ast.ClassDef):
        function = f"{function}.{node.name}".lstrip(".")
    for child in _children(node):
        # The defaults of a function's arguments are computed where it is defined.
        yield from _replacements(child, function, on_import and not (is_function and child in node.body))


def _children(node: ast.AST) -> list[ast.AST]:
    """Return the parts of a node in which behaviour can be changed."""
    if isinstance(node, ast.Raise | ast.JoinedStr) or _is_log_call(node):
        return []
    if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "__name__ == '__main__'"):
        return []
    if isinstance(node, ast.AnnAssign):
        return [node.value] if node.value else []
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return [*node.args.defaults, *filter(None, node.args.kw_defaults), *node.body]
    if isinstance(node, ast.ClassDef):
        return node.body
    if isinstance(node, ast.Call):
        return [node.func, *node.args, *(word for word in node.keywords if word.arg not in NEUTRAL_KEYWORDS)]
    return list(ast.iter_child_nodes(node))


def _is_log_call(node: ast.AST) -> bool:
    called = node.value.func if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) else None
    return isinstance(called, ast.Attribute) and called.attr in LOGGING and "log" in ast.unparse(called.value).lower()


def _changes(node: ast.AST) -> Iterator[tuple[ast.AST, ast.AST]]:
    """Yield (node, replacement) for each change of this node itself, not of those inside."""

    def changed(**fields: object) -> ast.AST:
        new = copy.copy(node)
        for name, value in fields.items():
            setattr(new, name, value)
        return new

    def negated(test: ast.expr) -> ast.expr:
        return test.operand if isinstance(test, ast.UnaryOp) else ast.UnaryOp(ast.Not(), test)

    match node:
        case ast.Compare(ops=ops):
            for index, operator in enumerate(ops):
                yield node, changed(ops=[*ops[:index], SWAPS[type(operator)](), *ops[index + 1 :]])
        case ast.BoolOp(op=operator):
            yield node, changed(op=SWAPS[type(operator)]())
        case ast.BinOp(op=operator, left=left, right=right) if type(operator) in SWAPS:
            if not any(isinstance(side, ast.JoinedStr) or _is_string(side) for side in (left, right)):
                yield node, changed(op=SWAPS[type(operator)]())
        case ast.UnaryOp(op=ast.Not() | ast.USub(), operand=operand):
            yield node, operand
        case ast.Constant(value=bool(value)):
            yield node, ast.Constant(not value)
        case ast.Constant(value=int(value) | float(value)):
            yield node, ast.Constant(value + 1)
        case ast.If(test=test) | ast.While(test=test) if not isinstance(test, ast.Compare | ast.BoolOp):
            yield test, negated(test)
        case ast.IfExp(body=body, orelse=other):
            yield node, changed(body=other, orelse=body)
        case ast.comprehension(ifs=tests):
            for test in tests:
                yield test, ast.Constant(True)
        case ast.Return(value=value) if value and ast.unparse(value) != "None":
            yield node, ast.Return()
        case ast.Call(keywords=keywords):
            for word in keywords:
                if word.arg and word.arg not in NEUTRAL_KEYWORDS:
                    yield node, changed(keywords=[other for other in keywords if other is not word])
        case ast.Subscript(slice=ast.Slice(lower=lower, upper=upper) as bounds):
            for name in [name for name, bound in (("lower", lower), ("upper", upper)) if bound]:
                kept = {"lower": lower, "upper": upper, "step": bounds.step, name: None}
                yield node, changed(slice=ast.Slice(**kept))
        case ast.AugAssign() | ast.Raise() | ast.Delete() | ast.Continue() | ast.Break():
            yield node, ast.Pass()
        case ast.Expr(value=ast.Call()) if not _is_log_call(node):
            yield node, ast.Pass()
        case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]):
            yield node, ast.Pass()


def _is_string(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)
