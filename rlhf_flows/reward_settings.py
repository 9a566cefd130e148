"""What a configuration says of a reward: a function, model, program, service, or one's own.

The decision here: no secret is a field. A service's token is named by the environment variable that
holds it (`token_env`), and read on the worker: what is written here goes into run.json, into the
actors' specification and into Prefect's database.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self
from urllib.parse import urlsplit

from pydantic import (
    Field,
    JsonValue,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from rlhf_flows.settings import Settings

__all__ = ["OnFailure", "RewardSettings", "ScoredText"]

OnFailure = Literal["stop", "score"]
ScoredText = Literal["whole", "completion", "pair"]

SOURCES = ("function", "model", "classifier", "command", "url", "interface")

_OF = {
    "label": ("classifier",),
    "scored_text": ("classifier",),
    "environment": ("command",),
    "memory_mb": ("command",),
    "token_env": ("url",),
    "request_size": ("url",),
    "retries": ("url",),
    "args": ("interface",),
    "timeout_s": ("function", "command", "url"),
    "max_concurrency": ("function", "command", "url"),
    "on_failure": ("function", "classifier", "command", "url"),
    "failure_reward": ("function", "classifier", "command", "url"),
}
"""Which sources a field has a meaning for."""


class RewardSettings(Settings):
    """Exactly one source. In place of the fields, a function's name alone may be given:
    `reward=package.module:function`.
    """

    form_text = "Function"
    form_title = "Model, program, service"
    form_first: ClassVar[tuple[str, ...]] = ("model", "classifier", "command", "url", "interface")
    form_last: ClassVar[tuple[str, ...]] = ("function",)

    function: str | None = Field(
        default=None, description="A function of yours: package.module:function."
    )
    model: str | None = Field(
        default=None,
        description="A folder with a reward model, such as the recipe reward_model exports.",
    )
    classifier: str | None = Field(
        default=None,
        description="A folder with a Hugging Face sequence classifier and its own tokenizer, such"
        " as a sentiment model: texts are tokenized again for it.",
    )
    label: str | int | None = Field(
        default=None,
        description="Of a classifier: the label whose logit is the reward, by name or number; the"
        " last one by default.",
    )
    scored_text: ScoredText = Field(
        default="whole",
        description="What a classifier reads: prompt and completion as one text, the completion"
        " alone, or both as a pair of texts.",
    )
    command: tuple[str, ...] | None = Field(
        default=None,
        description="A program and its arguments, started once for each sample, which it reads as"
        " JSON from standard input; it writes the reward to standard output.",
    )
    environment: tuple[str, ...] = Field(
        default=(),
        description="Environment variables of the worker that the command is given, by name,"
        " besides PATH, HOME, TMPDIR and LANG.",
    )
    memory_mb: int = Field(
        default=1024, ge=16, description="Most memory of a command, with all it starts, in MiB."
    )
    url: str | None = Field(
        default=None, description="An HTTP service that is sent samples as JSON by POST."
    )
    token_env: str | None = Field(
        default=None,
        description="Of a service: the environment variable of the worker that holds its token,"
        " sent as a bearer token. The token itself is never part of a configuration.",
    )
    request_size: int = Field(
        default=16, ge=1, description="Most samples in one request to a service."
    )
    retries: int = Field(
        default=3, ge=0, description="Further tries of a request that failed for a passing cause."
    )
    interface: str | None = Field(
        default=None, description="An interface that is registered, or package.module:Class."
    )
    args: dict[str, JsonValue] = Field(
        default_factory=dict, description="Arguments of an interface, by name."
    )
    timeout_s: float | None = Field(
        default=None,
        gt=0,
        description="Longest that one call, command or request may take; 60 by default. A function"
        " that is not async is stopped where this is given, or on_failure=score.",
    )
    max_concurrency: int | None = Field(
        default=None,
        ge=1,
        description="Calls of an async function (64 by default), commands (one for each thread of"
        " the worker) or requests (8) at the same time.",
    )
    on_failure: OnFailure = Field(
        default="stop",
        description="A sample whose reward fails ends the run, or is given failure_reward and"
        " keeps the cause in its column reward_failure.",
    )
    failure_reward: float = Field(
        default=0.0, description="The reward of a sample that failed, with on_failure=score."
    )

    @model_validator(mode="before")
    @classmethod
    def _from_function(cls, value: Any) -> Any:
        return {"function": value} if isinstance(value, str) else value

    @field_validator("url")
    @classmethod
    def _holds_no_secret(cls, value: str | None) -> str | None:
        if value is not None and "@" in urlsplit(value).netloc:
            raise ValueError(
                "the url of a reward holds a user name or password, which would be kept with the"
                " run: put the token into an environment variable of the workers, and name that as"
                " token_env"
            )
        return value

    @field_validator("command", mode="before")
    @classmethod
    def _is_split(cls, value: Any) -> Any:
        if isinstance(value, str):
            raise ValueError(
                f"the command of a reward is the text {value!r}, expected a list of the program"
                f" and its arguments, such as {value.split()}: no shell reads it"
            )
        return value

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        given = [name for name in SOURCES if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"a reward needs one of {', '.join(SOURCES)}, found"
                f" {' and '.join(given) or 'none of them'}"
            )
        for name, sources in _OF.items():
            default = type(self).model_fields[name].get_default(call_default_factory=True)
            if given[0] not in sources and getattr(self, name) != default:
                raise ValueError(
                    f"reward.{name} has no meaning for a {given[0]}: it is for"
                    f" {' and '.join(sources)}, so leave it out"
                )
        return self

    @property
    def source(self) -> str:
        """The name of the one source that is given."""
        return next(name for name in SOURCES if getattr(self, name) is not None)

    @model_serializer(mode="wrap")
    def _as_given(self, handler: SerializerFunctionWrapHandler) -> Any:
        # What run.json keeps: a field that a later version adds is no difference between two
        # starts of a run, nor is a function's name, alone, as runs of old have it.
        fields = type(self).model_fields
        given = {
            name: value
            for name, value in handler(self).items()
            if getattr(self, name) != fields[name].get_default(call_default_factory=True)
        }
        return self.function if list(given) == ["function"] else given
