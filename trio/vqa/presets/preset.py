"""A data set as questions: where it lies, which columns are asked about, and how it is scored."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import reduce
from typing import TYPE_CHECKING, Any

from trio.errors import UserError
from trio.vqa.presets.column_expressions import ColumnExpression
from trio.vqa.presets.prompt_template import PromptTemplate
from trio.vqa.presets.row_values import Row, as_text, column_of

if TYPE_CHECKING:
    import pyarrow as pa

_DEFAULT = "default"
_IMAGE = "image"


@dataclass(frozen=True, kw_only=True, slots=True)
class PictureJoin:
    """Pictures that lie in another config of the same repository."""

    config: str
    key: str
    """Column there that names a picture."""
    by: str
    """Column of the questions that holds that name."""
    image: str = _IMAGE
    """Column of the pictures there."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """What is asked about the picture of a row."""

    prompt: str
    fields: dict[str, Any]
    """What its metric needs, as JSON has it; missing values are left out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Preset:
    """A data set as questions; every field but `prompt` has a default in a user's own file."""

    name: str
    prompt: PromptTemplate
    """Its names are those of `fields`, or else columns."""
    repositories: tuple[str, ...] = ()
    """On the Hub: the present name, then former ones."""
    config: str = _DEFAULT
    """`default` lies under data/, any other in a directory of its name."""
    split: str = "test"
    splits: tuple[str, ...] = ()
    """Others that are known."""
    files: tuple[str, ...] = ()
    """Patterns of files that are named in another way than by config and split."""
    image: str = _IMAGE
    """Column of the picture, or of a list of pictures."""
    images: PictureJoin | None = None
    """Where pictures are not in the same file."""
    id: tuple[str, ...] = ()
    """Columns that name a row together; none: its place in the file does."""
    fields: Mapping[str, ColumnExpression] = field(default_factory=dict)
    """What is written beside the answer, for the metric."""
    metric: str | None = None
    """One of `trio.vqa.aggregates.METRICS`."""
    explode: str | None = None
    """Column of a list: a question for each element, which then stands for the column."""
    missing: tuple[str, ...] = ()
    """Texts of a column that stand for a missing value."""
    optional: tuple[str, ...] = ()
    """Columns that a file may lack: their values are missing then."""
    notice: str | None = None
    """What one should know before believing the figures."""
    dotted: frozenset[str] = frozenset()
    """Columns with a dot in their own names."""

    @property
    def columns(self) -> frozenset[str]:
        """Columns to read where they are there, without that of the pictures."""
        paths = (column_of(path, self.dotted) for path in self.prompt.fields)
        prompt = set(paths) - self.fields.keys()
        of_fields = (expression.columns for expression in self.fields.values())
        single = {*self.id, *((self.explode,) if self.explode else ())}
        columns = reduce(frozenset.union, of_fields, frozenset(prompt | single))
        return columns | {self.images.by} if self.images else columns - {self.image}

    def check(self, schema: pa.Schema, path: str) -> None:
        """See that a file of questions has what is needed.

        Raises:
            UserError: it lacks columns; names them, and those it has.
        """
        needed = self.columns if self.images else self.columns | {self.image}
        self._check(needed - set(self.optional), schema, path)

    def check_pictures(self, schema: pa.Schema, path: str) -> None:
        """The same of a file of pictures, where these are joined."""
        if self.images is not None:
            self._check((self.images.key, self.images.image), schema, path)

    def _check(self, needed: Iterable[str], schema: pa.Schema, path: str) -> None:
        lacking = sorted(set(needed) - set(schema.names))
        if lacking:
            raise UserError(
                f"{path}: preset {self.name!r} needs {', '.join(map(repr, lacking))}, but the "
                f"columns are {', '.join(schema.names)}; is it a file of this data set? For other "
                "names, write a preset of your own"
            )

    def patterns(self) -> tuple[str, ...]:
        """Patterns of the questions' files below a repository or directory, best first."""
        return (*_patterns(self.config, self.split), *self.files)

    def picture_patterns(self) -> tuple[str, ...]:
        """The same of joined pictures; none where there is no join."""
        return _patterns(self.images.config, self.split) if self.images else ()

    def key(self, row: Row) -> Any:
        """What names a row.

        Returns:
            The value of its id column as it is; of several, a text with "/" between them; None
            where its place in the file names it. Exploded questions share it.

        Raises:
            UserError: an id column is missing, or null.
        """
        for name in self.id:
            if row.get(name) is None:
                raise UserError(f"a row has no {name!r}, which is part of its id")
        if len(self.id) == 1:
            return row[self.id[0]]
        return "/".join(as_text(row[name], name) for name in self.id) or None

    def questions(self, row: Row) -> list[Question]:
        """What is asked about a row: one question, or with `explode` any number.

        Args:
            row: the value of each of `columns`, and of the image column True or None; those that
                are optional may be absent.

        Raises:
            UserError: a value is not what the prompt or a field can be made of.
        """
        seen = dict.fromkeys(self.optional) | {
            name: None if value in self.missing else value for name, value in row.items()
        }
        if self.explode is None:
            return [self._question(seen)]
        elements = seen.get(self.explode)
        if not isinstance(elements, list):
            elements = [] if elements is None else [elements]
        return [self._question(seen | {self.explode: element}) for element in elements]

    def _question(self, row: Row) -> Question:
        values = {name: self._value(name, row) for name in self.fields}
        return Question(
            prompt=self.prompt.fill({**row, **values}),
            fields={name: value for name, value in values.items() if value is not None},
        )

    def _value(self, name: str, row: Row) -> Any:
        try:
            return self.fields[name].of(row)
        except UserError as error:
            raise UserError(f"field {name!r}: {error}") from error


def _patterns(config: str, split: str) -> tuple[str, ...]:
    if config == _DEFAULT:
        return f"data/{split}-*.parquet", f"{split}-*.parquet"
    return (f"{config}/{split}-*.parquet",)
