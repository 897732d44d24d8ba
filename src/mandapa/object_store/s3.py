"""Objects in S3, and in what speaks its language."""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any, ClassVar

from mandapa.errors import AccessDeniedError, InvalidInputError, MandapaError
from mandapa.object_store.cloud import CloudObjectStore, check_endpoint, environ, require_metadata_service

if TYPE_CHECKING:
    from obstore.store import ClientConfig, S3Config, S3Credential, S3CredentialProvider, S3Store

__all__ = ["S3ObjectStore"]

_S3_ENVIRONMENT = (
    "AWS_ACCESS_KEY_ID",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    "AWS_SKIP_SIGNATURE",
)


class S3ObjectStore(CloudObjectStore):
    """An object store in a bucket of S3, or of a server that speaks S3 with ``If-None-Match``.

    Credentials are, in this order: the keywords; the usual environment variables (``AWS_ACCESS_KEY_ID``, web identity,
    container); with boto3 installed (``pip install 'mandapa[aws]'``) whatever it finds: profiles, config files, SSO,
    instance; else the instance's metadata service. Looking for them fails within seconds, not minutes.

    Safe to use from threads. After a process has used one, a child that it forks gets a `ClosedError`. Pickling takes
    the arguments along, secrets included, and opens anew on the other side.

    Args:
        bucket: Its name.
        prefix: Where in the bucket the root is.
        endpoint_url: Of another server than AWS; else ``AWS_ENDPOINT_URL_S3``, ``AWS_ENDPOINT_URL``. Only an ``http://``
            here lets data travel unencrypted.
        region: Else ``AWS_REGION``, ``AWS_DEFAULT_REGION``, the profile's, ``us-east-1``.
        access_key_id: With ``secret_access_key``, and ``session_token`` for temporary ones.
        secret_access_key: Never shown.
        session_token: Never shown.
        profile: Of the AWS config files; needs boto3.
        anonymous: Do not sign: for public buckets.
        config: obstore's `S3Config`, for what no keyword covers (encryption, requester pays).
        client_options: obstore's `ClientConfig` (proxy, certificates, timeouts).

    Example:
        >>> S3ObjectStore("team-bucket", "runs").url
        's3://team-bucket/runs'
    """

    _scheme = "s3"
    _place = "bucket"
    _batch = 1000
    _permissions: ClassVar[Mapping[str, str]] = {
        "read": "s3:GetObject (or s3:ListBucket: without it S3 says 403 for a missing key)",
        "look for": "s3:GetObject (or s3:ListBucket: without it S3 says 403 for a missing key)",
        "list": "s3:ListBucket",
        "write": "s3:PutObject",
        "create": "s3:PutObject",
        "delete": "s3:DeleteObject",
    }

    def __init__(
        self,
        bucket: str,
        prefix: str = "",
        *,
        endpoint_url: str | None = None,
        region: str | None = None,
        access_key_id: str | None = None,
        secret_access_key: str | None = None,
        session_token: str | None = None,
        profile: str | None = None,
        anonymous: bool = False,
        config: S3Config | None = None,
        client_options: ClientConfig | None = None,
    ) -> None:
        if bool(access_key_id) != bool(secret_access_key):
            raise InvalidInputError("access_key_id and secret_access_key go together")
        super().__init__(
            bucket,
            prefix,
            {
                "endpoint_url": endpoint_url,
                "region": region,
                "access_key_id": access_key_id,
                "secret_access_key": secret_access_key,
                "session_token": session_token,
                "profile": profile,
                "anonymous": anonymous,
                "config": config,
                "client_options": client_options,
            },
        )

    def _connect(self) -> S3Store:
        from obstore.store import S3Store

        options = self._options
        endpoint = options.get("endpoint_url") or environ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
        if endpoint:
            check_endpoint(endpoint)
        credentials, region = self._credentials()
        config: S3Config = {"region": options.get("region") or environ("AWS_REGION", "AWS_DEFAULT_REGION") or region}
        if endpoint:
            # Both names: obstore lets a service-specific endpoint of the environment win over a keyword.
            config |= {"endpoint": endpoint, "aws_endpoint_url_s3": endpoint}
        else:
            # AWS itself: TLS guards the way and CRC-64 what is stored, at a third of the cost of signing a SHA-256.
            config |= {"unsigned_payload": True, "checksum_algorithm": "crc64nvme"}
        if options.get("anonymous"):
            config["skip_signature"] = True
        return S3Store(
            self._container,
            prefix=self._prefix or None,
            config={**config, **options.get("config", {})},
            credential_provider=credentials,
            client_options=self._client_options(endpoint),
            retry_config=self._retry_config(),
        )

    def _credentials(self) -> tuple[S3CredentialProvider | None, str]:
        """Where credentials come from (None: obstore finds them by itself), and the region that goes with them."""
        options = self._options
        region = "us-east-1"
        if options.get("anonymous") or options.get("config", {}).get("skip_signature"):
            return None, region
        if options.get("access_key_id"):
            return _StaticCredentials(options), region
        if not options.get("profile") and any(map(os.environ.get, _S3_ENVIRONMENT)):
            return None, region
        try:
            import boto3
        except ImportError:
            if options.get("profile"):
                raise InvalidInputError("profile= needs boto3: pip install 'mandapa[aws]'") from None
            require_metadata_service(
                self.url,
                "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or pip install 'mandapa[aws]' for profiles and SSO",
            )
            return None, region
        from obstore.auth.boto3 import Boto3CredentialProvider

        try:
            session = boto3.Session(profile_name=options.get("profile"))
            found = session.get_credentials()
            if found is None:
                raise AccessDeniedError(
                    f"no AWS credentials for {self.url}: pass them, set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
                    "or configure a profile"
                )
            found.get_frozen_credentials()  # an expired SSO login says so here, in its own words
            # botocore hands out credentials that may have only ten minutes left, so none may be kept for longer.
            return Boto3CredentialProvider(session, ttl=timedelta(minutes=10)), session.region_name or region
        except MandapaError:
            raise
        except Exception as error:  # noqa: BLE001 - botocore has forty kinds of error, each with a good message
            raise AccessDeniedError(f"no AWS credentials for {self.url}: {error}") from None


class _StaticCredentials:
    """Those given by keyword, and only those: obstore would add a session token that it finds in the environment."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._credentials: S3Credential = {
            "access_key_id": options["access_key_id"],
            "secret_access_key": options["secret_access_key"],
            "token": options.get("session_token"),
            "expires_at": None,
        }

    def __call__(self) -> S3Credential:
        return self._credentials
