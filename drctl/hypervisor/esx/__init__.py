"""ESX hosts, reached over SSH alone: no vCenter, no VI API, nothing installed there.

batch       many commands in one round trip (pure)
value       what vim-cmd prints: structs, faults (pure)
answers     what the other programs print (pure)
inventory   machines, disks and datastores of a host, from all of these
session     one host's shell; faults and lost connections become errors
host        the driver: power, registration, questions, disks
snapshots   snapshots of our own, and of nobody else
"""
