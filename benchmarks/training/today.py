"""A checkpoint as people save it today, and by a run: how long it holds training up, and when it is in the store."""

from __future__ import annotations

import warnings
from pathlib import Path
from statistics import median

from common import GB, Sizes, end_uploader, now, s3, table, wait_for, warm
from loop import replace
from work import Training

with warnings.catch_warnings():  # botocore's own use of what Python has deprecated
    warnings.simplefilter("ignore")
    import boto3
    from boto3.s3.transfer import TransferConfig


def measure(home: Path, sizes: Sizes) -> None:
    """Print the table."""
    training = Training(sizes.mb, 1)
    path = home / "today.pt"
    took: dict[str, list[tuple[float, float]]] = {}
    with s3() as place:
        client = boto3.client(
            "s3",
            endpoint_url=place.options["endpoint_url"],
            region_name="us-east-1",
            aws_access_key_id="test",
            aws_secret_access_key="test",
        )
        one_put = TransferConfig(multipart_threshold=8 * GB)  # the server knows no multipart upload
        run = place.run("today", home)
        for number in range(-1, 2 * sizes.rounds):  # the first is not counted
            training.step()
            warm(home, sizes.mb)
            saved = replace(training, path)
            at = now()
            client.upload_file(str(path), "bucket", f"today/{number}", Config=one_put)
            uploaded = saved + now() - at
            warm(home, sizes.mb)
            at = now()
            handle = run.save_checkpoint(training.state(), step=number + 1)
            held = now() - at
            committed = wait_for(handle.done) - at
            if number >= 0:
                took.setdefault("torch.save only, to a file", []).append((saved, float("nan")))
                took.setdefault("torch.save and boto3's upload_file", []).append((uploaded, uploaded))
                took.setdefault("mandapa", []).append((held, committed))
        run.close()
        end_uploader(run)
    base = [blocked for blocked, _ in took["torch.save only, to a file"]]
    rows = []
    for name, found in took.items():
        ratio = median(blocked / b for (blocked, _), b in zip(found, base, strict=True))
        safe = median(safe for _, safe in found)
        verdict = ""
        if name == "mandapa":
            verdict = f"≤ 1.1 of torch.save: {'met' if ratio <= 1.1 else 'not met'}"
        rows.append(
            [
                name,
                f"{median(blocked for blocked, _ in found):.3f}",
                f"{ratio:.2f}",
                "never" if safe != safe else f"{safe:.3f}",
                verdict,
            ]
        )
    table(
        f"A checkpoint of {sizes.mb} MB, to S3 on loopback",
        ["", "s that training is held up", "of torch.save", "s until it is in the store", "target"],
        rows,
    )
