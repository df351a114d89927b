"""Builds of snapshots, followed to their end."""

import time


def built(client, image, **more):
    made = client.snapshots.create(image, vcpu_count=1, memory_mb=256, **more)
    assert made.status == "pending" and made["id"] == made["snapshot_id"]
    return ended(client, made.snapshot_id)


def ended(client, snapshot_id, stages=None):
    """Follow a build to its end; `stages` gets what it was at, and how far."""
    deadline, offset, text = time.monotonic() + 900, 0, ""
    while True:
        told = client.snapshots.logs(snapshot_id, offset)
        if stages is not None and told["stage"] not in stages:
            stages[told["stage"]] = told["progress"]
        text, offset = text + told["log"], told["next_offset"]
        if told["is_complete"]:
            return client.snapshots.get(snapshot_id), text
        assert time.monotonic() < deadline, text
        time.sleep(0.2)


def started(client, snapshot_id):
    client.session_id = client.vms.create(snapshot_id=snapshot_id, vcpu_count=1, memory_mb=256)["session_id"]
    return client
