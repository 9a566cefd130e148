"""Where everything durable of a run goes, as a block: a folder, or a bucket of any S3 server."""

from __future__ import annotations

import os
from typing import ClassVar, Literal

from prefect.blocks.core import Block
from pydantic import Field, HttpUrl, SecretStr, model_validator

from rlhf_flows.config import StoreConfig

__all__ = ["EpisodeStore"]


class EpisodeStore(Block):
    """
    Where runs keep their episodes, checkpoints and weights.

    Attributes:
        url: A folder or a bucket.
        endpoint_url: The S3 server, where it is not Amazon's.
        addressing_style: Where the bucket's name stands.
        access_key_id: The access key.
        secret_access_key: The secret that belongs to it.
        session_token: Of temporary credentials.
        region: Of the bucket.
        retry_budget_s: How long an outage is waited for.

    Example:
        Keep the episodes of a run in a bucket:
        ```python
        from rlhf_flows.blocks import EpisodeStore

        store = EpisodeStore.load("BLOCK_NAME")
        store.export_credentials()
        config = {"store": store.to_config().model_dump()}
        ```
    """

    _block_type_name: ClassVar[str | None] = "RLHF Episode Store"
    _block_type_slug: ClassVar[str | None] = "rlhf-episode-store"
    _logo_url: ClassVar[HttpUrl | None] = HttpUrl(
        "https://cdn.sanity.io/images/3ugk85nk/production/"
        "d74b16fe84ce626345adf235a47008fea2869a60-225x225.png"
    )
    _documentation_url: ClassVar[HttpUrl | None] = HttpUrl(
        "https://docs.aws.amazon.com/AmazonS3/latest/userguide/conditional-writes.html"
    )

    url: str = Field(
        title="URL", description="A folder, file://... or s3://bucket/prefix, without credentials."
    )
    endpoint_url: str | None = Field(
        default=None,
        title="Endpoint",
        description="Address of an S3 server other than Amazon's.",
    )
    addressing_style: Literal["path", "virtual"] | None = Field(
        default=None,
        title="Addressing style",
        description="Whether the bucket stands in the path or in front of the host; by default in"
        " the path where there is an endpoint, else as Amazon asks for it.",
    )
    access_key_id: str | None = Field(
        default=None,
        title="Access key",
        description="Access key; by default what the worker's environment has.",
    )
    secret_access_key: SecretStr | None = Field(
        default=None, title="Secret key", description="Secret of the access key."
    )
    session_token: SecretStr | None = Field(
        default=None, title="Session token", description="Session token of temporary credentials."
    )
    region: str | None = Field(default=None, title="Region", description="Region of the bucket.")
    single_writer: bool = Field(
        default=False,
        title="Single writer",
        description="Accept a store without working put-if-absent; safe only if no two processes"
        " ever work on one run.",
    )

    retry_budget_s: float = Field(
        default=120.0,
        ge=0,
        title="Retry budget (s)",
        description="How long an outage of the store is waited for before the run fails.",
    )

    @model_validator(mode="after")
    def _whole_credentials(self) -> EpisodeStore:
        if (self.access_key_id is None) != (self.secret_access_key is None):
            raise ValueError(
                "access_key_id and secret_access_key belong together: give both, or neither to"
                " use those of the worker's environment"
            )
        return self

    def to_config(self) -> StoreConfig:
        """The `store` part of a run's configuration. Holds no secret."""
        return StoreConfig(
            url=self.url, single_writer=self.single_writer, retry_budget_s=self.retry_budget_s
        )

    def export_credentials(self) -> None:
        """Puts endpoint and credentials into the environment of this process, and of its children.

        A Ray cluster that runs already does not see them: its nodes have their own.
        """
        values = {
            "AWS_ENDPOINT_URL": self.endpoint_url,
            "RLHF_FLOWS_S3_ADDRESSING_STYLE": self.addressing_style,
            "AWS_ACCESS_KEY_ID": self.access_key_id,
            "AWS_SECRET_ACCESS_KEY": _plain(self.secret_access_key),
            "AWS_SESSION_TOKEN": _plain(self.session_token),
            "AWS_DEFAULT_REGION": self.region,
        }
        os.environ.update({name: value for name, value in values.items() if value is not None})

    def check(self) -> None:
        """Opens the store with these credentials and races for an object in it.

        Raises:
            StoreError: it cannot be used, with the reason.
            StoreProbeError: it does not hold its promise of put-if-absent.
        """
        from rlhf_flows.store import open_store, probe_put_if_absent  # pyarrow, s3fs

        self.export_credentials()
        store = open_store(self.url)
        if not self.single_writer:
            probe_put_if_absent(store)


def _plain(secret: SecretStr | None) -> str | None:
    return None if secret is None else secret.get_secret_value()
