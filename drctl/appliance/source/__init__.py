"""The source role: groups whose machines run on this libvirt host and are replicated from it."""
