"""An uploader in a process of its own, so that it shares no interpreter with who measures.

python -m uploader HOST:PORT        run in benchmarks/
-> {"name": NAME, "folder": FOLDER, "pin": true}
<- {"first_byte": T, "sent": T, "published": T, "resident": T}      on `time.monotonic`
-> {"delete": NAME}
<- {}
"""

import json
import sys
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

from loraplex_client import Client, LoraplexError, Residency

SECONDS_BETWEEN_LOOKS = 0.01


class Moments(NamedTuple):
    """Of one upload, on `time.monotonic`, which processes of one machine share."""

    first_byte: float
    sent: float  # the last byte left the client
    published: float  # the server answered
    resident: float  # the adapter was seen in device memory


def upload(client: Client, name: str, folder: str, pin: bool) -> Moments:
    """Send it and have it brought to the device: by a pin, or else by a request of one token."""
    reports: list[float] = []  # when parts were sent, the header first

    def progress(sent: int, total: int) -> None:
        reports.append(time.monotonic())

    client.upload_adapter(name, folder, progress=progress)
    published = time.monotonic()
    if pin:
        client.pin_adapter(name)
    else:
        client.complete(token_ids=[0], adapter_id=name, max_tokens=1)
    while client.get_adapter(name).residency is not Residency.DEVICE:
        time.sleep(SECONDS_BETWEEN_LOOKS)
    return Moments(reports[0], reports[-1], published, time.monotonic())


def _replies(client: Client) -> Iterator[dict[str, Any]]:
    for line in sys.stdin:
        order = json.loads(line)
        if "delete" in order:
            client.delete_adapter(order["delete"])
            yield {}
        else:
            yield upload(client, order["name"], order["folder"], order["pin"])._asdict()


if __name__ == "__main__":
    try:
        with Client(sys.argv[1]) as to_server:
            for reply in _replies(to_server):
                print(json.dumps(reply), flush=True)
    except LoraplexError as error:
        sys.exit(str(error))
