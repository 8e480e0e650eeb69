"""drctl: disaster recovery for virtual machines, from the hypervisor."""

__version__ = "0.1.0"
