"""A simulated ESXi host: a real OpenSSH and shell before a daemon that does what hostd and VMware's programs do.

Independent of drctl: what it says is written by the facts alone (docs/esx-facts.md), so that it can judge the driver."""
