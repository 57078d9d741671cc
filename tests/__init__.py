"""The appliance's tests."""
