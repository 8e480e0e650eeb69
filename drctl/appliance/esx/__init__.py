"""Both roles for an ESX host, reached over SSH."""
