"""The source role for an ESX host, reached over SSH."""
