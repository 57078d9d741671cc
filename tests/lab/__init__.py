"""The lab itself, and the appliance end to end inside it."""
