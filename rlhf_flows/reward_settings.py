"""What a configuration says of a reward: a function, model, program, service, or one's own."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, JsonValue, SecretStr, model_validator

from rlhf_flows.settings import Settings

__all__ = ["RewardSettings"]

SOURCES = ("function", "model", "classifier", "command", "url", "interface")


class RewardSettings(Settings):
    """Exactly one source. In place of the fields, a function's name alone may be given:
    `reward=package.module:function`.
    """

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
    command: tuple[str, ...] | None = Field(
        default=None,
        description="A program and its arguments, started once for each sample, which it reads as"
        " JSON from standard input; it writes the reward to standard output.",
    )
    url: str | None = Field(
        default=None, description="An HTTP service that is sent samples as JSON by POST."
    )
    token: SecretStr | None = Field(
        default=None, description="Of the service: sent as a bearer token."
    )
    interface: str | None = Field(
        default=None, description="An interface that is registered, or package.module:Class."
    )
    args: dict[str, JsonValue] = Field(
        default_factory=dict, description="Arguments of an interface, by name."
    )
    timeout_s: float = Field(default=60.0, gt=0, description="Longest that one call may take.")
    memory_mb: int = Field(
        default=1024, ge=16, description="Most memory of a command, with all it starts."
    )
    max_concurrency: int = Field(
        default=8, ge=1, description="Commands, or requests to a service, at the same time."
    )
    retries: int = Field(
        default=3, ge=0, description="Further tries of a request that failed for a passing cause."
    )
    on_failure: Literal["stop", "score"] = Field(
        default="stop",
        description="A sample whose reward fails ends the run, or is given failure_reward and"
        " keeps the cause in its column reward_failure.",
    )
    failure_reward: float = Field(default=0.0, description="With on_failure=score.")

    @model_validator(mode="before")
    @classmethod
    def _from_function(cls, value: Any) -> Any:
        return {"function": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        given = [name for name in SOURCES if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"a reward needs one of {', '.join(SOURCES)}, found"
                f" {' and '.join(given) or 'none of them'}"
            )
        return self
