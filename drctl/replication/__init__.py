"""The data path: tap, shipper, receiver, reader, view server."""
