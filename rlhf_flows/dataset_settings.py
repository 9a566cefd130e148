"""What a configuration says of a dataset: where its rows are, and what makes items of them."""

from __future__ import annotations

from typing import Any

from pydantic import (
    Field,
    JsonValue,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from rlhf_flows.settings import Settings

__all__ = ["DatasetSettings"]


class DatasetSettings(Settings):
    """In place of the fields, the path alone may be given: `dataset=rows.jsonl`."""

    form_text = "File"
    form_title = "Rows of another type"

    path: str = Field(
        description="JSONL, JSON or Parquet file of rows, local or by URL (s3://bucket/key)."
    )
    type: str | None = Field(
        default=None,
        description="What makes items of the rows: a name that is registered (prompt_answer,"
        " rw_pair, prompt, or one of yours), or package.module:Class. By default what the recipe"
        " needs.",
    )
    args: dict[str, JsonValue] = Field(
        default_factory=dict, description="Arguments of one of your own, by name."
    )

    @model_validator(mode="before")
    @classmethod
    def _from_path(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value

    @model_serializer(mode="wrap")
    def _as_given(self, serialize: SerializerFunctionWrapHandler) -> Any:
        """The path alone is what run.json keeps where nothing else is said."""
        return self.path if self.type is None and not self.args else serialize(self)
