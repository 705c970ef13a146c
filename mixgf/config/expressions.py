"""The language of expressions over `obs`, which choose cells in a config: parser and refusals. Nothing is ever executed.

    expression = term, or terms joined by `and` (`&`), `or` (`|`), `not` (`~`) and parentheses
    term       = column OP value | value OP column | column OP column | column in [value, ...] | column
    OP         = ==  !=  <  <=  >  >=  in  not in
    column     = a name, or any text in backticks: `cell type`, `class`, `percent.mt`; a backtick in a name is written twice
    value      = 'text', "text", a number, True, False

`&`, `|` and `~` bind as `and`, `or` and `not` do. Comparisons may be chained (`0 < n_genes < 500`). A column alone must hold
true or false. `mixgf.corpus.obs_query` evaluates the parsed form.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass

from mixgf.errors import UserError

MAX_LENGTH = 100_000
"""Most characters of an expression."""
MAX_DEPTH = 50
"""Most parentheses and `not` inside each other."""
SHOWN = 100
"""Characters of an expression that a message shows."""

Value = str | int | float | bool
_TOKEN = re.compile(
    r"""\s*(?:
        (?P<quoted>`(?:[^`]|``)+`)
      | (?P<text>'(?:[^'\\\n]|\\.)*'|"(?:[^"\\\n]|\\.)*")
      | (?P<number>(?:\d[\d_]*\.?\d*|\.\d+)(?:[eE][+-]?\d+)?(?![\w.]))
      | (?P<name>[^\W\d]\w*)
      | (?P<sign>==|!=|<=|>=|<>|&&|\|\||[<>()\[\]{},&|~.=@!+*/%:;^-])
      | (?P<end>\Z)
    )""",
    re.VERBOSE,
)
_RESERVED = {"and", "or", "not", "in", "True", "False"}
_WORDS = {"&": "and", "|": "or", "~": "not"}
_COMPARISONS = ("==", "!=", "<=", ">=", "<", ">")
_FLIPPED = {"<": ">", "<=": ">=", ">": "<", ">=": "<=", "==": "==", "!=": "!="}
_EXAMPLE = "write for example cell_type == 'alpha' and donor != 'd1'"
_BACKTICKS = "a column whose name is no plain word stands in backticks, for example `cell type` or `percent.mt`"
_REFUSED = {
    "=": "'=' compares nothing; write == for equal",
    "<>": "write != for unequal",
    "&&": "write and",
    "||": "write or",
    "!": "write not, or != for unequal",
    "@": "variables cannot be used; write the value",
    ".": f"attributes and methods cannot be used; {_BACKTICKS}",
}


@dataclass(frozen=True, slots=True)
class Column:
    """A column of `obs`; alone, it must hold true or false."""

    name: str


@dataclass(frozen=True, slots=True)
class Compare:
    """A column compared with a value, with another column, or (`in`, `not in`) with a list of values."""

    column: Column
    operator: str
    other: Column | Value | tuple[Value, ...]


@dataclass(frozen=True, slots=True)
class Not:
    item: Expression


@dataclass(frozen=True, slots=True)
class Joined:
    """Expressions joined by `and` or `or`."""

    word: str
    items: tuple[Expression, ...]


Expression = Column | Compare | Not | Joined


def parse_expression(text: str, field: str) -> Expression:
    """The parsed form of an expression over `obs`.

    Raises:
        UserError: The text is not an expression of this language. The message names the field.
    """
    if len(text) > MAX_LENGTH:
        msg = f"{field}: an expression of {len(text):,} characters; at most {MAX_LENGTH:,} are allowed"
        raise UserError(msg)
    return _Parser(text, field).whole()


def check_expression(text: str, field: str) -> None:
    """Check that a setting is empty or can be parsed."""
    if text.strip():
        parse_expression(text, field)


def shortened(text: str) -> str:
    """The expression as Python text, cut to `SHOWN` characters."""
    return repr(text if len(text) <= SHOWN else text[: SHOWN - 3] + "...")


def quoted(column: str) -> str:
    """The column's name as an expression has it: in backticks unless it is a plain word."""
    plain = re.fullmatch(r"[^\W\d]\w*", column) and column not in _RESERVED
    return column if plain else "`" + column.replace("`", "``") + "`"


def literal(value: Value) -> str:
    """The value as an expression has it."""
    return repr(value)


@dataclass(frozen=True, slots=True)
class _Token:
    kind: str
    text: str
    """The name of a column without backticks, the raw text of everything else."""


