"""Objects in Azure Blob Storage."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from mandapa.errors import InvalidInputError
from mandapa.object_store.cloud import CloudObjectStore, environ, require_metadata_service

if TYPE_CHECKING:
    from obstore.store import AzureConfig, AzureStore, ClientConfig

__all__ = ["AzureObjectStore"]

_AZURE_ENVIRONMENT = (
    "AZURE_STORAGE_ACCOUNT_KEY",
    "AZURE_STORAGE_ACCESS_KEY",
    "AZURE_STORAGE_MASTER_KEY",
    "AZURE_STORAGE_CLIENT_SECRET",
    "AZURE_CLIENT_SECRET",
    "AZURE_STORAGE_SAS_KEY",
    "AZURE_STORAGE_SAS_TOKEN",
    "AZURE_STORAGE_TOKEN",
    "AZURE_FEDERATED_TOKEN_FILE",
    "AZURE_MSI_ENDPOINT",
    "AZURE_IDENTITY_ENDPOINT",
    "AZURE_STORAGE_USE_EMULATOR",
    "AZURE_USE_AZURE_CLI",
    "AZURE_SKIP_SIGNATURE",
)


class AzureObjectStore(CloudObjectStore):
    """An object store in a container of Azure Blob Storage.

    Credentials are, in this order: the keywords; ``AZURE_STORAGE_CONNECTION_STRING``, ``AZURE_STORAGE_ACCOUNT_KEY`` and
    the other variables that obstore reads; the login of the ``az`` command; the machine's managed identity. Threads,
    forks and pickling: as for `S3ObjectStore`.

    Args:
        container: Its name.
        prefix: Where in the container the root is.
        account_name: Else ``AZURE_STORAGE_ACCOUNT_NAME``.
        account_key: Never shown.
        sas_token: Instead of a key; never shown.
        connection_string: Instead of all of these; never shown.
        endpoint_url: Of another server, with the account in its path.
        config: obstore's `AzureConfig`, for what no keyword covers.
        client_options: obstore's `ClientConfig` (proxy, certificates, timeouts).

    Example:
        >>> AzureObjectStore("team-container", "runs").url
        'az://team-container/runs'
    """

    _scheme = "az"
    _place = "container"
    _batch = 256
    _permissions: ClassVar[Mapping[str, str]] = {
        "read": "the role Storage Blob Data Reader",
        "look for": "the role Storage Blob Data Reader",
        "list": "the role Storage Blob Data Reader",
        "write": "the role Storage Blob Data Contributor",
        "create": "the role Storage Blob Data Contributor",
        "delete": "the role Storage Blob Data Contributor",
    }

    def __init__(
        self,
        container: str,
        prefix: str = "",
        *,
        account_name: str | None = None,
        account_key: str | None = None,
        sas_token: str | None = None,
        connection_string: str | None = None,
        endpoint_url: str | None = None,
        config: AzureConfig | None = None,
        client_options: ClientConfig | None = None,
    ) -> None:
        super().__init__(
            container,
            prefix,
            {
                "account_name": account_name,
                "account_key": account_key,
                "sas_token": sas_token,
                "connection_string": connection_string,
                "endpoint_url": endpoint_url,
                "config": config,
                "client_options": client_options,
            },
        )

    def _connect(self) -> AzureStore:
        from obstore.store import AzureStore

        options = self._options
        config: AzureConfig = {}
        text = options.get("connection_string")
        if not text and not options.get("account_name"):
            text = environ("AZURE_STORAGE_CONNECTION_STRING")
        if text:
            config |= _parse_connection_string(text)
        if name := options.get("account_name"):
            config["account_name"] = name
        if key := options.get("account_key"):
            config["account_key"] = key
        if token := options.get("sas_token"):
            config["sas_key"] = token
        if endpoint := options.get("endpoint_url"):
            config["endpoint"] = endpoint
        # What is given wins over whatever else the environment offers.
        if "account_key" in config:
            config["credential_type"] = "access_key"
        elif "sas_key" in config:
            config["credential_type"] = "sas_token"
        elif "config" not in options and not any(map(os.environ.get, _AZURE_ENVIRONMENT)):
            if shutil.which("az"):
                config["use_azure_cli"] = True
            else:
                require_metadata_service(self.url, "run 'az login', or set AZURE_STORAGE_ACCOUNT_KEY")
        return AzureStore(
            self._container,
            prefix=self._prefix or None,
            config={**config, **options.get("config", {})},
            client_options=self._client_options(config.get("endpoint") or environ("AZURE_STORAGE_ENDPOINT")),
            retry_config=self._retry_config(),
        )


def _parse_connection_string(text: str) -> AzureConfig:
    fields = dict(part.partition("=")[::2] for part in text.split(";") if part)
    if fields.get("UseDevelopmentStorage", "").lower() == "true":
        return {"use_emulator": True, "account_name": "devstoreaccount1"}
    config: AzureConfig = {}
    if name := fields.get("AccountName"):
        config["account_name"] = name
        if suffix := fields.get("EndpointSuffix"):
            config["endpoint"] = f"{fields.get('DefaultEndpointsProtocol', 'https')}://{name}.blob.{suffix}"
    if key := fields.get("AccountKey"):
        config["account_key"] = key
    if token := fields.get("SharedAccessSignature"):
        config["sas_key"] = token
    if endpoint := fields.get("BlobEndpoint"):
        config["endpoint"] = endpoint
    if not config:
        raise InvalidInputError("the Azure connection string has no AccountName and no BlobEndpoint")
    return config
