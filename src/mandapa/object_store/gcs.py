"""Objects in Google Cloud Storage."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from mandapa.object_store.cloud import CloudObjectStore, require_metadata_service

if TYPE_CHECKING:
    from obstore.store import ClientConfig, GCSConfig, GCSStore

__all__ = ["GCSObjectStore"]

_GCS_ENVIRONMENT = (
    "GOOGLE_APPLICATION_CREDENTIALS",
    "GOOGLE_SERVICE_ACCOUNT",
    "GOOGLE_SERVICE_ACCOUNT_PATH",
    "GOOGLE_SERVICE_ACCOUNT_KEY",
    "GOOGLE_BEARER_TOKEN",
    "GOOGLE_SKIP_SIGNATURE",
)
_GCLOUD_LOGIN = "~/.config/gcloud/application_default_credentials.json"


class GCSObjectStore(CloudObjectStore):
    """An object store in a bucket of Google Cloud Storage.

    Credentials are, in this order: the keyword; ``GOOGLE_APPLICATION_CREDENTIALS`` and the other variables that obstore
    reads; the file that ``gcloud auth application-default login`` writes; the metadata service. Threads, forks and
    pickling: as for `S3ObjectStore`.

    Args:
        bucket: Its name.
        prefix: Where in the bucket the root is.
        service_account: The path of a service account's key file, or its JSON.
        endpoint_url: Of another server that speaks GCS's XML API.
        anonymous: Do not sign: for public buckets.
        config: obstore's `GCSConfig`, for what no keyword covers.
        client_options: obstore's `ClientConfig` (proxy, certificates, timeouts).

    Example:
        >>> GCSObjectStore("team-bucket", "runs").url
        'gs://team-bucket/runs'
    """

    _scheme = "gs"
    _place = "bucket"
    _batch = 100
    _permissions: ClassVar[Mapping[str, str]] = {
        "read": "storage.objects.get (or storage.objects.list: without it GCS says 403 for a missing key)",
        "look for": "storage.objects.get (or storage.objects.list: without it GCS says 403 for a missing key)",
        "list": "storage.objects.list",
        "write": "storage.objects.create (and storage.objects.delete, to replace an object)",
        "create": "storage.objects.create",
        "delete": "storage.objects.delete",
    }

    def __init__(
        self,
        bucket: str,
        prefix: str = "",
        *,
        service_account: str | None = None,
        endpoint_url: str | None = None,
        anonymous: bool = False,
        config: GCSConfig | None = None,
        client_options: ClientConfig | None = None,
    ) -> None:
        super().__init__(
            bucket,
            prefix,
            {
                "service_account": service_account,
                "endpoint_url": endpoint_url,
                "anonymous": anonymous,
                "config": config,
                "client_options": client_options,
            },
        )

    def _connect(self) -> GCSStore:
        from obstore.store import GCSStore

        options = self._options
        endpoint = options.get("endpoint_url")
        account: str | None = options.get("service_account")
        config: GCSConfig = {}
        if options.get("anonymous"):
            # obstore's skip_signature covers reads only; a key that says "no OAuth" covers everything.
            key = {"disable_oauth": True, "client_email": "", "private_key": "", "private_key_id": ""}
            config["service_account_key"] = json.dumps({**key, "gcs_base_url": endpoint} if endpoint else key)
        elif account:
            config["service_account_key" if account.lstrip().startswith("{") else "service_account"] = account
        elif not any(map(os.environ.get, _GCS_ENVIRONMENT)) and not os.path.exists(os.path.expanduser(_GCLOUD_LOGIN)):
            require_metadata_service(
                self.url,
                "run 'gcloud auth application-default login', or set GOOGLE_APPLICATION_CREDENTIALS to a key file",
            )
        if endpoint:
            config["base_url"] = endpoint
        return GCSStore(
            self._container,
            prefix=self._prefix or None,
            config={**config, **options.get("config", {})},
            client_options=self._client_options(endpoint),
            retry_config=self._retry_config(),
        )