class _Parser:
    """Recursive descent over the tokens of one expression."""

    def __init__(self, text: str, field: str) -> None:
        self.text, self.field = text, field
        self.tokens = list(self._split())
        self.at = self.depth = 0

    def refuse(self, why: str) -> UserError:
        return UserError(f"{self.field} = {shortened(self.text)}: cannot be read: {why}")

    def _split(self) -> Iterator[_Token]:
        at = 0
        while True:
            found = _TOKEN.match(self.text, at)
            if found is None:
                rest = self.text[at:].strip()[:20]
                why = {"`": "a backtick is not closed", "'": "a quote is not closed", '"': "a quote is not closed"}
                raise self.refuse(why.get(rest[:1], f"{rest!r} is no part of an expression; {_BACKTICKS}"))
            kind, at = str(found.lastgroup), found.end()
            token = found[kind]
            if kind == "quoted":
                yield _Token("column", token[1:-1].replace("``", "`"))
            elif kind == "name" and token not in _RESERVED:
                yield _Token("column", token)
            elif kind in {"name", "sign"}:
                yield _Token("sign", _WORDS.get(token, token))
            else:
                yield _Token(kind, token)
            if kind == "end":
                return

    @property
    def next(self) -> _Token:
        return self.tokens[self.at]

    def take(self, *signs: str) -> str:
        """The next token, where it is one of the signs; else an empty string."""
        if self.next.kind == "sign" and self.next.text in signs:
            self.at += 1
            return self.tokens[self.at - 1].text
        return ""

    def whole(self) -> Expression:
        found = self.joined()
        if self.next.kind != "end":
            raise self.refuse(self._unexpected())
        return found

    def _unexpected(self) -> str:
        token = self.next
        before = self.tokens[self.at - 1].kind if self.at else ""
        if token.kind == "sign" and token.text in {"(", "["} and before == "column":
            return "functions and subscripts cannot be used; write for example cell_type in ['alpha', 'beta']"
        if token.kind == "sign" and token.text in _REFUSED:
            return _REFUSED[token.text]
        if token.kind == "sign" and token.text in "+-*/%^":
            return f"arithmetic ({token.text}) cannot be used; compare a column with a value"
        if token.kind == "end":
            return f"it ends too early; {_EXAMPLE}"
        if token.kind == "column" and before == "column":
            return f"two names without a comparison between them; {_BACKTICKS}"
        return f"unexpected {token.text[:20]!r}; {_EXAMPLE}"

    def joined(self, word: str = "or") -> Expression:
        items = [self.joined("and") if word == "or" else self.negated()]
        while self.take(word):
            items.append(self.joined("and") if word == "or" else self.negated())
        return items[0] if len(items) == 1 else Joined(word, tuple(items))

    def negated(self) -> Expression:
        with_not = 0
        while self.take("not"):
            with_not += 1
        found = self.comparison()
        return Not(found) if with_not % 2 else found

    def comparison(self) -> Expression:
        if self.next == _Token("sign", "(") and not self._is_list():
            self.at += 1
            self.depth += 1
            if self.depth > MAX_DEPTH:
                raise self.refuse(f"more than {MAX_DEPTH} parentheses inside each other")
            inside = self.joined()
            self.depth -= 1
            if not self.take(")"):
                raise self.refuse("a parenthesis is not closed" if self.next.kind == "end" else self._unexpected())
            return inside
        left = self.operand()
        terms: list[Expression] = []
        while operator := self._operator():
            right = self.operand()
            terms.append(self._term(left, operator, right))
            left = right
        if terms:
            return terms[0] if len(terms) == 1 else Joined("and", tuple(terms))
        if self.next.kind not in {"end"} and self.next.text not in {"and", "or", ")"}:
            raise self.refuse(self._unexpected())
        if not isinstance(left, Column):
            raise self.refuse(f"a value alone; it must be true or false for each cell: {_EXAMPLE}")
        return left

    def _operator(self) -> str:
        if operator := self.take(*_COMPARISONS, "in"):
            return operator
        if self.next == _Token("sign", "not") and self.tokens[self.at + 1] == _Token("sign", "in"):
            self.at += 2
            return "not in"
        return ""

    def _is_list(self) -> bool:
        """Whether a parenthesis encloses a value or a list of values, not an expression."""
        ahead = self.at + 1
        ahead += self.tokens[ahead] == _Token("sign", "-")
        one = self.tokens[ahead]
        value = one.kind in {"text", "number"} or one.text in {"True", "False"}
        return value and self.tokens[ahead + 1].text in {",", ")"} and self.tokens[ahead + 1].kind == "sign"

    def operand(self) -> Column | Value | tuple[Value, ...]:
        if self.next.kind == "column":
            self.at += 1
            return Column(self.tokens[self.at - 1].text)
        if opened := self.take("[", "(", "{"):
            closing = {"[": "]", "(": ")", "{": "}"}[opened]
            values: list[Value] = []
            comma = ""
            while not self.take(closing):
                if values and not comma:
                    raise self.refuse("a list is not closed" if self.next.kind == "end" else self._unexpected())
                values.append(self.value())
                comma = self.take(",")
            return values[0] if opened == "(" and len(values) == 1 and not comma else tuple(values)
        return self.value()

    def value(self) -> Value:
        if truth := self.take("True", "False"):
            return truth == "True"
        negative = bool(self.take("-"))
        token = self.next
        if token.kind == "number" or (token.kind == "text" and not negative):
            self.at += 1
            try:
                found: Value = ast.literal_eval(token.text)  # a literal of text or number, by the pattern of the token
            except (ValueError, SyntaxError):
                raise self.refuse(f"{token.text[:20]} is no value") from None
            return -found if negative and not isinstance(found, str) else found
        raise self.refuse(self._unexpected())

    def _term(self, left: object, operator: str, right: object) -> Expression:
        """One comparison, its column on the left."""
        if isinstance(left, tuple) or (isinstance(right, tuple) and not right):
            raise self.refuse("a list stands right of in, ==, or != and holds at least one value")
        if operator in {"in", "not in"}:
            if not isinstance(left, Column) or not isinstance(right, tuple):
                raise self.refuse(f"{operator} needs a column and a list: cell_type {operator} ['alpha', 'beta']")
            return Compare(left, operator, right)
        if isinstance(right, tuple):
            if operator not in {"==", "!="}:
                raise self.refuse(f"{operator} compares with one value, not with a list")
            right_in = "in" if operator == "==" else "not in"
            if not isinstance(left, Column):
                raise self.refuse(f"no column in a comparison; {_EXAMPLE}")
            return Compare(left, right_in, right)
        if isinstance(left, Column):
            assert isinstance(right, Column | str | int | float), "a value"
            return Compare(left, operator, right)
        if isinstance(right, Column):
            assert isinstance(left, str | int | float), "a value"
            return Compare(right, _FLIPPED[operator], left)
        raise self.refuse(f"no column in a comparison; text in quotes is a value: {_EXAMPLE}")
