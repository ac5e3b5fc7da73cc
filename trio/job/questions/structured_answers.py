"""Settings of structured answers. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from trio.engine.request import Constraint
from trio.errors import UserError, first_line
from trio.job.questions.question_settings import different_texts
from trio.job.storage import check_no_secret, locate, read_bytes
from trio.values import Text, Value, accepted


@dataclass(frozen=True, kw_only=True, slots=True)
class Structured:
    """What answers must be; one that --max-new-tokens cuts before is an error."""

    json_schema: Annotated[str | None, Value(read=accepted(check_no_secret), unit="FILE")] = None
    """JSON, without white space between its parts, that is valid by this file's JSON schema."""
    regex: Text | None = None
    """Text all of which matches this regular expression, as in '[0-9]{1,3} (cats|dogs)'."""
    choices: Annotated[tuple[str, ...] | None, Value(read=different_texts, unit="TEXT,...")] = None
    """One of these texts, of any number of words, as in 'yes,no,not sure': the model writes it,
    whereas the candidates of vqa.py are scored."""

    def __post_init__(self) -> None:
        given = [name for name in ("json_schema", "regex", "choices") if getattr(self, name)]
        if len(given) > 1:
            flags = " and ".join(f"--{name.replace('_', '-')}" for name in given)
            raise UserError(f"{flags} exclude each other: give one of them")

    def constraint(self) -> Constraint | None:
        """For the engine, with the file's content.

        Raises:
            UserError: the file cannot be read.
        """
        if self.json_schema is not None:
            try:
                text = read_bytes(locate(self.json_schema)).decode()
            except (OSError, UnicodeDecodeError) as error:
                told = f"--json-schema {self.json_schema}: cannot be read: {first_line(error)}"
                raise UserError(told) from error
            return Constraint(json_schema=text)
        if self.regex is None and self.choices is None:
            return None
        return Constraint(regex=self.regex, choices=self.choices or ())
