"""`loraplex adapters`: upload, list, show, delete, pin and unpin."""

import argparse
import sys
from datetime import UTC, datetime

from loraplex_client.cli_options import connect
from loraplex_client.errors import DeadlineExceeded, LoraplexError, Unavailable
from loraplex_client.render import (
    ago,
    human_bytes,
    one_line,
    plain,
    progress_bar,
    write_json,
    write_pairs,
    write_table,
)
from loraplex_client.upload import OnRetry
from loraplex_client.values import Adapter, Residency, UploadResult

EPILOG = """\
examples:
  loraplex adapters upload pirate ./my-peft-folder
  loraplex adapters upload pirate ./a-newer-folder --replace
  loraplex adapters list
  loraplex adapters list --json | jq -r .adapter_id
  loraplex adapters show pirate
  loraplex adapters pin pirate
  loraplex adapters delete pirate

An upload that broke off goes on where it stopped when the same command is run again within the
hour.
"""


_KEPT = "what arrived is kept for an hour: the same command goes on from there\n"


def _say(text: str) -> None:
    sys.stdout.write(one_line(text) + "\n")


def upload(args: argparse.Namespace) -> int:
    retries: list[LoraplexError] = []

    def on_retry(error: LoraplexError, number: int, of: int) -> None:
        retries.append(error)
        sys.stderr.write(f"loraplex: {one_line(str(error))}; trying again ({number} of {of})\n")
        sys.stderr.flush()

    try:
        result = _upload(args, on_retry)
    except KeyboardInterrupt:
        sys.stderr.write(_KEPT)
        raise
    except (Unavailable, DeadlineExceeded):
        if retries:
            sys.stderr.write(_KEPT)
        raise
    for warning in result.warnings:
        sys.stderr.write(f"loraplex: warning: {one_line(warning)}\n")
    if args.json:
        write_json(result, sys.stdout)
        return 0
    adapter = result.adapter
    done = "uploaded" if result.created else "already there:"
    _say(
        f"{done} {adapter.adapter_id} (rank {adapter.rank}, {human_bytes(adapter.size_bytes)}, "
        f"version {adapter.version[:12]})"
    )
    return 0


def _upload(args: argparse.Namespace, on_retry: OnRetry) -> UploadResult:
    with connect(args) as client, progress_bar(f"uploading {args.name}", sys.stderr) as progress:
        return client.upload_adapter(
            args.name,
            args.folder,
            args.replace,
            progress,
            if_match_etag=args.if_match,
            on_retry=on_retry,
            timeout=args.timeout,
        )


def list_all(args: argparse.Namespace) -> int:
    with connect(args) as client:
        adapters = list(client.list_adapters(timeout=args.timeout))
    if args.json:
        for adapter in adapters:
            write_json(adapter, sys.stdout)
    elif adapters:
        now = datetime.now(UTC)
        write_table(_HEADER, [_row(adapter, now) for adapter in adapters], sys.stdout)
    else:
        sys.stderr.write("no adapters (add one with: loraplex adapters upload NAME DIR)\n")
    return 0


_HEADER = (
    *("NAME", "RANK", "SIZE", "STATE", "WHERE", "PINNED", "IN USE", "LAST USED"),
    *("VERSION", "MODULES"),
)


def _row(adapter: Adapter, now: datetime) -> tuple[str, ...]:
    return (
        adapter.adapter_id,
        str(adapter.rank),
        human_bytes(adapter.size_bytes),
        adapter.state,
        adapter.residency,
        _pinned(adapter),
        str(adapter.references),
        ago(adapter.last_used_time, now),
        adapter.version[:12],
        ",".join(adapter.target_modules),
    )


def _pinned(adapter: Adapter) -> str:
    if not adapter.pinned:
        return "no"
    return "yes" if adapter.residency is Residency.DEVICE else "yes, but not there"


def show(args: argparse.Namespace) -> int:
    with connect(args) as client:
        _show(client.get_adapter(args.name, timeout=args.timeout), args.json)
    return 0


def _show(adapter: Adapter, as_json: bool) -> None:
    if as_json:
        write_json(adapter, sys.stdout)
        return
    used = adapter.last_used_time
    shown = {
        **plain(adapter),
        "size_bytes": f"{adapter.size_bytes} ({human_bytes(adapter.size_bytes)})",
        "target_modules": ", ".join(adapter.target_modules),
        "pinned": _pinned(adapter),
        "last_used_time": f"{plain(used)} ({ago(used, datetime.now(UTC))})" if used else "never",
        "references": f"{adapter.references} (requests that use it now)",
    }
    write_pairs(shown, sys.stdout)


def delete(args: argparse.Namespace) -> int:
    with connect(args) as client:
        client.delete_adapter(args.name, timeout=args.timeout)
    if args.json:
        write_json({"adapter_id": args.name, "deleted": True}, sys.stdout)
    else:
        _say(f"deleted {args.name}")
    return 0


def pin(args: argparse.Namespace) -> int:
    """`args.pinned` says whether this is pin or unpin."""
    with connect(args) as client:
        adapter = client.pin_adapter(args.name, args.pinned, timeout=args.timeout)
    if args.json:
        write_json(adapter, sys.stdout)
    else:
        _say(f"{'pinned' if args.pinned else 'unpinned'} {adapter.adapter_id}")
    return 0
