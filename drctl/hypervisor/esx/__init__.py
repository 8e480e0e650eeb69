"""ESX hosts, reached over SSH alone: no vCenter, no VI API, nothing installed there.

batch       many commands in one round trip (pure)
value       what vim-cmd prints: structs, faults (pure)
answers     what the other programs print (pure)
inventory   machines, disks and datastores of a host, from all of these
session     one host's shell; faults and lost connections become errors
host        the driver: power, registration, questions, disks
snapshots   snapshots of our own, and of nobody else
cycle       of a group's snapshots the one next act (pure)
source      the cycle carried out: what changed, read and told to a sink
frozen      a disk as its frozen layers have it together
guard       what forbids a cycle (pure)
upload      files sent there, whole or not at all
stun        how long machines stood still for snapshots
domain      a machine as libvirt would define it (pure)
findings    what would stand in the way of a recovery (pure)
"""
