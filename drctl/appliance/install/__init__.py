"""Installing, upgrading and removing appliances on hosts that are reached by SSH."""
